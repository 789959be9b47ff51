"""What each family of networks was tested with: builds, draws, is guided, inverted, saved, made a TensorRT-RTX engine.

`make families` runs these tests and commits what they measured (bench/results/findings/families.json), from which the
table of engine/networks/README.md is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from condition_families import ALL, X_T
from family_loops import arguments, assert_drawn, engine_of, error, textbook, textbook_inversion

from skipstep import load
from skipstep.bench.record import write_finding
from skipstep.export.tensorrt_engine import build_engine

# Where the measured table goes.
RESULT = "SKIPSTEP_FAMILIES"
LABEL = {"sequence": "UNet1DModel"}
ROWS = (
    *("UNet2DModel", "UNet2DConditionModel", "SDXL", "LCM", "inpainting", "ControlNet", "IP-Adapter", "sequence"),
    *("DiT", "PixArt", "EDM", "flow matching", "an .onnx file"),
)
FOUND: dict[tuple[str, str], str] = {}


def distilled(name: str) -> bool:
    """Whether the guidance scale is an input of the network: it has no loop without one."""
    return ALL[name].from_guidance


def built(name: str, folder: Path) -> str:
    graphs = engine_of(name, "onnxruntime").source.partition().graphs
    moved = len(graphs.before_loop)
    assert moved
    return f"{moved} graphs before the loop"


def drawn(name: str, *, guided: bool) -> str:
    found, expected = (
        engine_of(name, "onnxruntime").sample(**arguments(name, guided=guided)),
        textbook(name, guided=guided),
    )
    assert_drawn(found, expected)
    return f"{error(found, expected):.1e}"


def inverted(name: str, folder: Path) -> str:
    call = arguments(name, guided=distilled(name))
    found = engine_of(name, "onnxruntime").invert(call.pop("x_T"), **call).latents
    expected = textbook_inversion(name, guided=distilled(name))
    assert_drawn(found, expected)
    return f"{error(found, expected):.1e}"


def saved(name: str, folder: Path) -> str:
    engine, call = engine_of(name, "onnxruntime"), arguments(name, guided=distilled(name))
    engine.save(folder / "bundle", license="MIT")
    with load(folder / "bundle") as loaded:
        assert loaded.network == engine.network
        np.testing.assert_array_equal(loaded.sample(**call), engine.sample(**call))
    return "equal bits"


def made_for_a_gpu(name: str, folder: Path) -> str:
    pytest.importorskip("tensorrt_rtx")
    step = engine_of(name, "onnxruntime").source.step_graph("float32")
    made = build_engine(step, library="tensorrt_rtx", compute_capability=86, batch_sizes=(2, 4))
    assert {"sample", "out_sample"} <= {each.name for each in (*made.inputs, *made.outputs)}
    return f"{len(made.engine) / 1e6:.1f} MB"


CELLS: dict[str, Callable[[str, Path], str]] = {
    "build": built,
    "sample": lambda name, folder: drawn(name, guided=distilled(name)),
    "guided": lambda name, folder: drawn(name, guided=True),
    "invert": inverted,
    "save, load": saved,
    "TensorRT-RTX engine": made_for_a_gpu,
}


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """The measured table, written where $SKIPSTEP_FAMILIES says if there is something in every cell."""
    yield
    if RESULT in os.environ:
        missing = [f"{name}: {cell}" for name in ROWS for cell in CELLS if (name, cell) not in FOUND]
        assert not missing, missing
        write_finding(
            Path(os.environ[RESULT]),
            command="make families",
            header=["family", *CELLS],
            rows=[[LABEL.get(name, name), *(FOUND[name, cell] for cell in CELLS)] for name in ROWS],
            note="Random weights, 4 steps, 2 samples, on ONNX Runtime's CPU provider. Errors are the largest "
            "difference from the family's own loop over the same diffusers module (its steps in float64, the network "
            "in float32), relative to the sample's largest value; each cell is a test that fails from 1e-5 on. Engines "
            "are built for sm_86 and not run.",
        )


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ROWS)
def test_a_family_and_what_it_can_do(name, cell, tmp_path):
    if cell == "guided" and not (ALL[name].given or distilled(name)):
        assert not engine_of(name, "onnxruntime").network.can_guide
        FOUND[name, cell] = "takes no conditions"
        return
    assert X_T[name].shape[1:] == engine_of(name, "onnxruntime").network.sample_shape
    FOUND[name, cell] = CELLS[cell](name, tmp_path)
