"""The command line: what it calls, what it prints, how it fails."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fastcam import cli
from fastcam.errors import WriteError


def test_version() -> None:
    result = CliRunner().invoke(cli.commands, ["--version"])
    assert result.output == f"fastcam {version('fastcam')}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_subcommands(arguments: list[str]) -> None:
    output = CliRunner().invoke(cli.commands, arguments).output
    assert "demo  " in output


def test_demo_help_has_an_example() -> None:
    output = CliRunner().invoke(cli.commands, ["demo", "--help"], terminal_width=100).output
    assert "Example: fastcam demo --out pictures" in output
    assert "[default: fastcam-demo]" in output


@pytest.mark.parametrize(("arguments", "folder"), [([], "fastcam-demo"), (["--out", "a/b"], "a/b")])
def test_demo_runs_in_the_folder(monkeypatch: pytest.MonkeyPatch, arguments: list[str], folder: str) -> None:
    called: list[Any] = []

    def run(out_dir: Path, say: Any) -> None:
        called.append(out_dir)
        say("a line")

    monkeypatch.setattr("fastcam.demo.run", run)
    result = CliRunner().invoke(cli.commands, ["demo", *arguments])
    assert called == [Path(folder)]
    assert result.output == "a line\n"
    assert result.exit_code == 0


def test_a_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(out_dir: Path, say: Any) -> None:
        raise WriteError(f"cannot make the folder '{out_dir}' (full). Choose another with --out")

    monkeypatch.setattr("fastcam.demo.run", run)
    monkeypatch.setattr(sys, "argv", ["fastcam", "demo", "--out", "x"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    captured = capsys.readouterr()
    assert captured.err == "fastcam: cannot make the folder 'x' (full). Choose another with --out\n"
    assert captured.out == ""


def test_unknown_subcommand_and_real_process() -> None:
    command = [sys.executable, "-c", "from fastcam.cli import main; main()", "explode"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No such command 'explode'" in done.stderr
    assert "Traceback" not in done.stderr
