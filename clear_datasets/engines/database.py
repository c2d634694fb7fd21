"""One SQLite file that many processes share, and that outlives any of them."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

VERSION = 1  # of the tables
_APPLICATION = 0x436C7244  # "ClrD", by which a file is known to be ours
_TABLE = """CREATE TABLE IF NOT EXISTS answers (
    key BLOB NOT NULL, number INTEGER NOT NULL, value BLOB NOT NULL, used INTEGER NOT NULL, PRIMARY KEY (key, number)
) WITHOUT ROWID"""
_MOUNTS = Path("/proc/mounts")
_SHARED = {"nfs", "nfs4", "lustre", "gpfs", "beegfs", "cifs", "smb3", "ceph", "fuse.ceph", "afs", "panfs", "wekafs",
           "glusterfs", "fuse.glusterfs", "fuse.sshfs", "orangefs"}  # fmt: skip
_PATIENCE = 60.0  # seconds to wait for another process that writes

T = TypeVar("T")


class Database:
    """A file with the table ``answers``. Trouble with it ends no run: it is said once, and the run goes on.

    A process that is killed leaves a sound file (a write-ahead log, which the next one reads; a journal that is rolled
    back on file systems of several machines, which have no memory in common). A file that is corrupt,
    of another program or of a newer version is set aside under another name, never deleted.

    Args:
        path: The file; made where it is not there, readable by its owner alone, as it holds texts.

    Attributes:
        read_only: Whether it can be read alone.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.read_only = path, False
        self.lock = threading.RLock()
        self._said: set[str] = set()
        self._connection = self._trying(self._connect, None)

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """The work done on an open file, once more where that was broken and is set aside; None where it cannot be."""
        with self.lock:
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

    def close(self) -> None:
        """Close the file; the next call opens it anew."""
        with self.lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    @property
    def _open(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    def _trying(self, work: Callable[[], T], broken: list[str] | None) -> T | None:
        """The result, or None after a warning; what is wrong with a file that cannot be read goes into `broken`."""
        try:
            return work()
        except (sqlite3.OperationalError, OSError) as error:
            self.say(
                f"cannot use the cache of answers, {self.path} ({error}): what is asked now is kept in memory alone, "
                "and asked again by the next run; Clear(cache=FOLDER) or CLEAR_CACHE names another place"
            )
        except sqlite3.DatabaseError as error:
            if broken is None:
                self.say(f"cannot use the cache of answers, {self.path} ({error})")
            else:
                broken.append(str(error))
        return None

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):
            try:
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            except OSError:
                if not self.path.exists():
                    raise
                self.read_only = True
            connection = self._connection_of(immutable=self.read_only)
            try:
                wrong = _what_is_wrong(connection)
                if not wrong:
                    if not self.read_only:
                        _prepare(connection, "DELETE" if _is_shared(self.path.parent) else "WAL")
                    return connection
            except sqlite3.OperationalError:
                connection.close()
                raise
            except sqlite3.DatabaseError as error:
                wrong = str(error)
            connection.close()
            if self.read_only:
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
        if self.read_only:
            self.say(f"cannot use the cache of answers, {self.path}: it is read-only, and {wrong}")
            return
        self._trying(lambda: self._rename(wrong), None)
        self._connection = self._trying(self._connect, None)

    def _rename(self, wrong: str) -> None:
        aside = self.path.with_name(f"{self.path.name}.aside-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        with suppress(FileNotFoundError):  # another process was first
            self.path.rename(aside)
            for end in ("-wal", "-shm"):  # else they would be taken for the new file's
                with suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + end).rename(aside.with_name(aside.name + end))
            self.say(f"the cache of answers, {self.path}, cannot be used ({wrong}): it is set aside as {aside.name}")

    def say(self, message: str) -> None:
        """Warn, once."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=2)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All that is done within, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")  # which may fail, too, while another process reads: no lock is left behind
    except BaseException:
        with suppress(sqlite3.OperationalError):  # a full disk has ended it already
            connection.execute("ROLLBACK")
        raise


def _what_is_wrong(connection: sqlite3.Connection) -> str:
    """Why a file is not ours; "" of one that is, or that is empty."""
    connection.execute("BEGIN")  # one look at it: another process may be making its table at this moment
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    connection.execute("COMMIT")
    if not tables and not application:
        return ""
    if application != _APPLICATION:
        return "it is of another program"
    if version != VERSION:
        return f"it is of version {version}, this is version {VERSION}"
    return ""


def _prepare(connection: sqlite3.Connection, journal: str) -> None:
    """Make the table of a new file, and what has to be set in each connection."""
    new = not connection.execute("PRAGMA application_id").fetchone()[0]
    if new:
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    try:  # several processes may begin at once, and this one does not wait by itself
        _patiently(lambda: connection.execute(f"PRAGMA journal_mode = {journal}").fetchall())
    except sqlite3.OperationalError:  # other file systems may have no memory to share, either
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("PRAGMA synchronous = NORMAL")  # sound whenever a process is killed
    if not new:
        return
    with transaction(connection):
        connection.execute(_TABLE)
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {VERSION}")


def _is_shared(folder: Path) -> bool:
    """Whether other machines may see a folder, too, as far as Linux says so."""
    with suppress(OSError):
        mounts = [line.split()[1:3] for line in _MOUNTS.read_text().splitlines()]
        around = [(len(point), kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
        return max(around, default=(0, ""))[1] in _SHARED
    return False


def _patiently(call: Callable[[], object]) -> None:
    for tried in range(50):
        try:
            call()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or tried == 49:
                raise
            time.sleep(0.1)
