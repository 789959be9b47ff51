"""Files of networks that read another state, another time and conditions of their own."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import numpy as np
import onnxruntime
import pytest
import torch
from onnx_files import batch_axes, write_onnx
from tolerances import BACKENDS_AGREE

from skipstep import Condition, Engine, NoiseSchedule, Plan, load
from skipstep.calls.noise import standard_normal
from skipstep.errors import InputError
from skipstep.kernels.layout import Stream

SHAPE = (1, 8, 8)


class Mixed(torch.nn.Module):
    """Depends on the state, its time, and two conditions."""

    def forward(self, noisy, sigma, difficulty, style):
        per_sample = torch.sin(sigma) * 0.1 + difficulty + style.mean(dim=1)
        return torch.tanh(noisy * 0.3 + per_sample[:, None, None, None])


@pytest.mark.parametrize(
    ("time_input", "state", "prediction"),
    [
        ("sigma", "ve", "sample"),
        ("c_noise", "edm", "edm"),
        ("log_snr", "edm", "edm"),
        ("alpha_bar", "ve", "sample"),
        ("flow", "flow", "flow"),
        ("sigma", "vp", "epsilon"),
    ],
)
def test_a_file_is_its_module(time_input, state, prediction, tmp_path):
    given = {"noisy": torch.zeros(2, *SHAPE), "sigma": torch.ones(2), "difficulty": torch.ones(2)}
    given["style"] = torch.zeros(2, 3)
    file = write_onnx(tmp_path / "mixed.onnx", Mixed(), given, dynamic=batch_axes(list(given)), opset=20)
    schedule = NoiseSchedule.karras(4, sigma_min=0.1, sigma_max=20.0)
    plan = Plan(schedule=schedule, steps=4, prediction_type=prediction, time_input=time_input, clip=None)
    said = {"time_input": time_input, "state": state, "schedule": schedule, "prediction_type": prediction}
    conditions = {"difficulty": Condition(null="same"), "style": Condition((3,), null=0.0)}
    call = {
        "seeds": [1, 2, 3],
        "plan": plan,
        "guidance_scale": 2.0,
        "conditions": {"difficulty": [0.1, 0.2, 0.3], "style": np.ones((3, 3))},
    }
    drawn = []
    for model, options in (
        (file, {"conditions": {"style": Condition((3,), null=0.0)}, "backend": "onnxruntime"}),
        (Mixed(), {"conditions": conditions, "sample_shape": SHAPE, "backend": "torch"}),
    ):
        with Engine.build(model, plans=[plan], batch_sizes=[3], device="cpu", **said, **options) as engine:
            drawn.append(engine.sample(**call))
            assert dict(engine.network.conditions) == conditions
            if model is file:
                engine.save(tmp_path / "bundle", license="MIT")
    np.testing.assert_allclose(*drawn, rtol=0, atol=BACKENDS_AGREE * 0.02)
    with load(tmp_path / "bundle") as engine:
        np.testing.assert_array_equal(engine.sample(**call), drawn[0])


def test_an_integer_time_is_no_noise_level(tmp_path):
    class Counted(torch.nn.Module):
        def forward(self, sample, timestep):
            return sample * timestep[:, None, None, None]

    given = {"sample": torch.zeros(2, *SHAPE), "timestep": torch.ones(2, dtype=torch.int64)}
    file = write_onnx(tmp_path / "counted.onnx", Counted(), given, dynamic=batch_axes(list(given)), opset=20)
    with pytest.raises(InputError, match="time_input='sigma' for a network that takes timestep int64"):
        Engine.build(file, plans=[2], schedule=NoiseSchedule.karras(2), time_input="sigma", device="cpu")


@pytest.mark.slow
def test_a_published_consistency_network(tmp_path):
    """The network for terrain in the package adaptive-terrain-diffusion (MIT), which reads the state x0 + sigma·eps.

    In one step and in four, against the package's own way to denoise: its file run as it stands.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp_path]
    fetched = subprocess.run([*command, "adaptive-terrain-diffusion==0.4.2"], capture_output=True, check=False)
    if fetched.returncode:
        pytest.skip("no package registry, or not this package")
    (wheel,) = tmp_path.glob("*.whl")
    name = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(name, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
    sigmas = [80.0, 10.0, 2.0, 0.5]
    difficulty = np.array([0.37, 0.9], np.float32)
    said = {"prediction_type": "sample", "time_input": "sigma", "clip": None}
    plans = {
        count: Plan(schedule=NoiseSchedule.from_sigmas(sigmas[:count]), steps=count, solver="consistency", **said)
        for count in (1, 4)
    }
    options = {"state": "ve", "time_input": "sigma", "batch_sizes": [2], "device": "cpu"}
    with Engine.build(
        tmp_path / name, plans=list(plans.values()), schedule=plans[1].schedule, prediction_type="sample", **options
    ) as engine:
        seeds = np.array([5, 6], np.uint64)
        for count, plan in plans.items():
            noise = standard_normal(seeds, 128 * 128, stage=0, stream=Stream.INITIAL).reshape(2, 1, 128, 128)
            noisy = noise * np.float32(1 / np.sqrt(plan.alpha_bars[0]))
            for stage, sigma in enumerate(sigmas[:count]):
                given = {"noisy": noisy, "sigma": np.full(2, sigma, np.float32), "difficulty": difficulty}
                denoised = session.run(["denoised"], given)[0]
                if stage + 1 < count:
                    z = standard_normal(seeds, 128 * 128, stage=stage, stream=Stream.STEP).reshape(noisy.shape)
                    noisy = denoised + np.float32(sigmas[stage + 1]) * z
            ours = engine.sample(plan=plan, seeds=seeds.tolist(), conditions={"difficulty": difficulty})
            np.testing.assert_allclose(ours, denoised, rtol=0, atol=BACKENDS_AGREE * 0.02)
