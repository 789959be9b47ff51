import json

import numpy as np
import pytest
from tolerances import FLOAT32_SCHEDULE

from skipstep import NoiseSchedule, Plan
from skipstep.errors import ModelFormatError, ScheduleError
from skipstep.kernels.statistics import Thresholding
from skipstep.plans.scheduler_config import read_scheduler_config

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(),
        diffusers.DDIMScheduler(num_train_timesteps=77, beta_start=0.001, beta_end=0.05),
        diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False
        ),
        diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
        diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample_range=2.0),
        diffusers.DDIMScheduler(trained_betas=np.linspace(0.01, 0.2, 20).tolist(), num_train_timesteps=20),
        diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False, steps_offset=1),
        diffusers.DDPMScheduler(variance_type="fixed_large", beta_schedule="sigmoid"),
        diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_reads_what_diffusers_writes(scheduler, tmp_path):
    scheduler.save_pretrained(tmp_path)
    ours = read_scheduler_config(tmp_path)
    theirs = scheduler.config
    np.testing.assert_allclose(
        ours.schedule.alpha_bar, scheduler.alphas_cumprod.numpy(), rtol=FLOAT32_SCHEDULE, atol=FLOAT32_SCHEDULE
    )
    assert ours.prediction_type == theirs.prediction_type
    assert ours.spacing == theirs.timestep_spacing
    assert ours.steps_offset == theirs.steps_offset
    clips = theirs.get("clip_sample", False)
    assert ours.clip == (theirs.clip_sample_range if clips else None)
    to_one = theirs.get("set_alpha_to_one", True)
    assert ours.final_alpha_bar == (1.0 if to_one else ours.schedule.alpha_bar[0])
    assert NoiseSchedule.from_diffusers(tmp_path / "scheduler_config.json") == ours.schedule
    assert NoiseSchedule.from_diffusers(json.loads((tmp_path / "scheduler_config.json").read_text())) == ours.schedule


def test_every_key_of_a_supported_scheduler_is_known():
    """A key that diffusers adds later must be looked at, not ignored."""
    import inspect

    from skipstep.plans.diffusers_config import _DEFAULTS

    for name, defaults in _DEFAULTS.items():
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        theirs = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
        assert dict(defaults) == theirs


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"thresholding": "yes"}, "thresholding='yes'"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True"),
        ({"_class_name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type='learned'"),
        ({"prediction_type": "flow"}, "prediction_type='flow'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing='karras'"),
        ({"beta_schedule": "quadratic"}, "beta_schedule='quadratic'"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps='1000'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"num_train_timesteps": True}, "num_train_timesteps=True"),
        ({"beta_start": -0.1}, "beta_start=-0.1"),
        ({"beta_end": float("nan")}, "beta_end=nan"),
        ({"beta_end": 3.0}, "beta_end=3.0"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas"),
        ({"trained_betas": "many"}, "trained_betas='many'"),
        ({"clip_sample": "yes"}, "clip_sample='yes'"),
        ({"clip_sample_range": 0}, "clip_sample_range=0"),
        ({"steps_offset": -1}, "steps_offset=-1"),
        ({"steps_offset": 0.5}, "steps_offset=0.5"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(config, names):
    with pytest.raises(ScheduleError) as caught:
        read_scheduler_config({"_class_name": "DDIMScheduler", **config})
    assert names in caught.value.got
    assert "Remedy" in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '{"a": \udcff'])
def test_files_that_hold_no_configuration(tmp_path, content):
    file = tmp_path / "scheduler_config.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelFormatError, match=r"scheduler_config\.json"):
        read_scheduler_config(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelFormatError, match=r"nowhere\.json"):
        read_scheduler_config(tmp_path / "nowhere.json")


def test_dynamic_thresholding_goes_before_clipping():
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0, "clip_sample": True}
    plan = Plan(**read_scheduler_config(config).plan_options(), steps=10)
    assert plan.thresholding == Thresholding(0.9, 2.0)
    assert {(flags.clip, flags.threshold) for flags in plan.stage_flags} == {(False, True)}
