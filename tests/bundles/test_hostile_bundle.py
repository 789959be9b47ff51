"""Bundles whose hashes match and whose contents lie; and bundles that are replaced while they are read."""

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from attack_count import tried
from engines import build
from hostile_json import FUZZ, fuzz, rewrite
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.numpy import load as load_arrays
from tiny_networks import Labelled

from skipstep import NoiseSchedule, Plan, load
from skipstep.backends.onnxruntime import EarlyGraphs, LazySession, OnnxRuntimeDenoiser, make_session
from skipstep.bundles.bundle import open_bundle
from skipstep.bundles.reader import parse_manifest
from skipstep.bundles.tables import default_options, read_plans
from skipstep.calls.conditioning import Conditioning
from skipstep.commands.main import main
from skipstep.errors import BundleError, ExportError, SkipstepError
from skipstep.networks.spec import NetworkSpec

STEP = "network/step.onnx"
SHAPE = (1, 4, 4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    plans = [Plan(schedule=NoiseSchedule.linear(1000), steps=steps) for steps in (2, 3)]
    options = {"backend": "onnxruntime", "sample_shape": SHAPE, "num_classes": 3, "null_label": 3}
    with build(Labelled(), plans=plans, **options) as engine:
        engine.save(folder, license="MIT")
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "bundle"))


def manifest_of(folder, edit):
    path = folder / "manifest.json"
    contents = json.loads(path.read_bytes())
    edit(contents)
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "more.txt").write_text("x"), "more.txt"),
        (lambda f: (f / "network" / ".hidden").write_text("x"), "network/.hidden"),
        (lambda f: manifest_of(f, lambda m: m.update(golden=None)), "golden"),
        (lambda f: manifest_of(f, lambda m: m["golden"].update(tolerance=1.0)), "tolerance"),
        (lambda f: manifest_of(f, lambda m: m["golden"].update(seeds=[5, 6])), "golden samples"),
        (
            lambda f: (f / "manifest.json").write_text(
                (f / "manifest.json").read_text().replace('"license"', '"license": "other", "license"', 1)
            ),
            "occurs twice",
        ),
    ],
    ids=["a file more", "a hidden file", "no golden", "any tolerance", "other samples", "a name twice"],
)
def test_verify_refuses(copy, capsys, harm, said):
    assert main(["verify", str(copy)]) == 0
    harm(copy)
    capsys.readouterr()
    assert main(["verify", str(copy)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("place", ["partition", "defaults", "tools"])
def test_nesting_and_numbers_without_bounds(saved, place):
    contents = json.loads((saved / "manifest.json").read_bytes())
    for value in (json.loads("[" * 900 + "]" * 900), 10**400, {"thresholding": {"maximum": 10**400}}, {"eta": 10**400}):
        with pytest.raises(BundleError):
            parse_manifest(json.dumps(contents | {place: {"clip": value}}).encode())


def step_graph(*, dtype=TensorProto.FLOAT, shape=("batch", *SHAPE), name="out_sample", op=None):
    """A step network of the right form, but for what is asked for."""
    sample = helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["batch", *SHAPE])
    out = helper.make_tensor_value_info(name, dtype, shape)
    nodes = op or [helper.make_node("Cast", ["sample"], [name], to=dtype)]
    graph = helper.make_graph(nodes, "step", [sample], [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


def node(kind, inputs=("sample",), **attributes):
    return [helper.make_node(kind, list(inputs), ["out_sample"], **attributes)]


def endless_loop():
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["s"], ["t"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("t", TensorProto.FLOAT, None),
        ],
    )
    trips = helper.make_node("Constant", [], ["n"], value_int=2**62)
    return [trips, helper.make_node("Loop", ["n", "", "sample"], ["out_sample"], body=body)]


GRAPHS = {
    "int64": lambda: step_graph(dtype=TensorProto.INT64),
    "float64": lambda: step_graph(dtype=TensorProto.DOUBLE),
    "text": lambda: step_graph(dtype=TensorProto.STRING),
    "another name": lambda: step_graph(name="other"),
    "another rank": lambda: step_graph(shape=("batch", 16), op=node("Flatten")),
    "no channel": lambda: step_graph(shape=("batch", 4, 4), op=node("Squeeze")),
    "an undeclared shape": lambda: step_graph(shape=None, op=node("Flatten")),
    "a lying shape": lambda: step_graph(op=node("Flatten")),
    "a sequence": lambda: step_graph(op=node("SplitToSequence")),
    "an endless loop": lambda: step_graph(op=endless_loop()),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_network_of_another_form_draws_nothing(copy, name):
    rewrite(copy, STEP, GRAPHS[name]())
    with pytest.raises(SkipstepError) as caught:
        load(copy).sample(steps=2, seeds=[0, 1], class_labels=0)
    assert isinstance(caught.value, BundleError | ExportError)


def test_the_graph_that_the_others_are_made_from_would_draw(copy):
    rewrite(copy, STEP, step_graph())
    assert load(copy).sample(steps=2, seeds=0, class_labels=0).shape == (1, *SHAPE)


@pytest.mark.parametrize("padding", [b"\x04", b"\x84\x00", b"\x84\x80\x00"])
def test_an_operator_is_found_however_its_name_is_encoded(copy, padding):
    data = onnx.load_from_string(step_graph(op=endless_loop())).SerializeToString()
    assert data.count(b"\x22\x04Loop") == 1
    rewrite(copy, STEP, data.replace(b"\x22\x04Loop", b"\x22" + padding + b"Loop"))
    with pytest.raises(BundleError, match="may run for ever"):
        open_bundle(copy).read_graph(STEP)


@pytest.mark.parametrize("shape", [[16384, 16384, 1], [2**15, 2**15, 1], [65536, 65536, 65536]])
def test_a_sample_that_fits_nowhere_is_refused_unread(copy, shape):
    manifest_of(copy, lambda manifest: manifest["network"].update(sample_shape=shape))
    with pytest.raises(BundleError, match="sample_shape"):
        load(copy)


def test_a_damaged_network_is_refused_by_load_itself(copy):
    (copy / STEP).write_bytes(b"x" * (copy / STEP).stat().st_size)
    with pytest.raises(BundleError, match=r"step\.onnx"):
        load(copy)


def test_a_bundle_that_is_replaced_again_and_again_is_read_whole(saved, copy, tmp_path):
    """Two bundles take turns under one name, as exports with overwriting make them; a reader sees one or the other."""
    other = Path(shutil.copytree(saved, tmp_path / "other"))
    manifest_of(other, lambda manifest: manifest.update(license="other"))
    rewrite(other, STEP, (other / STEP).read_bytes() + b"\x12\x01x")  # producer_name: another graph, the same numbers
    stop, errors = threading.Event(), []

    def replace():
        turn = 0
        while not stop.wait(0.05):
            turn += 1
            new = tmp_path / f"new{turn}"
            shutil.copytree((saved, other)[turn % 2], new)
            exchange(new, copy)
            shutil.rmtree(new)

    writer = threading.Thread(target=replace)
    writer.start()
    licences = set()
    try:
        for _ in range(40):
            with load(copy) as engine:
                licences.add(engine.source.bundle.manifest.license)
    except BundleError as error:
        errors.append(error)
    finally:
        stop.set()
        writer.join()
    assert not errors
    assert licences == {"MIT", "other"}


def exchange(a, b):
    from skipstep.storage.atomic import _exchange

    assert _exchange(a, b)


DTYPES = (np.float32, np.float64, np.float16, np.int64, np.int8, np.bool_)
ARRAYS = st.builds(
    lambda shape, dtype, value: np.full(shape, value).astype(dtype),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0, -1.0, 0.5, np.nan, np.inf, 1e30]),
)


@pytest.fixture(scope="module")
def parsed(saved):
    manifest = parse_manifest((saved / "manifest.json").read_bytes())
    return manifest, load_arrays((saved / "tables.safetensors").read_bytes())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@given(data=st.data())
@fuzz(FUZZ)
def test_any_tables_are_read_or_refused(parsed, data):
    tried("tables with up to three arrays changed, whose hashes match")
    manifest, arrays = parsed
    changed = dict(arrays)
    for name in data.draw(st.lists(st.sampled_from(sorted(arrays)), max_size=3)):
        how = data.draw(st.sampled_from(["replace", "remove", "flip", "swap"]))
        if how == "replace":
            changed[name] = data.draw(ARRAYS)
        elif how == "remove":
            changed.pop(name, None)
        elif how == "swap":
            changed[name] = arrays[data.draw(st.sampled_from(sorted(arrays)))]
        elif arrays[name].size:
            raw = bytearray(arrays[name].tobytes())
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            changed[name] = np.frombuffer(bytes(raw), arrays[name].dtype).reshape(arrays[name].shape)
    try:
        plans = read_plans(manifest, changed)
        default_options(manifest, changed)
    except BundleError:
        return
    for plan, entry in zip(plans, manifest.plans, strict=True):
        assert plan.key == entry.key
        assert plan.coefficients.tobytes() == arrays[f"{plan.key}/coefficients"].tobytes()


TYPES = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING)
SIDES = st.one_of(st.integers(0, 5), st.sampled_from(["batch", "n"]))


@given(data=st.data())
@fuzz(FUZZ)
def test_any_inputs_of_a_graph_are_computed_or_refused(data):
    """Step networks with random inputs, outputs and tables, whose hashes would match."""
    tried("ONNX graphs with random inputs, outputs and step inputs")
    spec = NetworkSpec(SHAPE)
    kind = data.draw(st.sampled_from(TYPES))
    shape = data.draw(st.one_of(st.just(["batch", *SHAPE]), st.lists(SIDES, max_size=4)))
    more = [
        helper.make_tensor_value_info(
            f"more{i}", data.draw(st.sampled_from(TYPES)), data.draw(st.lists(SIDES, max_size=3))
        )
        for i in range(data.draw(st.integers(0, 2)))
    ]
    sample = helper.make_tensor_value_info("sample", kind, shape)
    out = helper.make_tensor_value_info(data.draw(st.sampled_from(["out_sample", "x"])), kind, shape)
    operator = data.draw(st.sampled_from(["Identity", "Neg", "Flatten", "Abs"]))
    graph = helper.make_graph([helper.make_node(operator, ["sample"], [out.name])], "g", [sample, *more], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    tables = {f"more{i}": data.draw(ARRAYS) for i in range(data.draw(st.integers(0, 2)))}
    timesteps = np.array([[5.0], [1.0]])
    try:
        early = EarlyGraphs({}, spec, 1, tables={np.array([1.0, 5.0]).tobytes(): tables})
        denoiser = OnnxRuntimeDenoiser(
            LazySession(lambda: make_session(model, num_threads=1)), early, spec, batch_size=1
        )
        values = denoiser.compute(timesteps, Conditioning({}, np.zeros(1, np.int64)))
        denoiser.new_context()(values, 0)
    except ExportError:
        return
    assert denoiser.output.shape == (1, *SHAPE)
    assert denoiser.output.dtype == np.float32
