"""Nothing is left of an engine's processes when the process that started them ends, however it does."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

# Reads numbers of processes until the one that started it has ended, and then ends those.
_UNTIL_IT_ENDS = """
import os, signal, sys, time
pids = [int(line) for line in sys.stdin]
for sign, tries in ((signal.SIGTERM, 50), (signal.SIGKILL, 1)):
    for _ in range(tries):
        for pid in pids:
            try:
                os.kill(pid, sign)
            except OSError:
                pass
        time.sleep(0.1)
"""


class Guard:
    """A process that ends vLLM's when this one was killed: they would stay for ever, and keep the GPU's memory.

    So ends each worker of ``ds.map(num_proc=...)``: nothing that is registered to run at its exit does.
    """

    def __init__(self) -> None:
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _UNTIL_IT_ENDS],
            stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True,
        )  # fmt: skip
        os.register_at_fork(after_in_child=self._let_go)  # it waits until nobody can write to it

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Tell it of each process that is started within."""
        told = {p.pid for p in multiprocessing.active_children()}
        done = threading.Event()

        def look() -> None:
            while True:
                last = done.wait(0.1)
                for pid in {p.pid for p in multiprocessing.active_children()} - told:
                    os.write(self._pipe, f"{pid}\n".encode())
                    told.add(pid)
                if last:
                    return

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def close(self) -> None:
        """End it; the processes are ended already."""
        self.process.kill()
        self.process.wait()
        self._let_go()

    @property
    def _pipe(self) -> int:
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    def _let_go(self) -> None:
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.process.stdin.close()
