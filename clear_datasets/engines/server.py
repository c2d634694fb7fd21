"""What talking to a server takes: an address that is no secret, and a thread for what is asynchronous."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_ADDRESS = re.compile(r"https?://(\[[\da-f:.]+\]|[^\s/?#@:\[\]]+)(:\d+)?(/[^\s?#]*)?", re.IGNORECASE)
_LOOPS: dict[int, asyncio.AbstractEventLoop] = {}

T = TypeVar("T")


def check_address(address: str, name: str) -> None:
    """Refuse an address that may hold a secret: addresses stand in errors, on cards and in the keys of the cache."""
    if _ADDRESS.fullmatch(address):
        return
    shown = re.sub(r"^(https?://)?.*@", r"\1***@", address, flags=re.DOTALL | re.IGNORECASE)
    shown = re.sub(r"[?#].*", lambda rest: f"{rest[0][0]}***", shown, flags=re.DOTALL)
    raise ValueError(
        f"{name} is {shown!r}; expected http:// or https://, a host and a path, without a user, a password or a query, "
        "as it is printed and kept: give the key as api_key= or OPENAI_API_KEY"
    )


def wait_for(job: Coroutine[Any, Any, T]) -> T:
    """Run to the end in a thread of its own: a notebook's event loop is running already in this one."""
    pid = os.getpid()
    if pid not in _LOOPS:
        _LOOPS[pid] = asyncio.new_event_loop()
        threading.Thread(target=_LOOPS[pid].run_forever, daemon=True, name="clear_datasets OpenAI").start()
    future = asyncio.run_coroutine_threadsafe(job, _LOOPS[pid])
    try:
        return future.result()
    except BaseException:
        future.cancel()  # an interrupt stops what is under way
        raise
