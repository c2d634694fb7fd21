"""Where engines run: a process for each GPU, a notebook, a process that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from clear_datasets import engines
from clear_datasets.engines.transformers import Transformers
from clear_datasets.engines.vllm import VLLM
from tests.engines.conftest import NEEDS_VLLM

KINDS = ["Transformers", pytest.param("VLLM", marks=NEEDS_VLLM)]
STEPS = """
from datasets import Dataset
from clear_datasets import BSDetector, Clear
from clear_datasets.engines.{module} import {kind}
ds = Dataset.from_list([{{"prompt": f"Who is {{i}}?", "response": str(i)}} for i in range(20)])
clear = Clear(engine={kind}({model!r}, dtype="float32"), confidence=BSDetector(k={k}, max_tokens={tokens}))
"""


def steps(kind: str, model: str, k: int = 2, tokens: int = 8) -> str:
    return STEPS.format(kind=kind, module=kind.lower(), model=model, k=k, tokens=tokens)


@pytest.mark.parametrize("visible, engine, ranks", [
    ("", VLLM("m"), {0: "0", 3: "3"}),
    ("7,5,GPU-1f,2", VLLM("m"), {0: "7", 2: "GPU-1f"}),
    ("7,5,3,2", VLLM("m", tensor_parallel_size=2), {0: "7,5", 1: "3,2"}),
])  # fmt: skip
def test_each_rank_has_its_gpus_and_its_compile_cache(monkeypatch, visible, engine, ranks):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for rank, wanted in ranks.items():
        monkeypatch.setattr(engines, "_RANKS", {})
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setenv("VLLM_CACHE_ROOT", "cache")
        for later in (rank, 1 - rank):  # a process keeps the first, whichever part it is given later
            engines.use_rank(later, engine.gpus)
            assert os.environ["CUDA_VISIBLE_DEVICES"] == wanted
        assert os.environ["VLLM_CACHE_ROOT"] == f"cache/rank{rank}"


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr(engines, "_RANKS", {})
    with pytest.raises(ValueError, match=r"rank 2 .* has 4, and each process takes 2; expected num_proc=2"):
        engines.use_rank(2, gpus=2)


@pytest.mark.parametrize("gpus, takes, hinted", [(1, 1, False), (8, 1, "num_proc=8"), (8, 4, "num_proc=2"), (2, 2, 0)])
def test_several_gpus_without_ranks(monkeypatch, recwarn, gpus, takes, hinted):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    engines.hint_at_ranks(takes)
    assert bool(recwarn) == bool(hinted)
    assert not hinted or hinted in str(recwarn[0].message)


def test_the_default_is_vllm_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for gpus, kind in ((0, Transformers), (1, VLLM)):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        assert engines.default_engine("m", "v2") == kind("m", "v2")


@NEEDS_VLLM
def test_engines_make_room_on_a_gpu(monkeypatch):
    from clear_datasets.engines import vllm_process as module

    class Loaded:
        def close(self) -> None:
            closed.append(self)

    closed: list[Loaded] = []
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: False)
    monkeypatch.setattr(module, "LOADED", {VLLM(m, gpu_memory_utilization=0.4).weights: Loaded() for m in "ab"})
    module._make_room(VLLM("c", gpu_memory_utilization=0.2))
    assert closed == []
    module._make_room(VLLM("c", gpu_memory_utilization=0.5))
    assert len(closed) == 1
    assert list(module.LOADED) == [VLLM("b", gpu_memory_utilization=0.4).weights]


@pytest.mark.parametrize("kind", KINDS)
def test_a_notebook_maps_twice_and_after_an_interrupt(kind, tiny):
    manager_of = pytest.importorskip("jupyter_client.manager")
    pytest.importorskip("ipykernel")
    manager, client = manager_of.start_new_kernel(env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"})
    output: list[str] = []

    def cell(code: str) -> str:
        reply = client.execute_interactive(code, timeout=180, output_hook=lambda m: output.append(str(m["content"])))
        return reply["content"].get("ename", "ok")

    try:
        scored = "ds.map(clear.score, batched=True, load_from_cache_file=False)"
        assert cell(steps(kind, tiny)) == "ok", output
        if kind == "VLLM":  # interrupts while it is loaded
            for later in (1, 5):  # torch is imported, and vLLM
                threading.Timer(later, manager.interrupt_kernel).start()
                assert cell(f"[{scored} for _ in range(100)]") == "KeyboardInterrupt", output
                assert cell("clear.close()") == "ok", output
        assert cell(steps(kind, tiny) + f"first = {scored}") == "ok", output
        assert cell(f"second = {scored}") == "ok", output
        threading.Timer(3, manager.interrupt_kernel).start()
        long = steps(kind, tiny, k=500, tokens=200) + "print('begun')\n"
        assert cell(f"{long}[{scored} for _ in range(100)]") == "KeyboardInterrupt", output
        assert "begun" in str(output)
        again = f"{steps(kind, tiny)}third = {scored}\nassert third.column_names == first.column_names"
        assert cell(f"{again}\nassert not any(x != x for x in third['clear_consistency'])") == "ok", output
        assert cell(f"clear.close()\nfourth = {scored}") == "ok", output
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@NEEDS_VLLM
def test_worker_processes_have_an_engine_each_and_leave_nothing(tiny, tmp_path):
    script = tmp_path / "ranks.py"
    work = "two = ds.map(clear.score, batched=True, batch_size=5, num_proc=2, with_rank=True)"
    check = "one = ds.map(clear.score, batched=True)\nprint('alike:', one['clear_error'][:] == two['clear_error'][:])"
    body = "import multiprocess\nmultiprocess.set_start_method('spawn')" + steps("VLLM", tiny) + f"{work}\n{check}"
    script.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in body.splitlines()))
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "MARK": (mark := f"test-{os.getpid()}")}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "alike: True" in done.stdout
    assert gone(lambda: of_environment("MARK", mark))


@NEEDS_VLLM
def test_a_killed_process_leaves_no_engine(tiny):
    code = steps("VLLM", tiny) + "clear.score(ds[:2])\nimport os; os.kill(os.getpid(), 9)"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "MARK": (mark := f"kill-{os.getpid()}")}
    seen: list[int] = []
    quiet = subprocess.DEVNULL
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=quiet, stderr=quiet) as process:
        while process.poll() is None:
            seen = of_environment("MARK", mark) or seen
            time.sleep(0.2)
    assert process.returncode == -signal.SIGKILL
    assert len(seen) >= 2
    assert gone(lambda: of_environment("MARK", mark))


@NEEDS_VLLM
def test_replicas_on_ray_have_an_engine_each_and_one_that_is_killed_is_replaced_and_leaves_nothing(tiny, tmp_path):
    work = f"""
import numpy as np
from clear_datasets import distributed
two = distributed.score(ds, clear, replicas=2, batch_size=5, folder={str(tmp_path)!r})
one = ds.map(Clear(engine=clear.engine, confidence=clear.confidence, cache=False).score, batched=True)
close = np.allclose(one["clear_reflection"][:], two["clear_reflection"][:], atol=1e-3, equal_nan=True)
print("alike:", two["clear_error"][:] == one["clear_error"][:], close, np.isfinite(one["clear_reflection"][:]).any())
"""
    log, seen, killed = tmp_path / "log", set[psutil.Process](), 0
    command = [sys.executable, "-c", steps("VLLM", tiny) + work]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "RAY_worker_niceness": "0"}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        while process.poll() is None:
            time.sleep(0.5)
            with suppress(psutil.Error):
                running = psutil.Process(process.pid).children(recursive=True)
                seen |= set(running)
                cores = [p for p in running if not killed and "EngineCore" in " ".join(p.cmdline())]
                if cores:
                    killed = cores[0].ppid()
                    os.kill(killed, signal.SIGKILL)  # its engine is loading, and its batch waits for it
        told = process.communicate()[0]
    assert killed
    assert "alike: True True True" in told, log.read_text()[-3000:]
    assert gone(lambda: [p.pid for p in seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE])


def of_environment(name: str, value: str) -> list[int]:
    """Numbers of the processes that were started with a variable, their own children among them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def gone(left: Callable[[], list[int]], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while left() and time.monotonic() < end:
        time.sleep(0.2)
    return not left()
