"""Every contender draws the textbook's samples, on small networks; and those that cannot run say why."""

from __future__ import annotations

import importlib.util
import shutil
import time

import numpy as np
import pytest
import torch
from bench_suite import save_model
from tiny_networks import tiny_unet
from tolerances import BACKENDS_AGREE

from skipstep import Engine
from skipstep.backends import openvino_library
from skipstep.bench.contenders import CONTENDERS, contenders_named
from skipstep.bench.contenders.pipeline import lacks_compiler
from skipstep.bench.contenders.textbook import TEXTBOOK
from skipstep.bench.contenders.time_box import time_box
from skipstep.bench.contenders.workload import Setup, Workload, to_numpy
from skipstep.bench.gate import largest_difference
from skipstep.bench.models import open_subject, subject_name
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import DeviceUnavailableError, InputError

# Those that run here without a compiler's minutes.
QUICK = ("diffusers", "onnxruntime", "skipstep", "skipstep-torch")


@pytest.fixture(scope="module", params=["labelled", "v-prediction"])
def subject(request, tmp_path_factory):
    options = {
        "labelled": {"classes": 4},
        "v-prediction": {"prediction_type": "v_prediction", "clip_sample": False, "timestep_spacing": "leading"},
    }
    folder = tmp_path_factory.mktemp("model")
    return open_subject(str(save_model(folder / request.param, **options[request.param])), folder=folder)


def drawn(name, subject, *, steps=4, batch_size=2):
    plan = subject.plan(steps)
    setup = Setup((plan,), (batch_size,), threads=1)
    contender = CONTENDERS[name]
    assert contender.lacks(subject, setup) is None
    return to_numpy(contender.build(subject, setup).prepare(Workload(subject, plan, batch_size))())


@pytest.mark.parametrize("name", QUICK)
def test_draws_what_the_textbook_loop_draws(subject, name):
    expected = drawn("textbook", subject)
    found = drawn(name, subject)
    if CONTENDERS[name].pictures:
        expected = expected.clip(-1, 1)
    np.testing.assert_allclose(found, expected, atol=BACKENDS_AGREE)
    assert found.dtype == np.float32


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="no package openvino")
@pytest.mark.parametrize("name", ["openvino", "skipstep-openvino"])
def test_openvino_draws_it_too(subject, name):
    np.testing.assert_allclose(drawn(name, subject), drawn("textbook", subject), atol=BACKENDS_AGREE)


# Not the whole network in OpenVINO's bfloat16: it rounds timesteps of a thousand to multiples of four.
@pytest.mark.parametrize("name", ["torch-bfloat16", "skipstep-openvino-bfloat16"])
def test_bfloat16_is_near_it_and_says_so(subject, name):
    if "openvino" in name:
        if importlib.util.find_spec("openvino") is None:
            pytest.skip("no package openvino")
        try:
            openvino_library.check_precision("bfloat16")
        except DeviceUnavailableError:
            pytest.skip("OpenVINO reports no bfloat16 on this processor")
    contender, expected = CONTENDERS[name], drawn("textbook", subject)
    error = largest_difference(drawn(name, subject), expected, contender)
    assert BACKENDS_AGREE / 10 < error < contender.tolerance_for(Setup((), ())) == 0.2
    assert contender.precision == "bfloat16"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_torch_compiles_ahead_of_time(subject):
    np.testing.assert_allclose(drawn("aot-inductor", subject), drawn("textbook", subject), atol=BACKENDS_AGREE)


def test_dynamic_thresholding_is_the_engines(tmp_path):
    folder = save_model(tmp_path / "model", thresholding=True, clip_sample=False, sample_max_value=2.0)
    subject = open_subject(str(folder), folder=tmp_path)
    np.testing.assert_allclose(drawn("skipstep-torch", subject), drawn("textbook", subject), atol=BACKENDS_AGREE)
    setup = Setup((subject.plan(4),), (1,))
    assert "thresholding" in CONTENDERS["onnxruntime"].lacks(subject, setup)


def test_the_export_is_shared_with_the_engines(subject, monkeypatch):
    assert subject.exported
    monkeypatch.setattr("skipstep.export.onnx_model.export_onnx", lambda *_: pytest.fail("exported again"))
    Engine.build(str(subject.path), plans=[2], backend="onnxruntime", device="cpu")


def test_what_this_machine_lacks_is_said(subject):
    setup = Setup((subject.plan(2),), (1,))
    if not torch.cuda.is_available():
        assert "no CUDA device" in CONTENDERS["skipstep-captured"].lacks(subject, setup)
    assert "measures float32 on cuda" in CONTENDERS["skipstep"].lacks(
        subject, Setup((subject.plan(2),), (1,), device="cuda")
    )


def test_no_compiler_no_compilation(subject, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "C++ compiler" in lacks_compiler(subject, Setup((), ()))


def test_a_bundle_runs_as_it_is_and_lacks_the_rest(tmp_path):
    subject = open_subject(str(SHIPPED_BUNDLE), folder=tmp_path)
    setup = Setup((subject.plan(2),), (1,))
    absent = {name for name, kind in CONTENDERS.items() if kind.lacks(subject, setup) is not None}
    ours = {name for name in CONTENDERS if name == "skipstep" or name.startswith("skipstep-openvino")}
    assert absent | ours == set(CONTENDERS)
    assert "skipstep" not in absent
    assert "bundle" in TEXTBOOK.lacks(subject, setup)
    assert "bundle" in CONTENDERS["diffusers"].lacks(subject, setup)
    assert drawn("skipstep", subject, steps=2).shape == (2, 1, 28, 28)


def test_models_are_refused_with_a_remedy(tmp_path):
    for call in (subject_name, lambda model: open_subject(model, folder=tmp_path)):
        with pytest.raises(InputError, match=r"cifar10-architecture.*a diffusers folder or a bundle"):
            call(str(tmp_path / "nothing"))
    tiny_unet().save_pretrained(tmp_path / "model" / "unet")
    with pytest.raises(InputError, match=r"without a scheduler configuration.*save_pretrained"):
        open_subject(str(tmp_path / "model"), folder=tmp_path)


def test_contenders_are_found_by_name():
    assert [each.name for each in contenders_named(["openvino", "diffusers", "openvino"])] == ["openvino", "diffusers"]
    assert [each.name for each in contenders_named([])] == list(CONTENDERS)
    with pytest.raises(InputError, match=r"contenders tensorflow; expected names among textbook, .*openvino"):
        contenders_named(["tensorflow"])


def test_a_gpu_has_the_same_contenders_and_a_dry_run_draws_with_them(subject):
    """The CPU stands for the GPU: every loop form, diffusers' loop and the replayed network draw the same samples."""
    plan = subject.plan(4)
    setup = Setup((plan,), (2,), threads=1, simulated=True)
    workload = Workload(subject, plan, 2)
    expected = drawn("textbook", subject)
    names = ("skipstep-captured", "skipstep-stepwise", "diffusers", "network-graph", "diffusers-max-autotune")
    for name in names:
        assert CONTENDERS[name].lacks(subject, setup) is None
        found = to_numpy(CONTENDERS[name].build(subject, setup).prepare(workload)())
        np.testing.assert_allclose(found, expected, atol=BACKENDS_AGREE)
    for name in ("skipstep", "onnxruntime", "network", "diffusers-compile"):
        assert CONTENDERS[name].lacks(subject, setup)


def test_a_time_box_interrupts_and_leaves_what_is_quick_alone():
    with time_box(5.0, "this"):
        pass
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"compilation took longer than 0\.2 s"), time_box(0.2, "compilation"):
        time.sleep(5.0)
    assert time.monotonic() - started < 2.0
    with pytest.raises(KeyError), time_box(5.0, "this"):
        raise KeyError
