"""What vLLM is started with, and what is said when it does not start; no vLLM is needed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from clear_datasets.engines import EngineError
from clear_datasets.engines.vllm import VLLM


@pytest.mark.parametrize("on_cpu, given, wanted", [(False, None, -1), (False, 4096, 4096), (True, None, None)])
def test_the_length_fits_the_memory_and_a_start_that_fails_names_what_helps(tiny, monkeypatch, on_cpu, given, wanted):
    started: list[dict[str, Any]] = []

    def start(source: str, **options: Any) -> None:  # the words of vLLM 0.32
        started.append(options)
        raise RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")

    vllm, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    vllm.LLM, vllm.platforms = start, platforms  # type: ignore[attr-defined]
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: on_cpu)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    with pytest.raises(EngineError, match=r"Engine core.*smaller max_model_len, or a gpu_memory_utilization") as caught:
        VLLM(tiny, max_model_len=given).generate([[{"role": "user", "content": "Who?"}]])
    assert "HF_TOKEN" not in str(caught.value)
    assert "checkpoint" not in str(caught.value)
    assert started[0]["max_model_len"] == wanted
