"""Processes that an engine has started end with the one that started them; no vLLM is needed."""

from __future__ import annotations

import signal
import subprocess
import sys

# Starts a process as vLLM starts its own, and is killed as the kernel kills one that takes too much memory.
STARTS = """
import multiprocessing, os, signal, time
from clear_datasets.engines.guard import Guard
guard = Guard()
with guard.watching():
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
print("started", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_ends_with_the_killed_one_that_started_it():
    # The output ends with the last process that may write to it, which would sleep for a minute.
    done = subprocess.run([sys.executable, "-c", STARTS], check=False, capture_output=True, text=True, timeout=45)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "started\n"), done.stderr
