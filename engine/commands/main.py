"""The command line. Each command is a module of skipstep.commands, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from skipstep.errors import SkipstepError
from skipstep.version import __version__

COMMANDS = (
    "sample",
    "export",
    "inspect",
    "verify",
    "build",
    "calibrate",
    "keygen",
    "sign",
    "cache",
    "evaluate",
    "report",
    "compare",
    "bench",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: the command's own (0 unless it says otherwise), or 2 after a
    message on standard error."""
    parser = argparse.ArgumentParser(
        prog="skipstep", description="A compiled sampling engine for diffusion models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"skipstep {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"skipstep.commands.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=getattr(module, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_options(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        status: int | None = options.run(options)
    except SkipstepError as error:
        print(f"skipstep: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("skipstep: interrupted", file=sys.stderr)
        return 130
    return status or 0


if __name__ == "__main__":
    raise SystemExit(main())
