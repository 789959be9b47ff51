import json
import re

import numpy as np
import pytest
import torch
from engines import build
from tiny_networks import Curve
from tolerances import DIFFUSERS_LOOP, FLOAT32_SCHEDULE

from skipstep import NoiseSchedule, Plan
from skipstep.errors import ModelFormatError, ScheduleError
from skipstep.kernels.statistics import Thresholding
from skipstep.plans.diffusers_config import DiffusersConfig
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
        diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
        diffusers.EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        diffusers.HeunDiscreteScheduler(clip_sample=True),
        diffusers.KDPM2DiscreteScheduler(),
        diffusers.KDPM2AncestralDiscreteScheduler(),
        diffusers.LMSDiscreteScheduler(beta_schedule="squaredcos_cap_v2"),
        diffusers.DEISMultistepScheduler(solver_order=3),
        diffusers.UniPCMultistepScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, algorithm_type="sde-dpmsolver++"),
        diffusers.DPMSolverSinglestepScheduler(),
        diffusers.LCMScheduler(),
        diffusers.TCDScheduler(),
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
    is_consistency = isinstance(scheduler, diffusers.LCMScheduler)
    assert (ours.solver, ours.spacing) == (
        ("lcm", "lcm") if is_consistency else ("ddim", theirs.get("timestep_spacing", "linspace"))
    )
    assert ("solver" in ours.plan_options()) == is_consistency
    assert ours.steps_offset == theirs.get("steps_offset", 0)
    clips = theirs.get("clip_sample", False)
    assert ours.clip == (theirs.clip_sample_range if clips else None)
    to_one = theirs.get("set_alpha_to_one", True)
    assert ours.final_alpha_bar == (1.0 if to_one else ours.schedule.alpha_bar[0])
    assert NoiseSchedule.from_diffusers(tmp_path / "scheduler_config.json") == ours.schedule
    assert NoiseSchedule.from_diffusers(json.loads((tmp_path / "scheduler_config.json").read_text())) == ours.schedule


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (diffusers.EDMEulerScheduler(sigma_max=40.0, sigma_data=0.7), ("edm", "c_noise", "edm", 0.7)),
        (diffusers.EDMDPMSolverMultistepScheduler(sigma_schedule="exponential"), ("edm", "c_noise", "edm", 0.5)),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), ("flow", "flow", "flow", None)),
        (diffusers.FlowMatchHeunDiscreteScheduler(), ("flow", "flow", "flow", None)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_reads_other_families(scheduler, said, tmp_path):
    scheduler.save_pretrained(tmp_path)
    ours = read_scheduler_config(tmp_path)
    assert (ours.prediction_type, ours.time_input, ours.state, ours.sigma_data) == said
    if said[0] == "edm":
        scheduler.set_timesteps(10)
        plan = Plan(steps=10, **ours.plan_options())
        np.testing.assert_allclose(plan.evaluation_timesteps, scheduler.timesteps, rtol=2e-3)
        np.testing.assert_allclose(plan.evaluation_timesteps[[0, -1]], scheduler.timesteps[[0, -1]], rtol=1e-5)
    else:
        plan = Plan(steps=1000, **ours.plan_options())
        theirs = np.sort(scheduler.sigmas.numpy())
        np.testing.assert_allclose(plan.evaluation_timesteps / 1000, theirs[theirs > 0][::-1], rtol=1e-5)
    assert "state" not in ours.plan_options()


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
        ({"_class_name": "EDMEulerScheduler", "sigma_schedule": "linear"}, "sigma_schedule='linear'"),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": -1.0}, "sigma_max=-1"),
        ({"_class_name": "EDMEulerScheduler", "shift": 3.0}, "shift=3"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas=True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0.0}, "shift=0"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 30}, "original_inference_steps=30"),
    ],
)
def test_what_other_families_do_not_support_is_named(keys, names):
    with pytest.raises(ScheduleError, match=re.escape(names)):
        read_scheduler_config(keys)


def test_every_key_of_a_supported_scheduler_is_known():
    """A key that diffusers adds later must be looked at, not ignored."""
    import inspect

    from skipstep.plans.diffusers_config import _DEFAULTS, _INNER

    used = set(inspect.get_annotations(DiffusersConfig)) - {"clip", "dynamic_quantile", "dynamic_maximum"}
    used |= {"clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"}
    for name, defaults in _DEFAULTS.items():
        # What is neither used nor named in the log is refused where it is not the default.
        assert set(defaults) - used - _INNER <= {"use_flow_sigmas", "timestep_type", "final_sigmas_type"}
        if name == "DPMSolverSDEScheduler":  # Without torchsde diffusers has only its name.
            continue
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        theirs = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
        assert dict(defaults) == theirs


def written(scheduler):
    """What its file holds."""
    return json.loads(scheduler.to_json_string())


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"),
        diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading", beta_schedule="scaled_linear"),
        diffusers.UniPCMultistepScheduler(timestep_spacing="trailing", prediction_type="v_prediction"),
        # What is not said is another class's own default to diffusers.
        diffusers.HeunDiscreteScheduler(
            beta_start=0.0009, beta_end=0.013, timestep_spacing="leading", clip_sample=True, clip_sample_range=1.5
        ),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_step_counts_become_ddim_on_the_folders_schedule(scheduler):
    """The loop of diffusers' DDIMScheduler, made from the same configuration, over a network in closed form."""
    plan = Plan(**read_scheduler_config(written(scheduler)).plan_options(), steps=20)
    clips = scheduler.config.get("clip_sample", False)  # A scheduler without the key does not clip.
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=clips)
    ddim.set_timesteps(20)
    assert plan.timesteps == tuple(ddim.timesteps.tolist())
    x = x_T = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in ddim.timesteps:
        x = ddim.step(Curve()(x, t.expand(2)), t, x).prev_sample
    with build(Curve(), plans=[plan], sample_shape=(1, 4, 4), prediction_type=plan.prediction_type) as engine:
        drawn = engine.sample(plan=plan, x_T=x_T, output_type="pt")
    assert (drawn - x).norm() < DIFFUSERS_LOOP * x.norm()


@pytest.mark.parametrize(
    "config",
    [
        # As the files of Stable Diffusion 1.5, 2.1 and XL hold them: keys of several classes beside each other.
        {"_class_name": "PNDMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {"_class_name": "DDIMScheduler", "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False},
        {
            "_class_name": "EulerDiscreteScheduler",
            "clip_sample": False,
            "interpolation_type": "linear",
            "sample_max_value": 1.0,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        },
        {"_class_name": "PNDMScheduler", "clip_sample": True, "set_alpha_to_one": True},
        {"_class_name": "LMSDiscreteScheduler", "rescale_betas_zero_snr": True, "clip_sample": True},
    ],
    ids=lambda config: config["_class_name"],
)
def test_keys_of_several_classes_mean_what_they_mean_to_ddim(config):
    ours = read_scheduler_config(config)
    ddim = diffusers.DDIMScheduler.from_config(config)
    np.testing.assert_allclose(ours.schedule.alpha_bar, ddim.alphas_cumprod, atol=FLOAT32_SCHEDULE)
    np.testing.assert_allclose(ours.final_alpha_bar, ddim.final_alpha_cumprod, atol=FLOAT32_SCHEDULE)
    assert ours.clip == (ddim.config.clip_sample_range if ddim.config.clip_sample else None)
    if "timestep_spacing" in config:  # Where a file says nothing, it is the default of the class that it names.
        assert (ours.spacing, ours.steps_offset) == (ddim.config.timestep_spacing, ddim.config.steps_offset)


def test_where_the_last_step_ends():
    """final_sigmas_type says of a sigma what set_alpha_to_one says of alpha_bar."""
    scheduler = diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min")
    scheduler.set_timesteps(10)
    ours = read_scheduler_config(written(scheduler))
    np.testing.assert_allclose(ours.final_alpha_bar, 1 / (1 + scheduler.sigmas[-1] ** 2), rtol=1e-7)
    assert ours.final_alpha_bar < 0.99991


def test_what_concerns_another_sampler_is_named_once(caplog):
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=3, use_lu_lambdas=True)
    with caplog.at_level("WARNING", logger="skipstep"):
        for _ in range(3):
            read_scheduler_config(written(scheduler))
            read_scheduler_config(written(diffusers.DPMSolverMultistepScheduler()))
    (record,) = caplog.records
    assert "DPMSolverMultistepScheduler: solver_order=3, use_lu_lambdas=True concern" in record.message


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"thresholding": "yes"}, "thresholding='yes'"),
        ({"karras_rho": 7.0}, "karras_rho=7.0"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type='one'"),
        ({"_class_name": "FlowMatchSomethingScheduler"}, "read_scheduler_config"),
        ({"_class_name": "EDMSomethingScheduler"}, "EDM"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "variance exploding"),
        ({"_class_name": "MyScheduler"}, "MyScheduler"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"_class_name": "EulerDiscreteScheduler", "use_flow_sigmas": True}, "use_flow_sigmas=True"),
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
