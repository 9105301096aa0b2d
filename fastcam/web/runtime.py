"""ONNX Runtime Web's files, from the npm package of one version, checked by its hash."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import ArgumentError, FileFormatError, MissingExtraError

PACKAGE = "onnxruntime-web@1.30.0"
# The hash of the package's archive, as npm publishes it.
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# For WebAssembly and for WebGPU: a script, the script that it loads, and a binary each.
FILES = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
_SECONDS = 600


def runtime_files(archive: Path | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the files that a page needs.

    Parameters
    ----------
    archive : Path, optional
        The package, as ``npm pack`` writes it; by default npm downloads it.

    Raises
    ------
    MissingExtraError
        npm is not installed.
    ArgumentError
        The archive cannot be read, or npm cannot download it.
    FileFormatError
        The archive is not the package of this version.
    """
    if archive is not None:
        yield from _unpacked(archive)
        return
    with tempfile.TemporaryDirectory(prefix="fastcam-web-") as folder:
        yield from _unpacked(_download(Path(folder)))


def _download(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise MissingExtraError(
            f"ONNX Runtime Web comes from npm, which is not installed. Install Node.js, or run 'npm pack {PACKAGE}' "
            "elsewhere and give its archive"
        )
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command
            [npm, "pack", PACKAGE, "--silent"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ArgumentError(f"npm could not download {PACKAGE}: {error}") from error
    archive = next(folder.glob("*.tgz"), None)
    if archive is None:
        raise ArgumentError(f"npm could not download {PACKAGE}: {done.stderr.strip() or done.stdout.strip()}")
    return archive


def _unpacked(archive: Path) -> Iterator[tuple[str, bytes]]:
    try:
        content = archive.read_bytes()
    except OSError as error:
        raise ArgumentError(f"{archive}: cannot be read: {error.strerror or error}") from error
    found = "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != INTEGRITY:
        raise FileFormatError(f"{archive} is not npm's {PACKAGE}: its hash is {found}, not {INTEGRITY}")
    with tarfile.open(archive) as package:
        for name in FILES:
            member = package.extractfile(f"package/dist/{name}")
            if member is not None:
                yield name, member.read()
