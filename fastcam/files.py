"""Files that appear complete or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import WriteError

LOCK = ".fastcam.lock"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors while ``path`` is written into WriteError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError(
            f"{path}: cannot be written: {error.strerror or error}. "
            "Choose a folder that exists, may be written and has space"
        ) from error


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` that takes its name at the end, or disappears.

    Parameters
    ----------
    path : Path
    durable : bool
        Whether the file survives a power failure, too; that waits for the disk.

    Raises
    ------
    WriteError
        The folder is missing, full or not writable, or the name impossible; an older file is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with writing(path):
            with temporary.open("xb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Be the only one who writes in ``folder``, until the end of the block; a process that is killed lets go.

    Raises
    ------
    WriteError
        Somebody else is writing there, or nobody can.
    """
    import filelock

    lock = filelock.FileLock(folder / LOCK)
    with writing(folder):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise WriteError(
                f"{folder}: another run is writing there: wait for its end, or choose another folder"
            ) from None
    try:
        yield
    finally:
        lock.release()


def why_no_file(path: Path) -> str | None:
    """Say why ``path`` is no file that can be opened; None where it is one."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if stat.S_ISDIR(mode):
        return "is a folder, not a file"
    return None if stat.S_ISREG(mode) else "is no regular file"


def check_writable(path: Path) -> None:
    """Raise WriteError now when ``path`` could not be written later."""
    try:
        exists, is_folder = path.parent.is_dir(), path.is_dir()
        path.exists()
    except (OSError, ValueError) as error:
        raise WriteError(f"{str(path)!r} is no possible file name: {error}") from error
    if "\0" in str(path):
        raise WriteError(f"{str(path)!r} is no possible file name: it holds a null character")
    if not exists:
        raise WriteError(f"{path}: the folder {str(path.parent)!r} does not exist; make it first")
    if is_folder:
        raise WriteError(f"{path}: is a folder")
    if not os.access(path.parent, os.W_OK):
        raise WriteError(f"{path}: the folder {str(path.parent)!r} is not writable")
