"""What comes with a model is not run: neither its code, unless that is passed, nor what is in pickled weights."""

from __future__ import annotations

import ast
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import clear_datasets
from clear_datasets import NLI, Clear
from clear_datasets.engines import EngineError
from clear_datasets.engines.checkpoint import unload
from clear_datasets.engines.transformers import Transformers
from clear_datasets.estimate import estimate

PACKAGE = Path(clear_datasets.__file__).parent
ROWS = Dataset.from_dict({"question": ["Who?", "Where?"], "answer": ["me", "here"]})
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
Path({marker!r}).touch()

class MyConfig(LlamaConfig):
    model_type = {kind!r}

class MyModel(LlamaForCausalLM):
    config_class = MyConfig

class MyClassifier(LlamaForSequenceClassification):
    config_class = MyConfig

class MyTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that is there once the code was run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks at the terminal"))
    yield tmp_path / "run"
    unload()


def with_code(tiny: str, folder: Path, marker: Path, kind: str) -> str:
    """The tiny model with code of its own, as a model of a kind that transformers has (llama), or has not."""
    shutil.copytree(tiny, folder)
    (folder / "own_code.py").write_text(CODE.format(marker=str(marker), kind=kind))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "MyConfig", "AutoModelForCausalLM": "MyModel"}
    classes |= {"AutoModelForSequenceClassification": "MyClassifier"}
    config |= {"model_type": kind, "auto_map": {auto: f"own_code.{name}" for auto, name in classes.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": [None, "own_code.MyTokenizer"]}}
    if kind != "llama":
        tokenizer["tokenizer_class"] = "MyTokenizer"
    file.write_text(json.dumps(tokenizer))
    return str(folder)


def uses(model: str, out: Path) -> dict[str, object]:
    from clear_datasets.finetune import finetune

    prompt = [{"role": "user", "content": "Who?"}]
    return {
        "score": lambda: Transformers(model).generate([prompt], max_tokens=2),
        "finetune": lambda: finetune(ROWS, model, out, max_steps=1),
        "estimate": lambda: estimate(ROWS, Clear(model, engine=Transformers(model))),
        "similarity": lambda: NLI(model)([("a", "b")], None),
    }


@pytest.mark.parametrize("use", ["score", "finetune", "estimate", "similarity"])
def test_a_models_own_code_does_not_run(use, tiny, tmp_path, marker):
    if use == "finetune":
        pytest.importorskip("trl")
        pytest.importorskip("peft")
    model = with_code(tiny, tmp_path / "model", marker, "my_llama")
    with pytest.raises((ValueError, EngineError), match=r"trust_remote_code|my_llama"):
        uses(model, tmp_path / "out")[use]()
    assert not marker.exists()


def test_a_model_of_a_known_kind_loads_without_its_own_code(tiny, tmp_path, marker):
    model = with_code(tiny, tmp_path / "model", marker, "llama")
    prompt = [{"role": "user", "content": "Who?"}]
    assert Transformers(model).generate([prompt], max_tokens=8) == Transformers(tiny).generate([prompt], max_tokens=8)
    assert not marker.exists()


def test_a_models_own_code_runs_when_that_is_passed(tiny, tmp_path, marker):
    model = with_code(tiny, tmp_path / "model", marker, "my_llama")
    engine = Transformers(model, trust_remote_code=True)
    prompt = [{"role": "user", "content": "Who?"}]
    assert engine.generate([prompt], max_tokens=8) == Transformers(tiny).generate([prompt], max_tokens=8)
    assert marker.exists()
    assert engine.identity != Transformers(model).identity  # its answers are not taken for those of transformers' class


class Harmful:
    """Runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_code_in_pickled_weights_does_not_run(tiny, tmp_path, marker):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Harmful(marker)}, model / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported"):
        Transformers(str(model)).generate([[{"role": "user", "content": "Who?"}]], max_tokens=2)
    assert not marker.exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # it would have run


def calls(tree: ast.AST) -> Iterator[str]:
    """What is imported, and what is called with which constants, as a text each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"import {node.module}"
            yield from (f"import {node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call):
            yield f"{ast.unparse(node.func)}()"
            yield from (f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords)


UNSAFE = {
    *(f"import {name}" for name in ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")),
    *("eval()", "exec()", "compile()", "__import__()", "os.system()", "os.popen()", "torch.load()", "torch.save()"),
    *("shell=True", "weights_only=False", "trust_remote_code=True", "allow_pickle=True"),
}


@pytest.mark.parametrize("text", ["from pickle import loads", "import marshal", "eval(x)", "run(c, shell=True)"])
def test_what_is_unsafe_is_recognised(text):
    assert UNSAFE & set(calls(ast.parse(text)))


def test_the_package_runs_no_text():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    found = {str(f.relative_to(PACKAGE)): UNSAFE & set(calls(ast.parse(f.read_text()))) for f in files}
    assert not {name: unsafe for name, unsafe in found.items() if unsafe}
