"""Command line: one subcommand per job of the public API, which does the work."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .errors import FastcamError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fastcam", message="fastcam %(version)s")
def commands() -> None:
    """Scores and Grad-CAM heatmaps from one forward pass of an exported image classifier."""


@commands.command(epilog='Example: fastcam demo --out pictures  (needs: pip install "fastcam[demo]")')
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("fastcam-demo"),
    show_default=True,
    metavar="DIR",
    help="Folder for the model and the pictures.",
)
def demo(out: Path) -> None:
    """Explain four photos with a trained EfficientNet-Lite0 and write overlays and a contact sheet.

    Nothing is downloaded: weights, photos and class names come with the [demo] extra.
    """
    from .demo import run

    run(out, say=click.echo)


def main() -> None:
    """Run the command line; a refusal is one line on standard error and exit status 1."""
    try:
        commands(prog_name="fastcam")
    except FastcamError as error:
        click.echo(f"fastcam: {error}", err=True)
        sys.exit(1)
