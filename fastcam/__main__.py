"""Entry point of the command line; it also reports errors and Ctrl-C while modules are still being loaded."""

from __future__ import annotations

import sys

from .errors import FastcamError


def main() -> None:
    """Run `fastcam.cli`."""
    try:
        from . import cli
    except FastcamError as error:
        print(f"fastcam: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
