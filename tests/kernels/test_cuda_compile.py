"""The CUDA kernels compile for every device, keep their working set in registers, and load 16 bytes at a time."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import nvrtc_library
import pytest
from shim_kernels import CSRC

from fastcam.kernels.cuda.launches import PARTS

SOURCE = CSRC / "cuda" / "cam_kernels.cuh"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
REGISTERS = {4: 64, 3: 80, 2: 128}  # of 65536, for this many blocks of 256 threads, in multiples of eight
TYPES = [part for part in PARTS if part != "any"]

needs_nvrtc = pytest.mark.skipif(nvrtc_library.folder() is None, reason="nvidia-cuda-nvrtc is not installed")


def blocks_of_kernels() -> dict[str, int]:
    """The number of resident blocks per multiprocessor that the source requests for each kernel."""
    listed = re.findall(r"X\((cam_\w+?)(?:##name##(\w+))?, \w+, (\d)", SOURCE.read_text())
    kernels = {name: int(blocks) for name, rest, blocks in listed if not rest}
    for kind in TYPES:
        kernels |= {f"{name}{kind}{rest}": int(blocks) for name, rest, blocks in listed if rest}
    return kernels


def assert_in_registers(log: str, architecture: int, kernels: set[str]) -> None:
    """Read ptxas' report: nothing is spilled, and there are few enough registers for the requested resident blocks."""
    report = re.findall(
        rf"entry function '(\w+)' for 'sm_{architecture}'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    assert {name for name, *_ in report} == kernels
    blocks = blocks_of_kernels()
    for name, *numbers in report:
        *memory, registers = map(int, numbers)
        assert memory == [0, 0, 0], f"{name} for sm_{architecture}: {memory} bytes of stack, stored and loaded"
        assert registers <= REGISTERS[blocks[name]], f"{name} for sm_{architecture}: {registers} registers"


def test_the_list_is_read_whole() -> None:
    kernels = blocks_of_kernels()
    assert len(kernels) == 9 + 13 * len(TYPES)
    assert kernels["cam_view"] == 4
    assert kernels["cam_channel_bfloat16_first_16"] == 2


@needs_nvrtc
@pytest.mark.parametrize(
    "architecture",
    # The oldest and the newest; nvcc, where it is installed, compiles for all of them in any case.
    [
        80,
        *(pytest.param(number, marks=pytest.mark.slow) for number in (75, 120)),
        *(
            pytest.param(number, marks=[pytest.mark.slow, pytest.mark.nightly])
            for number in ARCHITECTURES
            if number not in (75, 80, 120)
        ),
    ],
)
def test_nvrtc(architecture: int) -> None:
    options = ("-std=c++17", f"-arch=sm_{architecture}", "-Xptxas=-v")
    log, _, binary = nvrtc_library.compile_source(SOURCE.read_text(), *options)
    assert binary.startswith(b"\x7fELF")
    assert "warning" not in log
    assert_in_registers(log, architecture, set(blocks_of_kernels()))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("part", PARTS)
def test_nvcc(part: str, tmp_path: Path) -> None:
    """As CMake calls it: one PTX for all devices."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    binaries = ",".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    command = [
        nvcc,
        "-std=c++17",
        "-x",
        "cu",
        f"-gencode=arch=compute_75,code=[{binaries}]",
        f"-DCAM_PART={PARTS[part]}",
    ]
    command += ["-Xptxas=-v", "-fatbin", str(SOURCE), "-o", str(tmp_path / "kernels.fatbin")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    kernels = {name for name in blocks_of_kernels() if part in name.split("_")}
    if part == "any":
        kernels |= {"cam_view", "cam_prepare", "cam_check_rows"}
    for architecture in ARCHITECTURES:
        assert_in_registers(done.stderr, architecture, kernels)


@needs_nvrtc
def test_memory_is_read_and_written_16_bytes_at_a_time() -> None:
    _, code, _ = nvrtc_library.compile_source(SOURCE.read_text(), "-std=c++17", "-arch=compute_80")
    bodies = dict(re.findall(r"\.entry (\w+)\(.*?\)(.*?)(?=\.entry|\Z)", code, re.DOTALL))
    assert set(bodies) == set(blocks_of_kernels())
    for name, body in bodies.items():
        wide = len(re.findall(r"ld\.global\.nc(?:\.L\w+)*\.v4\.[ubf]32", body))
        narrow = len(re.findall(r"ld\.global\.nc(?:\.L\w+)*\.v2\.[ubf]32", body))
        if "_any_" in name or name in {"cam_view", "cam_prepare"}:
            continue
        # More than four maps at once leave 16-bit types four elements, 8 bytes, at a time.
        half = "float16" in name and name.endswith(("_8", "_16"))
        assert (narrow if half else wide) >= (1 if name == "cam_check_rows" else 2), name
        if name.startswith("cam_channel") and "_first_" in name and not half:
            # Two or four in the loop, and one after it.
            assert wide >= 3, f"{name}: fewer loads on their way than planned"
    for name in ("cam_view", "cam_prepare"):
        assert re.search(r"st\.global\.v4\.[bf]32", bodies[name]), name
