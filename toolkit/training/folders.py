"""Output folders: the check that they can be written, the lock against a second run, files written whole."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError, describe_os_error

LOCK_NAME = ".lock"


class FolderLock:
    """Held while a run uses a folder; the operating system releases it when the process ends in any way.

    Example
    -------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with open_output_folder(folder) as lock:
    ...         lock.is_held
    True
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    @property
    def is_held(self) -> bool:
        return self._file is not None

    def acquire(self) -> FolderLock:
        """Take the lock; ConfigError when another process holds it."""
        file = open(self.path, "a+", encoding="utf-8")
        if not _lock_file(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise ConfigError(
                f"another run is writing to {self.path.parent} ({holder}); wait until it has ended, stop it, or "
                "choose another --output_folder."
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file
        # Forked processes share the lock: workers that outlive a killed run by seconds would hold it against the next.
        own = weakref.ref(self)
        if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
            os.register_at_fork(after_in_child=lambda: _forget(own()))
        return self

    def release(self) -> None:
        """Give the lock back; harmless when it is not held."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    def __enter__(self) -> FolderLock:
        return self if self.is_held else self.acquire()

    def __exit__(self, *exc: object) -> None:
        self.release()


def _forget(lock: FolderLock | None) -> None:
    """Close a forked process's share of a lock; the one who took it keeps it."""
    if lock is not None and lock._file is not None:
        lock._file.close()
        lock._file = None


def _lock_file(file: Any) -> bool:
    """Take the system's lock on an open file; False when another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl: no lock there, and nothing else depends on it
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def open_output_folder(folder: Path | str) -> FolderLock:
    """Make ``folder``, check that files can be written in it, and lock it for this run (main process only).

    Raises
    ------
    ConfigError : it cannot be made or written, is a file, or another run holds it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe"):
            pass
        return FolderLock(folder / LOCK_NAME).acquire()
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"--output_folder {folder} lies at or under a file, not a folder; choose another name."
        ) from error
    except FileNotFoundError as error:  # a place in which nobody makes folders, as /proc
        raise ConfigError(f"--output_folder {folder} cannot be made there; choose another folder.") from error
    except OSError as error:
        raise ConfigError(f"--output_folder {folder} cannot be written: {describe_os_error(error)}") from error


def write_atomic(path: Path | str, content: bytes | str | Callable[[Path], None]) -> Path:
    """Write a file whole or not at all: to a temporary neighbour, flushed to the disk, then renamed.

    ``content`` is what to write, or a function that writes the path it is given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_to_disk(path.parent)
    return path


def write_json(path: Path | str, value: Any) -> Path:
    """Write a value as JSON, whole or not at all; not-a-number and infinity are refused (they are no JSON)."""
    return write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def flush_to_disk(path: Path | str) -> None:
    """Have the system write a file's content, or a folder's names, to the disk now."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened on Windows
        if os.path.isdir(path):
            return
        raise
    try:
        os.fsync(handle)
    except OSError:
        if not os.path.isdir(path):
            raise
    finally:
        os.close(handle)
