"""skipstep keygen: a pair of Ed25519 keys to sign bundles with."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = "Write an Ed25519 private key, readable by you alone, and its public key beside it."


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", type=Path, help="the private key's file; the public one is this with .pub appended")


def run(options: argparse.Namespace) -> None:
    from skipstep.storage.signature import generate_key

    public = options.key.with_name(options.key.name + ".pub")
    generate_key(options.key, public)
    print(f"wrote {options.key} (keep it to yourself) and {public}")
