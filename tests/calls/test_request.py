import numpy as np
import pytest
import torch

from skipstep.calls.request import resolve_latents, resolve_request
from skipstep.errors import InputError
from skipstep.networks.spec import NetworkSpec

CONDITIONAL = NetworkSpec((1, 4, 4), num_classes=10, null_label=10)
NO_NULL = NetworkSpec((1, 4, 4), num_classes=10)
PLAIN = NetworkSpec((1, 4, 4))
LATENTS = np.zeros((2, 1, 4, 4), np.float32)


def resolve(network=PLAIN, *, seeds=None, x_T=None, class_labels=None, guidance_scale=None, adds_noise=False):
    return resolve_request(
        network, seeds=seeds, x_T=x_T, class_labels=class_labels, guidance_scale=guidance_scale, adds_noise=adds_noise
    )


def test_scalars_apply_to_every_sample():
    request = resolve(CONDITIONAL, seeds=[4, 5, 6], class_labels=3, guidance_scale=2.0)
    assert request.num_samples == 3
    assert request.seeds.tolist() == [4, 5, 6]
    assert request.seeds.dtype == np.uint64
    assert request.class_labels.tolist() == [3, 3, 3]
    assert request.guidance.tolist() == [2.0, 2.0, 2.0]
    assert resolve(CONDITIONAL, seeds=7, class_labels=[1, 2]).seeds.tolist() == [7, 7]
    assert resolve(seeds=0).num_samples == 1


def test_seed_zero_and_the_largest_seed_are_seeds():
    assert resolve(seeds=[0, 2**64 - 1]).seeds.tolist() == [0, 2**64 - 1]


def test_no_labels_mean_the_null_label():
    assert resolve(CONDITIONAL, seeds=[1, 2]).class_labels.tolist() == [10, 10]


def test_a_scale_of_one_is_no_guidance():
    assert resolve(CONDITIONAL, seeds=[1], class_labels=[1], guidance_scale=1.0).guidance is None
    assert resolve(CONDITIONAL, seeds=[1, 2], class_labels=1, guidance_scale=[1.0, 2.0]).guidance.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "x_T",
    [LATENTS, LATENTS.astype(np.float64), LATENTS.astype(np.float16), torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16)],
    ids=["float32", "float64", "float16", "torch bfloat16"],
)
def test_latents_of_any_floating_type_become_float32(x_T):
    request = resolve(x_T=x_T)
    assert request.num_samples == 2
    assert request.x_T.dtype == np.float32


def test_a_chunk_past_the_end_repeats_the_last_sample():
    request = resolve(CONDITIONAL, seeds=[1, 2, 3], class_labels=[4, 5, 6], guidance_scale=[1.0, 2.0, 3.0])
    chunk = request.chunk(2, 3)
    assert chunk.num_samples == 3
    assert chunk.seeds.tolist() == [3, 3, 3]
    assert chunk.class_labels.tolist() == [6, 6, 6]
    assert chunk.guidance.tolist() == [3.0, 3.0, 3.0]
    assert chunk.x_T is None


def with_nan():
    broken = LATENTS.copy()
    broken[1, 0, 2, 2] = np.nan
    return broken


@pytest.mark.parametrize(
    ("network", "options", "names"),
    [
        (PLAIN, {}, "no seeds"),
        (PLAIN, {"x_T": LATENTS, "adds_noise": True}, "adds noise"),
        (PLAIN, {"seeds": []}, "zero samples"),
        (PLAIN, {"seeds": -1}, "seeds=-1"),
        (PLAIN, {"seeds": [2**64]}, f"seeds={2**64}"),
        (PLAIN, {"seeds": True}, "seeds=True"),
        (PLAIN, {"seeds": [1.5]}, "seeds=1.5"),
        (PLAIN, {"seeds": "12"}, "seeds='12'"),
        (PLAIN, {"seeds": [1, 2, 3], "x_T": LATENTS}, "3 seeds, 2 x_T"),
        (CONDITIONAL, {"seeds": [1, 2], "class_labels": [1, 2, 3]}, "2 seeds, 3 class_labels"),
        (CONDITIONAL, {"seeds": [1], "class_labels": [10]}, "class_labels=10"),
        (CONDITIONAL, {"seeds": [1], "class_labels": -1}, "class_labels=-1"),
        (CONDITIONAL, {"seeds": [1], "class_labels": "sneaker"}, "class_labels='sneaker'"),
        (PLAIN, {"seeds": [1], "class_labels": 3}, "unconditional"),
        (NO_NULL, {"seeds": [1]}, "no class_labels"),
        (NO_NULL, {"seeds": [1], "class_labels": 1, "guidance_scale": 2.0}, "null label"),
        (PLAIN, {"seeds": [1], "guidance_scale": 2.0}, "null label"),
        (CONDITIONAL, {"seeds": [1], "guidance_scale": float("nan")}, "guidance_scale=nan"),
        (CONDITIONAL, {"seeds": [1], "guidance_scale": "high"}, "guidance_scale='high'"),
        (PLAIN, {"x_T": LATENTS[0]}, "shape [1, 4, 4]"),
        (PLAIN, {"x_T": np.zeros((2, 3, 4, 4), np.float32)}, "shape [2, 3, 4, 4]"),
        (PLAIN, {"x_T": LATENTS.astype(np.int64)}, "dtype int64"),
        (PLAIN, {"x_T": torch.zeros(2, 1, 4, 4, dtype=torch.int32)}, "dtype int32"),
        (PLAIN, {"x_T": LATENTS.tolist()}, "type list"),
        (PLAIN, {"x_T": torch.zeros(2, 1, 4, 4, device="meta")}, "a tensor on meta"),
        (PLAIN, {"x_T": with_nan()}, "samples [1]"),
    ],
)
def test_refuses(network, options, names):
    with pytest.raises(InputError) as caught:
        resolve(network, **options)
    assert names in caught.value.got
    assert "Remedy" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"sample_shape": ()},
        {"sample_shape": (1,) * 9},
        {"sample_shape": (1, 0, 4)},
        {"sample_shape": (1, 4, 4), "null_label": 3},
        {"sample_shape": (1, 4, 4), "num_classes": 0},
    ],
)
def test_network_specs_that_contradict_themselves_are_refused(options):
    with pytest.raises(InputError, match="Remedy"):
        NetworkSpec(**options)


class OnAnotherGpu:
    """A tensor of a device that this machine has not."""

    device = "cuda:1"
    shape = (1, 1, 4, 4)
    ndim = 4

    def detach(self):
        raise AssertionError("it was read")


def test_latents_on_another_gpu_than_the_engines_are_refused():
    with pytest.raises(InputError, match=r"x_T on cuda:1 for an engine on cuda:0.*x_T.to\('cuda:0'\)"):
        resolve_latents(OnAnotherGpu(), NetworkSpec((1, 4, 4)), device="cuda:0")
