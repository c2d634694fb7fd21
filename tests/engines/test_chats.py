"""What becomes of a chat: the tokenizer that a model comes with, and the day that its chat template asks for."""

from __future__ import annotations

import base64
import datetime
import json
from pathlib import Path

import pytest
from datasets import Dataset

from clear_datasets.engines import EngineError
from clear_datasets.engines.chats import render, tokenizer_of
from clear_datasets.engines.checkpoint import load
from clear_datasets.engines.transformers import Transformers
from tests.conftest import TEMPLATE, make_tiny

DATED = (
    "{% if strftime_now is defined %}<|system|>Today is {{ strftime_now('%d %B %Y') }}.<|end|>{% endif %}" + TEMPLATE
)
CHAT = [{"role": "user", "content": "Who?"}]


def mistral(folder: Path) -> Path:
    """A tiny model that calls itself Mistral's, and has the vocabulary of one beside its own."""
    config = json.loads((make_tiny(folder) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tekken = {
        "config": {
            "pattern": "[^\\s]+|\\s+", "num_vocab_tokens": 256, "default_vocab_size": 256 + len(special),
            "default_num_special_tokens": len(special), "version": "v3",
        },
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None}
                  for i in range(256)],
        "special_tokens": [{"rank": i, "token_str": s, "is_control": True} for i, s in enumerate(special)],
    }  # fmt: skip
    (folder / "tekken.json").write_text(json.dumps(tekken))
    return folder


def test_a_model_of_mistral_has_its_chat_template_also_beside_mistral_common(tmp_path):
    """Fails without the mend where mistral-common is installed: vLLM brings it."""
    engine = Transformers(str(mistral(tmp_path)), dtype="float32")
    assert engine.generate([CHAT], max_tokens=2)
    chats = load(engine).chats
    assert chats.tokenizer.decode(chats.encode([CHAT], [1])[0]) == "<|user|>Who?<|end|><|assistant|>"


def test_a_vocabulary_of_mistral_without_a_chat_template_is_refused(tmp_path):
    folder = mistral(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    with pytest.raises(
        EngineError, match=r"tekken\.json, but neither tokenizer\.json nor a chat template.*put a chat_te"
    ):
        Transformers(str(folder), dtype="float32").generate([CHAT])
    (folder / "chat_template.jinja").write_text("[INST]{{ messages[0]['content'] }}[/INST]")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert Transformers(str(folder), dtype="float32").generate([CHAT], max_tokens=2)


@pytest.fixture
def day(monkeypatch):
    """Sets the day that `transformers` tells a chat template."""

    def become(year: int) -> None:
        class Frozen(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(year, 5, 17)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Frozen)

    return become


def test_a_model_that_is_told_the_date_is_asked_the_same_on_every_day(tmp_path, day):
    engine = Transformers(str(make_tiny(tmp_path, template=DATED)), dtype="float32")
    chats = load(engine).chats
    said = []
    for year in (2031, 2032):
        day(year)
        assert str(year) in chats.tokenizer.apply_chat_template(CHAT, tokenize=False)  # of anybody else
        said.append((chats.encode([CHAT], [1]), engine.generate([CHAT], n=5, temperature=1.0, max_tokens=8)))
    assert said[0] == said[1]
    assert chats.tokenizer.decode(said[0][0][0]).startswith("<|system|>Today is 26 July 2024.<|end|><|user|>Who?")


@pytest.mark.parametrize("before", ["", "\n", "  ", "\n\n"])
def test_any_form_of_the_date_is_fixed_and_the_rest_of_a_template_stays(tmp_path, before):
    """As gpt-oss has it: in a macro, and by other codes."""
    template = before + (
        "{% macro head() %}{% set form = '%Y-%m-%d' %}{{ strftime_now(form) }}, a {{ strftime_now('%A, %-d %b') }}"
        "{% endmacro %}{{ head() }}" + TEMPLATE
    )
    tokenizer = tokenizer_of(str(make_tiny(tmp_path, template=template)))
    day = datetime.datetime.now().strftime
    plain = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert plain.strip().startswith(day("%Y-%m-%d, a %A, %-d %b"))
    assert render(tokenizer, CHAT) == plain.replace(day("%Y-%m-%d, a %A, %-d %b"), "2024-07-26, a Friday, 26 Jul")


def test_a_fine_tuning_that_is_done_is_not_another_one_on_the_next_day(tmp_path, day):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    from clear_datasets.finetune import finetune

    model = str(make_tiny(tmp_path / "model", template=DATED))
    rows = Dataset.from_dict({"question": ["Who?"] * 2, "answer": ["Yes"] * 2})
    day(2031)
    out = Path(finetune(rows, model, tmp_path / "out", max_steps=1))
    written = (out / "adapter_model.safetensors").stat().st_mtime_ns
    day(2032)
    finetune(rows, model, out, max_steps=1)
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == written
    assert (out / "chat_template.jinja").read_text() == DATED
