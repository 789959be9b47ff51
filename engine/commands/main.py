"""The command line. Each command is a module of skipstep.commands; only the one that is run is imported."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from skipstep.errors import SkipstepError
from skipstep.version import __version__

# The name of each command's module, and its line in `skipstep --help`.
COMMANDS: Final[Mapping[str, str]] = {
    "sample": "draw samples with one or several step counts",
    "draw": "draw very many samples into files, here or on a Ray cluster",
    "export": "compile a model into a bundle that runs without torch",
    "inspect": "show what a bundle contains",
    "verify": "check a bundle's files and signature, and draw its golden samples",
    "build": "build TensorRT engines for this machine's GPU from a bundle",
    "calibrate": "measure how long a bundle's plans take on this machine, and store that in the bundle",
    "tune": "fit plans of few steps to a bundle's network, and store those that are better in it",
    "keygen": "make a pair of keys to sign bundles with",
    "sign": "sign a bundle's manifest",
    "cache": "list or clear the cache of built artefacts",
    "evaluate": "measure quality, spread, inversion and time of every sampler",
    "report": "make one HTML page and PNG plots from benchmark results",
    "compare": "fail if a benchmark run is slower than its baseline",
    "bench": "time skipstep beside other ways to run a model, on any model",
}


_UNWRITABLE: Final = (errno.ENOSPC, errno.EIO, errno.EBADF)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: the command's own (0 unless it says otherwise), or 2 after a
    message on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # A terminal without our characters shows question marks.
    try:
        try:
            status = _run(sys.argv[1:] if arguments is None else list(arguments))
        finally:
            sys.stdout.flush()  # Also after --help: what cannot be written shows here, not when the interpreter ends.
    except SkipstepError as error:
        print(f"skipstep: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("skipstep: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.errno in _UNWRITABLE:
            return _without_output(error)
        raise
    return status


def _run(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="skipstep", description="A compiled sampling engine for diffusion models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"skipstep {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    requested = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if name == requested:
            module = importlib.import_module(f"skipstep.commands.{name}")
            command.description = module.DESCRIPTION
            command.epilog = getattr(module, "EPILOG", None)
            module.add_options(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    status: int | None = options.run(options)
    return status or 0


def _without_output(error: OSError) -> int:
    """Standard output takes no more: its reader has gone, which is no failure of ours, or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # What is left in the buffer goes nowhere, without another error.
    if isinstance(error, BrokenPipeError):
        return 141  # As a shell says of a process that SIGPIPE ended.
    print(f"skipstep: standard output cannot be written: {error.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
