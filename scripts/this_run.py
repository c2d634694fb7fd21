"""What stands beside every figure: the command, the machine and the date that made it."""

from __future__ import annotations

import datetime
import platform
import sys
from pathlib import Path


def this_run(*engines: str) -> dict[str, str]:
    """Of this process, for a JSON file; `engines` with their versions."""
    import torch  # a spawned engine reads the script anew

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = [platform.processor() or platform.machine(), f"{torch.get_num_threads()} threads", gpu]
    return {
        "command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]]),
        "machine": ", ".join([*machine, *engines, f"torch {torch.__version__}"]),
        "date": datetime.date.today().isoformat(),
    }
