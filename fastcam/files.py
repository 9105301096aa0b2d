"""Files that are written completely or not at all, and folders that are read without following loops."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import stat
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from .errors import WriteError

if sys.platform != "win32":
    import fcntl

LOCK = ".fastcam.lock"

# Device and number of a file or folder.
Identity = tuple[int, int]
# Changes when a file is replaced or written; None if there is none.
FileState: TypeAlias = "tuple[int, ...] | None"

# A temporary file that `replacing` writes.
PART = re.compile(r"\..+\.[0-9a-f]{32}\.part", re.DOTALL)
# A new temporary file is locked within microseconds; an older one without a lock has lost its writer.
_ABANDONED_SECONDS = 60

# Flags that Windows does not have. Opening a pipe without O_NONBLOCK waits for its writer.
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_READ_AT_ONCE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError raised while ``path`` is written into WriteError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError(
            f"{path}: cannot be written: {error.strerror or error}. "
            "Choose an existing, writable folder with enough free space"
        ) from error


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file next to ``path`` that is renamed to ``path`` at the end, or removed on failure.

    The new file keeps the permissions of the one it replaces.

    Parameters
    ----------
    path : Path
    durable : bool
        Whether the file also survives a power failure, which means waiting for the disk. Temporary files that killed
        processes left behind are removed as well.

    Raises
    ------
    WriteError
        The folder is missing, full or not writable, or the name is invalid; an older file is left unchanged.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with writing(path):
            if durable:
                _remove_abandoned(path)
            with temporary.open("xb") as file:
                with contextlib.suppress(OSError):
                    # If the file system has no locks, files left behind by killed processes are kept.
                    _lock(file)
                _keep_permissions(path, temporary)
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, content: Any) -> None:
    """Write numbers, lists, strings and dicts as JSON, complete or not at all; raises WriteError."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def _keep_permissions(path: Path, temporary: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISREG(mode):
        temporary.chmod(stat.S_IMODE(mode))


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of ``path`` whose writers were killed; a live writer holds a lock on its file."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError):
            if not PART.fullmatch(part.name) or time.time() - part.lstat().st_mtime < _ABANDONED_SECONDS:
                continue
            with open_regular(part) as file:
                _lock(file)
                part.unlink()


def _lock(file: BinaryIO) -> None:
    """Lock a file until it is closed or its process ends; raises OSError if another process holds the lock."""
    if sys.platform != "win32":
        # Windows needs no lock: it does not let anyone remove an open file.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder`` until the end of the block; it is released when the process is killed.

    Raises
    ------
    WriteError
        Another process holds it, or the folder is not writable.
    """
    import filelock

    refuse_links(folder, [LOCK])
    lock = filelock.FileLock(folder / LOCK)
    with writing(folder):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise WriteError(
                f"{folder}: another run is writing there: wait until it ends, or choose another folder"
            ) from None
    try:
        yield
    finally:
        lock.release()


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise WriteError if one of these files or folders in ``folder`` is a link: writing would change its target.

    A file with a second name (a hard link) is rejected as well.
    """
    for name in names:
        path = folder / name
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise WriteError(f"{path}: cannot be read: {error.strerror or error}") from error
        if stat.S_ISLNK(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink > 1):
            raise WriteError(f"{path}: is a link to a file or folder elsewhere: remove it, or choose another folder")


def open_unlinked(path: Path, mode: str) -> BinaryIO:
    """Open a file to write it in place (``mode`` as in `open`, binary), but not through a symbolic link."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | _NO_FOLLOW, 0o666)

    return cast("BinaryIO", open(path, mode, opener=opener))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file to read it.

    Unlike a check before the call, this cannot block forever on a pipe that took the file's place.

    Raises
    ------
    OSError
        The file cannot be opened, or is a folder, pipe, device or socket.
    """
    descriptor = os.open(path, _READ_AT_ONCE)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the rest of a file in blocks of at most 1 MiB."""
    while block := file.read(2**20):
        yield block


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of the concatenated parts, as 64 hexadecimal digits."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()


def digest_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, as 64 hexadecimal digits; raises OSError."""
    with open_regular(path) as file:
        return digest(read_chunks(file))


def identity(path: str | os.PathLike[str]) -> Identity:
    """Return what identifies a file or folder, whatever its path; raises OSError."""
    status = os.stat(path)  # noqa: PTH116 - Path would change names like "a/../b"
    return status.st_dev, status.st_ino


def file_state(path: str | os.PathLike[str]) -> FileState:
    """Return what changes when a file is replaced or written; None if there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116 - Path would change names like "a/../b"
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def walk(
    folder: str,
    report: Callable[[OSError], None],
    *,
    exclude: Collection[Identity] = (),
    follow_links: bool = False,
) -> Iterator[tuple[str, list[str]]]:
    """Yield ``folder`` and every folder below it, each with the names of its other entries, unsorted.

    Breadth first, so that each folder is reached by the shortest path; a folder that several links lead to is visited
    once. Hidden entries are skipped. The depth is limited only by the file system.

    Parameters
    ----------
    folder : str
    report : callable
        Called with the error of each folder that cannot be read.
    exclude : collection of Identity
        Folders that are skipped with everything below them.
    follow_links : bool
        Whether to enter folders through symbolic links.
    """
    waiting = deque([folder])
    visited = set(exclude)
    while waiting:
        parent = waiting.popleft()
        try:
            place = identity(parent)
            if place in visited:
                continue
            visited.add(place)
            with os.scandir(parent) as found:
                entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            report(error)
            continue
        names = []
        for entry in entries:
            if not _is_folder(entry):
                names.append(entry.name)
            elif follow_links or not entry.is_symlink():
                waiting.append(entry.path)
        yield parent, names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link that leads to itself.
        return False


def why_no_file(path: Path) -> str | None:
    """Return why ``path`` is not a file that can be opened; None if it is one."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if stat.S_ISDIR(mode):
        return "is a folder, not a file"
    return None if stat.S_ISREG(mode) else "is not a regular file"


def check_writable(path: Path) -> None:
    """Raise WriteError now if ``path`` could not be written later."""
    try:
        exists, is_folder = path.parent.is_dir(), path.is_dir()
        path.exists()
    except (OSError, ValueError) as error:
        raise WriteError(f"{str(path)!r} is not a possible file name: {error}") from error
    if "\0" in str(path):
        raise WriteError(f"{str(path)!r} is not a possible file name: it contains a null character")
    if not exists:
        raise WriteError(f"{path}: the folder {str(path.parent)!r} does not exist; create it first")
    if is_folder:
        raise WriteError(f"{path}: is a folder")
    if not os.access(path.parent, os.W_OK):
        raise WriteError(f"{path}: the folder {str(path.parent)!r} is not writable")
