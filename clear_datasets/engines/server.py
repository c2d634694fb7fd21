"""What talking to a server takes: an address that is no secret, and a thread for what is asynchronous."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Awaitable, Callable, Coroutine
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


async def patiently(call: Callable[[], Awaitable[T]], failed: Callable[[T], object], retries: int) -> T:
    """What a call gives, repeated where that is a failure; pauses grow to 8 seconds, as those of the openai package."""
    result = await call()
    for repeated in range(retries):
        if not failed(result):
            break
        await asyncio.sleep(min(0.5 * 2**repeated, 8))
        result = await call()
    return result


def error_in(reply: Any) -> str:
    """What a reply says is wrong, in place of answers and with the status of success, as OpenRouter's do; else ""."""
    error = None if reply.choices else getattr(reply, "error", None)
    message = error.get("message") if isinstance(error, dict) else None
    return " ".join(str(message or error or "").split())[:300]
