"""Answers on disk: one SQLite file that many processes share, and that outlives any of them."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

NAME = "answers.sqlite"
VERSION = 1  # of the tables
_APPLICATION = 0x436C7244  # "ClrD", by which a file is known to be ours
_TABLE = """CREATE TABLE IF NOT EXISTS answers (
    key BLOB NOT NULL, number INTEGER NOT NULL, value BLOB NOT NULL, used INTEGER NOT NULL, PRIMARY KEY (key, number)
) WITHOUT ROWID"""
_KEYS = 500  # looked up in one statement
_PATIENCE = 60.0  # seconds to wait for another process that writes
_DAY = 24 * 3600  # when an answer was used is known to the day: a look-up writes once a day at most
_GIB = 1 << 30
_HELD = 50_000  # answers that wait in memory for a disk that takes nothing
_CHECKED = 64 << 20  # bytes that are written between two looks at the size

T = TypeVar("T")
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
    """Answers by key and number, in a folder. No trouble with the file ends a run: it is said once, and goes on without.

    A process that is killed leaves a sound file (a write-ahead log, which the next one reads). A file that is corrupt,
    of another program or of a newer version is set aside under another name, never deleted. What cannot be written, as
    the disk is full, say, waits in memory for the next time.

    Args:
        folder: Made where it is not there; the file in it is readable by its owner alone, as it holds texts.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.limit = limit_of_size()
        self._lock = threading.RLock()
        self._waiting: dict[bytes, dict[int, bytes]] = {}
        self._said: set[str] = set()
        self._written = _CHECKED  # so that the first write looks at the size
        self._read_only = False
        self._connection = self._trying(self._connect, None)

    def get(self, keys: Iterable[bytes]) -> dict[bytes, dict[int, bytes]]:
        """Values by key and number, of the keys that are known."""
        wanted = list(dict.fromkeys(keys))
        found: dict[bytes, dict[int, bytes]] = {}

        def look(connection: sqlite3.Connection) -> None:
            found.clear()
            today, old = int(time.time()), []
            for start in range(0, len(wanted), _KEYS):
                part = wanted[start : start + _KEYS]
                marks = ",".join("?" * len(part))
                rows = connection.execute(f"SELECT key, number, value, used FROM answers WHERE key IN ({marks})", part)
                for key, number, value, used in rows:
                    found.setdefault(key, {})[number] = value
                    if today - used > _DAY:
                        old.append((today, key, number))
            if old and not self._read_only:
                with suppress(sqlite3.OperationalError), _transaction(connection):  # found is found
                    connection.executemany("UPDATE answers SET used = ? WHERE key = ? AND number = ?", old)

        with self._lock:
            if wanted:
                self._with(look)
            for key in self._waiting.keys() & set(wanted):
                found[key] = {**found.get(key, {}), **self._waiting[key]}
        return found

    def put(self, items: Sequence[Item]) -> None:
        """Store values; one that is there stays as it is."""
        with self._lock:
            for key, number, value in items:
                self._waiting.setdefault(key, {})[number] = value
            if self._waiting and not self._read_only:
                self._with(self._write)
            elif self._waiting:
                self._say(f"the cache of answers, {self.path}, is read-only: what is asked now is not kept in it")
            for key in list(self._waiting)[:-_HELD]:
                del self._waiting[key]

    def _write(self, connection: sqlite3.Connection) -> None:
        now = int(time.time())
        rows = [(key, n, value, now) for key, values in self._waiting.items() for n, value in values.items()]
        with _transaction(connection):
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

        return self._with(count) or Info(self.path, 0, self._on_disk(), self.limit, None)

    def prune(self, before: float | None = None) -> int:
        """Delete the answers that were last used before a time, or all; how many they were."""

        def delete(connection: sqlite3.Connection) -> int:
            with _transaction(connection):
                where, values = ("", ()) if before is None else (" WHERE used < ?", (before,))
                gone = connection.execute(f"DELETE FROM answers{where}", values).rowcount
            self._shrink(connection)
            return int(gone)

        return self._with(delete) or 0

    def close(self) -> None:
        """Close the file; the next call opens it anew."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    def _with(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """The work done on an open file, once more where that was broken and is set aside; None where it cannot be."""
        with self._lock:
            if self._connection is None:
                self._connection = self._trying(self._connect, None)
            if self._connection is None:
                return None
            broken: list[str] = []
            done = self._trying(lambda: work(self._open), broken)
            if broken:
                self._set_aside(broken[0])
                done = self._trying(lambda: work(self._open), None) if self._connection is not None else None
            return done

    @property
    def _open(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    def _trying(self, work: Callable[[], T], broken: list[str] | None) -> T | None:
        """The result, or None after a warning; what is wrong with a file that cannot be read goes into `broken`."""
        try:
            return work()
        except (sqlite3.OperationalError, OSError) as error:
            self._say(
                f"cannot use the cache of answers, {self.path} ({error}): what is asked now is kept in memory alone, "
                "and asked again by the next run; Clear(cache=FOLDER) or CLEAR_CACHE names another place"
            )
        except sqlite3.DatabaseError as error:
            if broken is None:
                self._say(f"cannot use the cache of answers, {self.path} ({error})")
            else:
                broken.append(str(error))
        return None

    def _connect(self) -> sqlite3.Connection:
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError:
            if not self.path.exists():
                raise
            self._read_only = True
        for _ in range(3):
            connection = self._connection_of(immutable=self._read_only)
            try:
                wrong = _what_is_wrong(connection)
                if not wrong:
                    if not self._read_only:
                        _prepare(connection)
                    return connection
            except sqlite3.OperationalError:
                connection.close()
                raise
            except sqlite3.DatabaseError as error:
                wrong = str(error)
            connection.close()
            if self._read_only:
                raise OSError(f"it is read-only, and {wrong}")
            self._rename(wrong)
        raise OSError("it was set aside several times; does another program write to it?")

    def _connection_of(self, immutable: bool) -> sqlite3.Connection:
        address = f"file:{quote(str(self.path.absolute()))}?mode=" + ("ro&immutable=1" if immutable else "rwc")
        connection = sqlite3.connect(
            address, uri=True, timeout=_PATIENCE, isolation_level=None, check_same_thread=False
        )
        connection.execute(f"PRAGMA busy_timeout = {int(1000 * _PATIENCE)}")
        return connection

    def _set_aside(self, wrong: str) -> None:
        """Rename a broken file, and begin a new one."""
        self.close()
        if self._read_only:
            self._say(f"cannot use the cache of answers, {self.path}: it is read-only, and {wrong}")
            return
        self._trying(lambda: self._rename(wrong), None)
        self._connection = self._trying(self._connect, None)

    def _rename(self, wrong: str) -> None:
        aside = self.path.with_name(f"{NAME}.aside-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        with suppress(FileNotFoundError):  # another process was first
            self.path.rename(aside)
            for end in ("-wal", "-shm"):  # else they would be taken for the new file's
                with suppress(FileNotFoundError):
                    self.path.with_name(NAME + end).rename(aside.with_name(aside.name + end))
            self._say(f"the cache of answers, {self.path}, cannot be used ({wrong}): it is set aside as {aside.name}")

    def _bound(self, connection: sqlite3.Connection) -> None:
        """Delete the answers that were not used for longest, until nine tenths of the limit are left."""
        pages, free, size = (connection.execute(f"PRAGMA {name}").fetchone()[0]
                             for name in ("page_count", "freelist_count", "page_size"))  # fmt: skip
        used = (pages - free) * size
        if used <= self.limit:
            return
        (number,) = connection.execute("SELECT count(*) FROM answers").fetchone()
        gone = max(1, round(number * (1 - 0.9 * self.limit / used)))
        with _transaction(connection):
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

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=2)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with suppress(sqlite3.OperationalError):  # a full disk has ended it already
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _what_is_wrong(connection: sqlite3.Connection) -> str:
    """Why a file is not ours; "" of one that is, or that is empty."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables and not application:
        return ""
    if application != _APPLICATION:
        return "it is of another program"
    if version != VERSION:
        return f"it is of version {version}, this is version {VERSION}"
    return ""


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the table of a new file, and what has to be set in each connection."""
    new = not connection.execute("PRAGMA application_id").fetchone()[0]
    if new:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    try:  # several processes may begin at once, and this one does not wait by itself
        _patiently(lambda: connection.execute("PRAGMA journal_mode = WAL").fetchall())
    except sqlite3.OperationalError:  # some network file systems have no memory to share
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("PRAGMA synchronous = NORMAL")  # sound whenever a process is killed
    if not new:
        return
    with _transaction(connection):
        connection.execute(_TABLE)
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {VERSION}")


def _patiently(call: Callable[[], object]) -> None:
    for tried in range(50):
        try:
            call()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or tried == 49:
                raise
            time.sleep(0.1)
