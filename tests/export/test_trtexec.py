"""The folder for TensorRT's own tools: the example draws the engine's sample without skipstep, and the networks build.

trtexec itself needs a GPU. Its options are compared with a list of those that its help names in versions 10 and 11.
"""

from __future__ import annotations

import shlex
import subprocess
import sys

import numpy as np
import onnx
import pytest
from bundle_cases import make
from engines import SCHEDULE, parts_of
from onnx import TensorProto
from step_networks import EveryTime
from tiny_networks import Labelled, LearnedVariance, Wide, tiny_unet
from tolerances import HALF_PRECISION_LOOP

from skipstep import Engine, Plan, load
from skipstep.demo import SHIPPED_MODEL
from skipstep.errors import ExportError, InputError
from skipstep.export import trtexec
from skipstep.export.trtexec import check_trtexec, step_tables
from skipstep.networks.condition import Condition
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

PLANS = [
    Plan(schedule=SCHEDULE, steps=3, clip=1.0),
    Plan(schedule=SCHEDULE, steps=4, solver="ddpm"),
    Plan(schedule=SCHEDULE, steps=3, solver="rk4"),
    Plan(schedule=SCHEDULE, steps=6, solver="unipc_3"),
]
# Of `trtexec --help`, with a value or without one.
OPTIONS = {
    **dict.fromkeys(("onnx", "saveEngine", "loadInputs", "profilingVerbosity", "exportLayerInfo"), True),
    **dict.fromkeys(("stronglyTyped", "noTF32", "useCudaGraph"), False),
}
# Relative 2-norm. The step is the same; the runtime sums a network of fixed batch, and all labels' rows at once, in
# another order, and what that rounds otherwise grows in the loop: up to 4e-6 here.
SAME = 1e-5


def draw(folder, network, plan, *arguments):
    """The sample of the Python example, in an interpreter in which nothing of skipstep can be imported."""
    (found,) = folder.glob(f"plan_{plan.steps}-{plan.key}")
    out = folder / "x_0.npy"
    code = "import runpy, sys; sys.modules['skipstep'] = None; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    words = [folder / "loop.py", folder / f"{network}.onnx", found, "--out", out, *arguments]
    subprocess.run([sys.executable, "-I", "-c", code, *map(str, words)], check=True, timeout=120)
    return np.load(out)


def distance(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def engine():
    conditions = {"num_classes": 3, "null_label": 3, "fractional_timesteps": True}
    return make(tiny_unet(num_class_embeds=4), plans=PLANS, batch_sizes=[1], **conditions)


@pytest.fixture(scope="module", params=["float32", "float16"])
def saved(engine, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trtexec") / "tiny"
    engine.save(folder, license="MIT", targets=["trtexec"], precision=request.param)
    load(folder).sample(plan=engine.plans[PLANS[0].key], seeds=0, class_labels=0)
    return folder / "trtexec", request.param


def inputs_of(path):
    return {
        each.name: ([dim.dim_value for dim in each.type.tensor_type.shape.dim], each.type.tensor_type.elem_type)
        for each in onnx.load(path).graph.input
    }


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.options()["solver"])
def test_the_example_draws_the_engines_sample(engine, saved, plan):
    folder, precision = saved
    bound = SAME if precision == "float32" else HALF_PRECISION_LOOP[precision]
    expected = engine.sample(plan=plan, seeds=0, class_labels=2)
    assert distance(draw(folder, f"step_b1_{precision}", plan, "--label", 2), expected) <= bound
    expected = engine.sample(plan=plan, seeds=0, class_labels=2, guidance_scale=3.0)
    guided = draw(folder, f"step_b2_{precision}", plan, "--label", 2, "--guidance", 3)
    assert distance(guided, expected) <= bound


def test_the_network_is_in_the_precision_asked_for(saved):
    folder, precision = saved
    weights = onnx.load(folder / f"step_b1_{precision}.onnx").graph.initializer
    dtypes = {each.data_type for each in weights if each.name.endswith("conv1.weight")}
    assert dtypes == {TensorProto.FLOAT if precision == "float32" else TensorProto.FLOAT16}


def test_inputs_are_called_after_their_layers(saved):
    folder, precision = saved
    assert inputs_of(folder / f"step_b2_{precision}.onnx") == {
        "sample": ([2, 1, 8, 8], TensorProto.FLOAT),
        **{
            f"{block}.resnets.{number}.time_emb_proj": ([2, channels, 1, 1], TensorProto.FLOAT)
            for block, number, channels in (
                ("down_blocks.0", 0, 8),
                ("down_blocks.1", 0, 16),
                ("mid_block", 0, 16),
                ("mid_block", 1, 16),
                ("up_blocks.0", 0, 16),
                ("up_blocks.0", 1, 16),
                ("up_blocks.1", 0, 8),
                ("up_blocks.1", 1, 8),
            )
        },
    }


def test_the_script_says_what_trtexec_takes(saved):
    folder, precision = saved
    script = (folder / "run.sh").read_text()
    subprocess.run(["sh", "-n", folder / "run.sh"], check=True)
    commands = [line for line in script.replace("\\\n", "").splitlines() if line.startswith('"${TRTEXEC')]
    assert len(commands) == 2
    for size, command in zip((1, 2), commands, strict=True):
        program, *words, rest = shlex.split(command)
        assert (program, rest) == ("${TRTEXEC:-trtexec}", "$@")
        options = {name: value for name, _, value in (word.removeprefix("--").partition("=") for word in words)}
        assert {name: bool(value) for name, value in options.items()}.items() <= OPTIONS.items()
        assert ("noTF32" in options) == (precision == "float32")
        files = dict(each.split(":") for each in options["loadInputs"].split(","))
        expected = inputs_of(folder / options["onnx"])
        assert files.keys() == expected.keys()
        for name, (shape, _) in expected.items():
            assert shape[0] == size
            assert (folder / files[name]).stat().st_size == 4 * np.prod(shape)


def test_the_script_runs_the_program_that_is_named(saved, tmp_path):
    folder, _ = saved
    program = tmp_path / "a program"
    program.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/calls"\n')
    program.chmod(0o755)
    subprocess.run(["sh", folder / "run.sh", "--verbose"], check=True, env={"TRTEXEC": str(program), "PATH": "/bin"})
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.endswith(" --verbose") for call in calls] == [True, True]


def test_tensorrt_builds_each_network(saved):
    pytest.importorskip("tensorrt_rtx")
    from engine_builds import build

    folder, precision = saved
    for size in (1, 2):
        path = folder / f"step_b{size}_{precision}.onnx"
        built = build(path.read_bytes(), 89)
        assert {each.name: list(each.shape) for each in built.inputs} == {n: s for n, (s, _) in inputs_of(path).items()}
        assert {each.dtype for each in (*built.inputs, *built.outputs)} == {"float32"}


@pytest.mark.parametrize("network", [LearnedVariance(), Wide()], ids=lambda each: type(each).__name__)
def test_networks_without_labels(network, tmp_path):
    """One with twice the channels, and one that reads the timestep itself in its step."""
    plan = Plan(schedule=SCHEDULE, steps=3)
    spec = {"sample_shape": (1, 4, 4), "fractional_timesteps": True}
    engine = make(network, plans=[plan], batch_sizes=[2], **spec)
    engine.save(tmp_path / "bundle", license="MIT", targets=["trtexec"])
    found = draw(tmp_path / "bundle" / "trtexec", "step_b2_float32", plan)
    assert distance(found, engine.sample(plan=plan, seeds=[0, 0])) <= SAME


def test_what_no_table_holds_is_refused(tmp_path, monkeypatch):
    given = {"sample_shape": (2, 4, 4), "num_classes": 5, "prompt_shape": (3, 6)}
    text = make(EveryTime(), plans=[2], **given)
    with pytest.raises(InputError, match="a network that takes encoder_hidden_states"):
        text.save(tmp_path / "bundle", license="MIT", targets=["trtexec"])
    assert not list(tmp_path.iterdir())
    plan = Plan(schedule=SCHEDULE, steps=2)
    with pytest.raises(InputError, match="takes strength"):
        check_trtexec(NetworkSpec((1, 4, 4), conditions={"strength": Condition(())}), [plan])
    network = NetworkSpec((1, 4, 4), num_classes=9, null_label=9)
    for options, said in (
        ({"clip": "dynamic", "dynamic_quantile": 0.9}, "dynamic thresholding"),
        ({"guidance_interval": (0.2, 5.0)}, "guidance that differs"),
    ):
        with pytest.raises(InputError, match=said):
            check_trtexec(network, [plan, Plan(schedule=SCHEDULE, steps=4, **options)])
    monkeypatch.setattr(trtexec, "_MAX_TABLE_BYTES", 2 * 10 * 4 - 1)
    with pytest.raises(ExportError, match="2 evaluations and 10 labels"):
        step_tables(parts_of(Labelled(), network), network, plan)


def test_a_null_label_inside_the_table_has_the_last_row():
    network = NetworkSpec((1, 4, 4), num_classes=4, null_label=1)
    parts, plan = parts_of(Labelled(), network), Plan(schedule=SCHEDULE, steps=3)
    (table,) = step_tables(parts, network, plan).values()
    assert table.shape[:2] == (len(Stages.of([plan])), 5)
    assert (table[:, 4] == table[:, 1]).all()
    assert (table[:, 4] != table[:, 3]).all()


@pytest.mark.slow
def test_the_shipped_model(tmp_path):
    engine = Engine.build(SHIPPED_MODEL, plans=[10], batch_sizes=[1], backend="onnxruntime", device="cpu")
    engine.save(tmp_path / "bundle", license="Apache-2.0", targets=["trtexec"])
    (plan,) = engine.plans.values()
    expected = engine.sample(plan=plan, seeds=0, class_labels=7, guidance_scale=2.0)
    found = draw(tmp_path / "bundle" / "trtexec", "step_b2_float32", plan, "--label", 7, "--guidance", 2)
    assert distance(found, expected) <= SAME
