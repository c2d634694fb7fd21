"""The vLLM engine, real: vLLM's CPU build where there is no GPU."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from clear_datasets.engines import EngineError
from clear_datasets.engines.transformers import Transformers
from tests.engines.conftest import NEEDS_VLLM

pytestmark = NEEDS_VLLM

TEXTS = [
    f"{t} Say {n}." for n in range(4) for t in ("Who?", "The river rises in the Alps. Where?", "größer, 日本語, 🙂")
]


@pytest.fixture(scope="module")
def vllm(tiny):
    from clear_datasets.engines.vllm import VLLM

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with VLLM(tiny, dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def prompts():
    return [[{"role": "user", "content": t}] for t in TEXTS]


def processes() -> list[int]:
    import psutil

    found = psutil.Process().children(recursive=True)
    return [
        p.pid for p in found if p.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in "".join(p.cmdline())
    ]


def test_it_gives_what_transformers_gives(vllm, tiny, prompts):
    plain = Transformers(tiny, dtype="float32")
    assert vllm.generate(prompts, max_tokens=8) == plain.generate(prompts, max_tokens=8)
    for labels in (["Y", "N"], ["A", "AB", "B"]):
        np.testing.assert_allclose(vllm.choose(prompts, labels), plain.choose(prompts, labels), atol=1e-3)
    responses = ["in the North Sea " * (i % 3) for i in range(len(prompts))]
    for _ in range(2):  # the second time the prefix cache holds the responses, too
        for mine, theirs in zip(vllm.logprobs(prompts, responses), plain.logprobs(prompts, responses), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-3)


def test_samples_follow_the_models_distribution(vllm, tiny):
    prompt = [{"role": "user", "content": "Who?"}]
    mine = vllm.generate([prompt], n=2000, temperature=1.0, max_tokens=1)[0]
    theirs = Transformers(tiny, dtype="float32").generate([prompt], n=2000, temperature=1.0, max_tokens=1)[0]
    for text in sorted(set(theirs), key=theirs.count)[-5:]:
        assert abs(mine.count(text) - theirs.count(text)) / 2000 < 6 * np.sqrt(theirs.count(text) / 2000 / 2000)


def test_more_requests_than_are_held_at_a_time(vllm, monkeypatch, prompts):
    from clear_datasets.engines import vllm_process as module

    wanted = vllm.generate(prompts, max_tokens=8)
    monkeypatch.setattr(module, "IN_FLIGHT", 5)
    assert vllm.generate(prompts, max_tokens=8) == wanted


def test_a_killed_engine_is_named_and_the_next_call_starts_a_fresh_one(vllm, prompts):
    import psutil

    wanted = vllm.generate(prompts, max_tokens=8)
    [core] = [p for p in psutil.Process().children() if "EngineCore" in " ".join([p.name(), *p.cmdline()])]
    killed: list[float] = []

    def kill() -> None:
        killed.append(time.monotonic())
        os.kill(core.pid, signal.SIGKILL)

    threading.Timer(1, kill).start()
    with pytest.raises(EngineError, match=r"engine process ended while \d+ requests were under way"):
        [vllm.generate(prompts, n=50, temperature=1.0, max_tokens=250) for _ in range(1000)]
    assert time.monotonic() - killed[0] < 30
    assert vllm.generate(prompts, max_tokens=8) == wanted


def test_nothing_is_left_of_a_closed_engine(vllm, prompts):
    vllm.generate(prompts[:1], max_tokens=2)
    assert processes()
    vllm.close()
    vllm.close()  # twice does no harm
    for _ in range(100):
        if not processes():
            break
        time.sleep(0.1)
    assert processes() == []
    assert vllm.generate(prompts[:1], max_tokens=2)  # loads anew


def test_one_engine_writes_with_an_adapter_and_judges_without(tmp_path: Path, tiny, prompts):
    import torch
    from safetensors.torch import save_file

    from clear_datasets.engines import vllm_process as module
    from clear_datasets.engines.vllm import VLLM

    torch.manual_seed(0)
    weights = {}
    for layer in range(2):
        for part, size in (("q_proj", 64), ("v_proj", 32)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            weights |= {f"{name}.lora_A.weight": torch.randn(8, 64), f"{name}.lora_B.weight": torch.randn(size, 8)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base, tuned = VLLM(tiny, dtype="float32"), VLLM(tiny, adapter=str(tmp_path), dtype="float32")
    assert base != tuned
    with tuned:
        written = tuned.generate(prompts, max_tokens=8)
        loaded = dict(module.LOADED)
        judged = base.generate(prompts, max_tokens=8)
        assert dict(module.LOADED) == loaded
        assert written != judged
        assert judged == Transformers(tiny, dtype="float32").generate(prompts, max_tokens=8)


def test_a_model_that_is_not_there(tmp_path: Path, prompts):
    from clear_datasets.engines.vllm import VLLM

    with pytest.raises(Exception, match="nowhere"):
        VLLM(str(tmp_path / "nowhere")).generate(prompts[:1])


@pytest.mark.model
def test_a_real_model_judges_as_in_transformers(half_billion):
    from clear_datasets.engines.vllm import VLLM

    file = Path(__file__).parents[2] / "scripts" / "data" / "squad.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()[:40]]
    asked = [
        [{"role": "user", "content": f"{r['context']}\n\n{r['question']}\n\nIs it {r['answer']}? Reply Yes or No."}]
        for r in rows
    ]
    plain = Transformers(half_billion, dtype="float32").choose(asked, ["Yes", "No"])
    assert np.ptp(plain[:, 0]) > 0.1
    with VLLM(half_billion, dtype="float32") as engine:
        np.testing.assert_allclose(engine.choose(asked, ["Yes", "No"]), plain, atol=0.02)
