"""Files from elsewhere: whole, of known operators, with weights in their folder; refused in words otherwise."""

import os
import time

import numpy as np
import onnx
import pytest
from attack_count import tried
from onnx import TensorProto, helper, numpy_helper
from onnx_files import WEIGHT, small_model

from skipstep import Engine, NoiseSchedule
from skipstep.errors import IntegrityError, ModelFormatError, SkipstepError
from skipstep.export.graph_writer import OPSET
from skipstep.export.onnx_reading import modernised, read_onnx_model

BUILD = {"plans": [2], "schedule": NoiseSchedule.linear(1000), "device": "cpu", "prediction_type": "v_prediction"}


@pytest.fixture
def external(tmp_path):
    """A model with its weight in net.data beside it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    onnx.save(small_model(), folder / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    return folder / "net.onnx"


def edit_location(path, **changes):
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        found = {each.key: each.value for each in tensor.external_data}
        del tensor.external_data[:]
        for key, value in {**found, **changes}.items():
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def read_weight(path):
    return numpy_helper.to_array(read_onnx_model(path).graph.initializer[0])


def test_weights_beside_the_file(external):
    np.testing.assert_array_equal(read_weight(external), WEIGHT)
    with Engine.build(external, **BUILD) as engine:
        assert engine.sample(steps=2, seeds=[1, 2]).shape == (2, 1, 8, 8)


def test_the_file_itself_may_be_a_link(external, tmp_path):
    link = external.parent / "link.onnx"
    link.symlink_to(external)
    np.testing.assert_array_equal(read_weight(link), WEIGHT)


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "a/../../secret", "", ".", "C:/x", "a\\b", "\0", "missing", "inner"]
)
def test_weights_elsewhere_are_refused(external, location):
    (external.parents[1] / "secret").write_bytes(WEIGHT.tobytes())
    (external.parent / "inner").mkdir()
    edit_location(external, location=location)
    with pytest.raises(IntegrityError):
        read_onnx_model(external)


def test_weights_behind_links_are_refused_and_the_remedy_copies_them(external, tmp_path):
    elsewhere = tmp_path / "blob"
    (external.parent / "net.data").rename(elsewhere)
    (external.parent / "net.data").symlink_to(elsewhere)
    with pytest.raises(IntegrityError) as caught:
        read_onnx_model(external)
    command = caught.value.remedy.split("`")[1]
    assert os.system(f"{command} {external.parent} {tmp_path / 'copy'}") == 0
    np.testing.assert_array_equal(read_weight(tmp_path / "copy/net.onnx"), WEIGHT)
    (external.parent / "net.data").unlink()
    os.mkfifo(external.parent / "net.data")
    with pytest.raises(IntegrityError):
        read_onnx_model(external)


@pytest.mark.parametrize(
    "place",
    [{"offset": "-4"}, {"offset": "8"}, {"length": "4"}, {"length": "1000000"}, {"offset": "x"}, {"length": "1e3"}],
)
def test_weights_outside_their_file(external, place):
    edit_location(external, **place)
    with pytest.raises(IntegrityError, match="weight"):
        read_onnx_model(external)


@pytest.mark.parametrize("opset", [13, 14, 17, 18, OPSET, 21])
def test_supported_opsets(tmp_path, opset):
    onnx.save(small_model(opset=opset), tmp_path / "net.onnx")
    model = modernised(read_onnx_model(tmp_path / "net.onnx"), tmp_path / "net.onnx")
    assert model.opset_import[0].version == max(opset, OPSET)
    Engine.build(tmp_path / "net.onnx", **BUILD).close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"opset": 9}, "opset 9"),
        ({"opset": 1000}, "opset 1000"),
        ({"domain": "com.microsoft", "op_type": "FusedMul"}, "com.microsoft::FusedMul"),
        ({"op_type": "Multiply"}, "Multiply"),
    ],
)
def test_operators_and_opsets_that_are_not_read(tmp_path, options, said):
    onnx.save(small_model(**options), tmp_path / "net.onnx")
    started = time.perf_counter()
    with pytest.raises(ModelFormatError, match=said) as caught:
        Engine.build(tmp_path / "net.onnx", **BUILD)
    assert time.perf_counter() - started < 1.0
    assert "export the network again" in caught.value.remedy


def test_weights_that_are_listed_as_inputs(tmp_path):
    """As exporters did before the fourth version of the format."""
    model = small_model()
    model.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, WEIGHT.shape))
    model.ir_version = 3
    onnx.save(model, tmp_path / "net.onnx")
    with Engine.build(tmp_path / "net.onnx", **BUILD) as engine:
        assert [each.role for each in engine.source.network.inputs] == ["sample", "timestep"]


def test_functions_of_the_files_own(tmp_path):
    model = small_model(domain="own", op_type="Scaled")
    body = [helper.make_node("Mul", ["a", "b"], ["c"])]
    model.functions.append(helper.make_function("own", "Scaled", ["a", "b"], ["c"], body, model.opset_import[:1]))
    onnx.save(model, tmp_path / "net.onnx")
    onnx.save(small_model(), tmp_path / "same.onnx")
    with Engine.build(tmp_path / "net.onnx", **BUILD) as engine, Engine.build(tmp_path / "same.onnx", **BUILD) as same:
        np.testing.assert_array_equal(engine.sample(steps=2, seeds=1), same.sample(steps=2, seeds=1))


def test_damage_is_an_error_of_ours(tmp_path):
    """Cut off and changed anywhere, and what is no model at all."""
    whole = small_model().SerializeToString()
    path = tmp_path / "net.onnx"
    rng = np.random.default_rng(0)
    cut = [whole[:length] for length in range(0, len(whole), 7)]
    changed = []
    for _ in range(60):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        changed.append(bytes(data))
    for data in (*cut, *changed, b"{}", b"\0" * 64):
        path.write_bytes(data)
        try:
            Engine.build(path, **BUILD).close()
        except SkipstepError:
            continue
    for wrong in (tmp_path / "missing.onnx", tmp_path):
        with pytest.raises(ModelFormatError):
            read_onnx_model(wrong)
    tried("damaged .onnx files", len(cut) + len(changed) + 4)
