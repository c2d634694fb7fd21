"""What a model is known by, and checkpoints that would be read wrongly."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
import pytest
from datasets.fingerprint import Hasher

from clear_datasets.engines import EngineError
from clear_datasets.engines.checkpoint import source_of
from clear_datasets.engines.openai import OpenAI
from clear_datasets.engines.transformers import Transformers
from clear_datasets.engines.vllm import VLLM
from tests.conftest import TEMPLATE


def model(folder: Path, template: str = TEMPLATE, **config: object) -> str:
    """A folder with what a model is known by, without weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.mark.parametrize("kind", [Transformers, VLLM])
def test_a_model_that_is_told_a_date_is_another_when_it_is_told_another_date(tmp_path, monkeypatch, kind):
    cache, commit = tmp_path / "cache", "1" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    names = []
    for name, template in (("dated", "{{ strftime_now('%Y') }}"), ("plain", TEMPLATE)):
        hub = cache / f"models--{kind.__name__}--{name}"
        model(hub / "snapshots" / commit, template)
        (hub / "refs").mkdir()
        (hub / "refs" / "main").write_text(commit)
        (tmp_path / f"{name}.gguf").write_text(template)  # in its metadata
        names += [f"{kind.__name__}/{name}", model(tmp_path / name, template), str(tmp_path / f"{name}.gguf")]
    before = [kind(name).identity for name in names]
    monkeypatch.setattr("clear_datasets.engines.checkpoint.DATE", datetime.date(2027, 1, 1))
    changed = [kind(name).identity != identity for name, identity in zip(names, before, strict=True)]
    assert changed == [True] * 3 + [False] * 3


def test_the_length_is_part_of_the_identity_where_it_changes_the_positions(tmp_path):
    plain, long = model(tmp_path / "plain"), model(tmp_path / "long", rope_parameters={"long_factor": [1.0, 2.0]})
    for name, parts in ((plain, False), (long, True)):
        whole, short, other = VLLM(name), VLLM(name, max_model_len=4096), VLLM(name, max_model_len=8192)
        assert (whole.identity != short.identity) == (short.identity != other.identity) == parts
    assert VLLM(long, dtype="float16", max_model_len=4096).identity == VLLM(
        long, dtype="float16", max_model_len=4096, gpu_memory_utilization=0.5).identity  # fmt: skip


@pytest.mark.parametrize(
    "kind, settings, changed",
    [
        (Transformers, {"dtype": "float64"}, True),
        (Transformers, {"seed": 1}, True),
        (Transformers, {"trust_remote_code": True}, True),
        (Transformers, {"adapter": "of/another"}, True),
        (Transformers, {"device": "cuda", "batch_tokens": 64}, False),
        (OpenAI, {"base_url": "http://127.0.0.1:9/v1"}, True),
        (OpenAI, {"api_key": "other", "concurrency": 1, "retries": 0, "deadline": 1.0}, False),
        (VLLM, {"dtype": "float32"}, True),
        (VLLM, {"quantization": "fp8"}, True),
        (VLLM, {"seed": 1}, True),
        (VLLM, {"adapter": "of/another"}, True),
        (VLLM, {"gpu_memory_utilization": 0.5}, False),
        *((VLLM, {name: 2}, False) for name in (
            "block_size", "cpu_offload_gb", "data_parallel_size", "max_lora_rank", "max_loras",
            "max_num_batched_tokens", "max_num_seqs", "pipeline_parallel_size", "swap_space", "tensor_parallel_size",
        )),
        *((VLLM, {name: True}, False) for name in (
            "disable_log_stats", "enable_chunked_prefill", "enable_lora", "enable_prefix_caching", "enforce_eager",
        )),
    ],
)  # fmt: skip
def test_an_engine_is_another_where_its_answers_may_be(tmp_path, kind, settings, changed):
    name = model(tmp_path / "model")
    assert (kind(name, **settings).identity != kind(name).identity) == changed
    assert kind(name, **settings).identity == kind(name, **settings).identity != kind(f"{name}2").identity


@pytest.mark.parametrize("kind", [Transformers, VLLM])
def test_a_gguf_file_whose_scaled_positions_would_be_lost_is_refused(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    if kind is VLLM:
        pytest.importorskip("vllm")
    file = tmp_path / "llama-3.1.gguf"
    writer = gguf.GGUFWriter(str(file), "llama")
    for add, value in (
        (writer.add_context_length, 131072), (writer.add_embedding_length, 64), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 64), (writer.add_head_count, 2), (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_freq_base, 500000.0), (writer.add_vocab_size, 8),
    ):  # fmt: skip
        add(value)
    writer.add_token_list([str(i) for i in range(8)])
    writer.add_tensor("rope_freqs.weight", np.ones(16, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EngineError, match=r"llama-3\.1\.gguf scales its positions.*rope_freqs.*take its safetensors"):
        kind(str(file)).generate([[{"role": "user", "content": "Who?"}]])


@pytest.mark.parametrize("kind", [Transformers, VLLM])
def test_a_model_may_be_given_as_a_path(tiny, kind):
    one, other = kind(Path(tiny), adapter=Path("adapter")), kind(tiny, adapter="adapter")
    assert (one, hash(one), repr(one), one.identity) == (other, hash(other), repr(other), other.identity)
    assert Hasher.hash(one) == Hasher.hash(other)
    if kind is Transformers:
        prompts = [[{"role": "user", "content": "Who?"}]]
        assert kind(Path(tiny)).generate(prompts, max_tokens=2) == kind(tiny).generate(prompts, max_tokens=2)
    with pytest.raises(FileNotFoundError, match=r"no GGUF file at .*none\.gguf"):
        source_of(Path(tiny, "none.gguf"))
