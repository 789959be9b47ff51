"""Importing skipstep, and starting its command line, costs nothing that its user did not ask for."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

HEAVY = {"torch", "triton", "onnxruntime", "onnx", "diffusers", "numpy", "PIL", "cryptography"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import skipstep", set()),
        ("from skipstep import NoiseSchedule, Plan", {"numpy"}),
        ("import skipstep.commands.main", set()),
    ],
)
def test_imports_load_no_heavy_library(code, allowed):
    loaded = set(run(f"{code}; import sys; print(*sys.modules)").split())
    assert "skipstep" in loaded
    assert not loaded & (HEAVY - allowed)


def test_importing_takes_less_than_a_tenth_of_a_second():
    def seconds(code: str) -> float:
        started = time.perf_counter()
        run(code)
        return time.perf_counter() - started

    # The fastest of several, with and without: on a busy machine starting Python itself takes longer than this.
    costs = [[seconds(code) for code in ("import skipstep", "pass")] for _ in range(5)]
    with_import, without = (min(column) for column in zip(*costs, strict=True))
    assert with_import - without < 0.1


def test_only_the_command_that_runs_is_imported():
    code = """
import contextlib, io, sys
from skipstep.commands.main import COMMANDS, main

def loaded_by(*arguments):
    for name in COMMANDS:
        sys.modules.pop(f"skipstep.commands.{name}", None)
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(arguments)
    return [name for name in COMMANDS if f"skipstep.commands.{name}" in sys.modules]

assert loaded_by("--help") == [], "help"
for name in COMMANDS:
    assert loaded_by(name, "--help") == [name], loaded_by(name, "--help")
print(*sys.modules)
"""
    assert not set(run(code).split()) & HEAVY


def test_public_names():
    import skipstep

    assert {"Engine", "NoiseSchedule", "Plan"} <= set(dir(skipstep))
    for name in skipstep.__all__:
        assert getattr(skipstep, name) is not None
    with pytest.raises(AttributeError, match="Sampler"):
        skipstep.Sampler  # noqa: B018


MISSING = {
    # The module that fails to import as if it were not installed, the code, and the extra that the error names.
    "an engine": (
        "torch",
        "skipstep.Engine.build({folder!r}, plans=[1], schedule=skipstep.NoiseSchedule.linear(1000))",
        "skipstep[torch]",
    ),
    "the step": ("triton", "import skipstep.kernels.step", "skipstep[torch]"),
    "step binaries": ("triton", "import skipstep.export.cubins", "skipstep[torch]"),
    "a checkpoint": (
        "diffusers",
        "from skipstep.networks.checkpoint import load_unet, read_checkpoint; load_unet(read_checkpoint({folder!r}))",
        "skipstep[torch,diffusers]",
    ),
    "an export": (
        "onnxscript",
        "from torch import nn; from skipstep.backends.torch import DenoisingModule;"
        "from skipstep.export.onnx_model import export_onnx; from skipstep.networks.spec import NetworkSpec;"
        "export_onnx(DenoisingModule(nn.Identity()), NetworkSpec((1, 4, 4)))",
        "skipstep[export]",
    ),
}


def test_a_missing_extra_is_named(tmp_path):
    """In one process for all of them: each would import torch. The one without torch goes first."""
    from tiny_networks import tiny_unet

    tiny_unet().save_pretrained(tmp_path)
    attempts = [(absent, code.format(folder=str(tmp_path))) for absent, code, _ in MISSING.values()]
    messages = json.loads(
        run(f"""
import json, sys
import skipstep
from skipstep.errors import MissingDependencyError
messages = []
for absent, code in {attempts!r}:
    sys.modules[absent] = None
    try:
        exec(code)
    except MissingDependencyError as error:
        messages.append(str(error))
    else:
        messages.append("no error")
    del sys.modules[absent]
print(json.dumps(messages))
""")
    )
    for (absent, _, extra), message in zip(MISSING.values(), messages, strict=True):
        assert absent in message
        assert extra in message
        assert "Remedy" in message
