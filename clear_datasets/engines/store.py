"""Answers on disk, in an SQLite file that many processes share."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clear_datasets.engines.database import Database, transaction

NAME = "answers.sqlite"
_KEYS = 500  # looked up in one statement
_HOUR = 3600  # when an answer was used is known to the hour: look-ups write once an hour at most
_GIB = 1 << 30
_HELD = 50_000  # answers that wait in memory for a disk that takes nothing
_CHECKED = 64 << 20  # bytes that are written between two looks at the size

Item = tuple[bytes, int, bytes]  # key, number of the sample, value


@dataclass(frozen=True)
class Info:
    """What a file holds.

    Attributes:
        path: The file.
        answers: How many.
        size: Bytes on the disk.
        limit: Bytes that it may grow to; the answers that were not used for longest go first.
        oldest: When the answer was used that was not used for longest, seconds since 1970; None of an empty file.
    """

    path: Path
    answers: int
    size: int
    limit: int
    oldest: float | None


def limit_of_size() -> int:
    """Bytes that the file may grow to: ``CLEAR_CACHE_GB``, 20 by default."""
    stated = os.environ.get("CLEAR_CACHE_GB") or "20"
    try:
        limit = float(stated)
    except ValueError:
        limit = -1.0
    if not limit > 0:
        raise ValueError(f"CLEAR_CACHE_GB is {stated!r}; expected a number of GiB above 0")
    return int(limit * _GIB)


class Store:
    """Answers by key and number, in a folder. What cannot be written, as the disk is full, say, waits in memory.

    Args:
        folder: Made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.limit = limit_of_size()
        self.database = Database(self.path)
        self._waiting: dict[bytes, dict[int, bytes]] = {}
        self._written = _CHECKED  # so that the first write looks at the size

    def get(self, keys: Iterable[bytes]) -> dict[bytes, dict[int, bytes]]:
        """Values by key and number, of the keys that are known."""
        wanted = list(dict.fromkeys(keys))
        found: dict[bytes, dict[int, bytes]] = {}

        def look(connection: sqlite3.Connection) -> None:
            found.clear()
            now, old = int(time.time()), []
            for start in range(0, len(wanted), _KEYS):
                part = wanted[start : start + _KEYS]
                marks = ",".join("?" * len(part))
                rows = connection.execute(f"SELECT key, number, value, used FROM answers WHERE key IN ({marks})", part)
                for key, number, value, used in rows:
                    found.setdefault(key, {})[number] = value
                    if now - used > _HOUR:
                        old.append((now, key, number))
            if old and not self.database.read_only:
                with suppress(sqlite3.OperationalError), transaction(connection):  # found is found
                    connection.executemany("UPDATE answers SET used = ? WHERE key = ? AND number = ?", old)

        with self.database.lock:
            if wanted:
                self.database.run(look)
            for key in self._waiting.keys() & set(wanted):
                found[key] = {**found.get(key, {}), **self._waiting[key]}
        return found

    def put(self, items: Sequence[Item]) -> None:
        """Store values; one that is there stays as it is."""
        with self.database.lock:
            for key, number, value in items:
                self._waiting.setdefault(key, {})[number] = value
            if self._waiting and not self.database.read_only:
                self.database.run(self._write)
            elif self._waiting:
                self.database.say(
                    f"the cache of answers, {self.path}, is read-only: what is asked now is not kept in it"
                )
            for key in list(self._waiting)[:-_HELD]:
                del self._waiting[key]

    def _write(self, connection: sqlite3.Connection) -> None:
        now = int(time.time())
        rows = [(key, n, value, now) for key, values in self._waiting.items() for n, value in values.items()]
        with transaction(connection):
            connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", rows)
        self._waiting.clear()
        self._written += sum(len(value) + 40 for _, _, value, _ in rows)
        if self._written >= min(_CHECKED, self.limit // 20):
            self._written = 0
            self._bound(connection)

    def info(self) -> Info:
        """What the file holds."""

        def count(connection: sqlite3.Connection) -> Info:
            number, oldest = connection.execute("SELECT count(*), min(used) FROM answers").fetchone()
            return Info(self.path, number, self._on_disk(), self.limit, oldest)

        return self.database.run(count) or Info(self.path, 0, self._on_disk(), self.limit, None)

    def prune(self, before: float | None = None) -> int:
        """Delete the answers that were last used before a time, or all; how many they were."""

        def delete(connection: sqlite3.Connection) -> int:
            with transaction(connection):
                # Up to an hour may lie between the last use and the last one that was noted.
                where, values = ("", ()) if before is None else (" WHERE used < ?", (before - _HOUR,))
                gone = connection.execute(f"DELETE FROM answers{where}", values).rowcount
            self._shrink(connection)
            return int(gone)

        return self.database.run(delete) or 0

    def close(self) -> None:
        """Close the file; the next call opens it anew."""
        self.database.close()

    def _bound(self, connection: sqlite3.Connection) -> None:
        """Delete the answers that were not used for longest, until nine tenths of the limit are left."""
        pages, free, size = (connection.execute(f"PRAGMA {name}").fetchone()[0]
                             for name in ("page_count", "freelist_count", "page_size"))  # fmt: skip
        used = (pages - free) * size
        if used <= self.limit:
            return
        (number,) = connection.execute("SELECT count(*) FROM answers").fetchone()
        gone = max(1, round(number * (1 - 0.9 * self.limit / used)))
        with transaction(connection):
            connection.execute(
                "DELETE FROM answers WHERE (key, number) IN "
                "(SELECT key, number FROM answers ORDER BY used, number DESC LIMIT ?)", (gone,),
            )  # fmt: skip
        self._shrink(connection)

    def _shrink(self, connection: sqlite3.Connection) -> None:
        """Give the disk back what is free."""
        with suppress(sqlite3.OperationalError):  # another process reads
            connection.execute("PRAGMA incremental_vacuum").fetchall()
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _on_disk(self) -> int:
        files = [self.path, *(self.path.with_name(NAME + end) for end in ("-wal", "-shm"))]
        return sum(f.stat().st_size for f in files if f.exists())
