"""GroupNorm and SiLU as one kernel, against its definition in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from group_norm_numpy import group_norm_numpy
from tolerances import BFLOAT16_ULP, GROUP_NORM

from skipstep.errors import DeviceUnavailableError, InputError
from skipstep.kernels.group_norm import dense, group_norm_reference, launch_for, launch_group_norm, same_order
from skipstep.kernels.group_norm_launch import MAX_TILE, MAX_WARPS, norm_launch

# Of the result, relative to it.
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: BFLOAT16_ULP / 2, torch.float32: 0.0}
# Name: (N, C, positions, groups).
SHAPES = {
    "cifar": (1, 128, (8, 8), 32),
    "padded, one tile": (3, 24, (7, 5), 8),
    "one channel a group": (3, 6, (4, 4), 6),
    "one group": (1, 12, (3, 3), 1),
    "one position": (2, 32, (1, 1), 4),
    "one element": (1, 2, (1, 1), 2),
    "a sequence": (2, 16, (9,), 4),
    "split": (1, 10, (64, 64), 2),
    "split, odd": (2, 6, (75, 77), 2),
    "split along channels": (1, 5000, (2, 2), 1),
}


# With what the others have: several tiles, an odd end, a group of one channel.
REPEATED = ("one group", "one position", "a sequence", "split")
# A program of one tile and one of several show what half precision does.
HALVED = ("padded, one tile", "split, odd")


def cases():
    for shape, dtype, channels_last in itertools.product(SHAPES, ROUNDING, (False, True)):
        quick = shape not in REPEATED and (dtype == torch.float32 or (shape in HALVED and channels_last))
        order = "NHWC" if channels_last else "NCHW"
        marks = () if quick else pytest.mark.slow
        yield pytest.param(shape, dtype, channels_last, marks=marks, id=f"{shape}-{dtype}-{order}")


def operands(name: str, dtype: torch.dtype, channels_last: bool, device: str) -> dict[str, torch.Tensor]:
    samples, channels, positions, _ = SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    # A mean far from 0: the variance must not come from the mean of squares.
    x, image = normal(samples, channels, *positions) + 5, normal(samples, channels, *positions)
    if channels_last:
        x, image = (each.movedim(1, -1).contiguous().movedim(-1, 1) for each in (x, image))
    return {
        "x": x,
        "weight": normal(channels),
        "bias": normal(channels),
        "vector": normal(samples, channels),
        "image": image,
    }


def compare(found: torch.Tensor, expected: np.ndarray, dtype: torch.dtype, *, interpreted: bool = False) -> None:
    error = np.abs(found.double().cpu().numpy() - expected)
    largest = np.abs(expected).max()
    smallest = torch.finfo(dtype).smallest_normal  # Below it the units stay the same.
    # Triton's interpreter truncates where bfloat16 should be rounded.
    rounding = BFLOAT16_ULP if dtype == torch.bfloat16 and interpreted else ROUNDING[dtype]
    allowed = rounding * np.maximum(np.abs(expected), smallest) + GROUP_NORM * max(1.0, largest)
    assert (error <= allowed).all(), f"{error.max()} of {largest}"


def as_numpy(given: dict[str, torch.Tensor | None]) -> dict[str, np.ndarray | None]:
    return {name: None if each is None else each.double().cpu().numpy() for name, each in given.items()}


@pytest.mark.parametrize(("shape", "dtype", "channels_last"), cases())
def test_equals_its_definition(shape, dtype, channels_last, kernel_device):
    groups, given = SHAPES[shape][3], operands(shape, dtype, channels_last, kernel_device)
    x = given["x"]
    for silu, added in ((True, None), (False, "vector"), (True, "image")):
        kept = {name: each for name, each in given.items() if name in ("weight", "bias", added)}
        found, total = launch_group_norm(x, groups, silu=silu, store_sum=added == "image", **kept)
        exact = as_numpy({"x": x, **kept})
        expected, _ = group_norm_numpy(
            exact["x"], groups, exact["weight"], exact["bias"], silu=silu, **({added: exact[added]} if added else {})
        )
        compare(found, expected, dtype, interpreted=kernel_device == "cpu")
        assert found.stride() == x.stride()
        if added == "image":
            compare(total, exact["x"] + exact["image"], dtype, interpreted=kernel_device == "cpu")
            assert total.stride() == x.stride()
        else:
            assert total is None
        # What the operator does in host memory.
        compare(group_norm_reference(x, groups, silu=silu, **kept)[0], expected, dtype)


def test_nothing_outside_is_written(kernel_device):
    for shape in ("padded, one tile", "split, odd"):
        samples, channels, positions, groups = SHAPES[shape]
        memory = torch.full((samples + 2, channels, *positions), float("nan"), device=kernel_device)
        x = memory[1:-1]
        x.normal_(generator=torch.Generator(kernel_device).manual_seed(0))
        found, _ = launch_group_norm(x, groups, silu=True)
        # Neither NaN that stands beside the samples is read.
        assert found.isfinite().all()
        assert memory[[0, -1]].isnan().all()


def test_without_weight_and_bias_and_with_one_of_them(kernel_device):
    given = operands("padded, one tile", torch.float32, False, kernel_device)
    for names in ((), ("weight",), ("bias",)):
        kept = {name: given[name] for name in names}
        found, _ = launch_group_norm(given["x"], 8, eps=0.25, **kept)
        exact = as_numpy({"x": given["x"], "weight": None, "bias": None} | kept)
        expected, _ = group_norm_numpy(exact["x"], 8, exact["weight"], exact["bias"], eps=0.25)
        compare(found, expected, torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", ["padded, one tile", "split, odd"])
def test_what_is_not_finite_stays_seen(shape, value, kernel_device):
    groups, given = SHAPES[shape][3], operands(shape, torch.float32, True, kernel_device)
    x, width = given["x"], SHAPES[shape][1] // SHAPES[shape][3]
    x[1, width, 2, 3] = value
    found, _ = launch_group_norm(x, groups, given["weight"], given["bias"], silu=True)
    # The second group of the second sample, all of it and nothing else.
    assert found[1, width : 2 * width].isnan().all()
    found[1, width : 2 * width] = 0
    assert found.isfinite().all()


@pytest.mark.parametrize("shape", ["padded, one tile", "split"])
def test_a_constant_group_is_its_bias(shape, kernel_device):
    groups, given = SHAPES[shape][3], operands(shape, torch.float32, False, kernel_device)
    x = torch.full_like(given["x"], 1e4)
    found, _ = launch_group_norm(x, groups, given["weight"], given["bias"])
    expected = given["bias"].view(1, -1, *[1] * (x.ndim - 2)).expand_as(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_silu_of_large_values(kernel_device):
    # 0 and 88 and more on both sides, where the exponential is 0 or infinity in float32.
    x = torch.tensor([-1.0, 1.0], device=kernel_device).view(1, 1, 2)
    weight = torch.tensor([1000.0], device=kernel_device)
    found, _ = launch_group_norm(x, 1, weight, silu=True)
    assert found.flatten().tolist() == pytest.approx([0.0, 1000.0], rel=1e-4)


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (2, 0, 3, 1)])
def test_other_orders_in_memory_are_copied(order, kernel_device):
    given = operands("padded, one tile", torch.float32, False, kernel_device)
    x = given["x"].permute(order).contiguous().permute(np.argsort(order).tolist())
    found, _ = launch_group_norm(x, 8, given["weight"], given["bias"], image=given["image"].mT.contiguous().mT)
    expected, _ = launch_group_norm(given["x"], 8, given["weight"], given["bias"], image=given["image"])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.stride() == dense(x).stride()


def test_a_step_along_one_sample_does_not_count():
    x = torch.zeros(1, 4, 3, 3)
    odd = x.as_strided(x.shape, (7, 9, 3, 1))
    assert same_order(x, odd)
    assert dense(odd) is odd
    assert not same_order(x, x.mT)


def test_a_view_of_a_channels_last_image_stays_one(kernel_device):
    """The norm before an attention: [N, C, H·W], channels last in memory."""
    given = operands("cifar", torch.float16, True, kernel_device)
    x = given["x"]
    flat = x.view(1, 128, 64)
    assert launch_group_norm(flat, 32)[0].stride() == flat.stride()
    assert launch_group_norm(flat, 32)[0].mT.is_contiguous()
    torch.testing.assert_close(launch_group_norm(flat, 32)[0].view_as(x), launch_group_norm(x, 32)[0], rtol=0, atol=0)


def test_which_groups_are_split():
    def split(*, channels: int, positions: int) -> bool:
        launches = {
            norm_launch(channels=channels, positions=positions, channels_last=last).launches for last in (False, True)
        }
        return launches.pop() == 2 and not launches

    # Every norm of the networks of 32×32 in this project, up to 384 channels in 32 groups.
    assert not any(split(channels=c, positions=p) for c, p in ((4, 1024), (8, 1024), (12, 1024), (16, 256), (1, 16)))
    assert split(channels=10, positions=4096)
    assert split(channels=2, positions=MAX_TILE // 2 + 1)
    assert not split(channels=2, positions=MAX_TILE // 2)


@pytest.mark.parametrize("channels_last", [False, True])
def test_tiles_cover_a_group(channels_last):
    rng = np.random.default_rng(0)
    for channels, positions in [(1, 1), (1, 10**6), (10**5, 1), *np.exp(rng.uniform(0, 11, (200, 2))).astype(int)]:
        launch = norm_launch(channels=int(channels), positions=int(positions), channels_last=channels_last)
        rows, columns = -(-channels // launch.block_c), -(-positions // launch.block_p)
        assert launch.tiles == rows * columns
        assert launch.block_c * launch.block_p <= MAX_TILE
        assert 1 <= launch.num_warps <= MAX_WARPS
        # No thread holds more than 16 values of an operand.
        assert launch.block_c * launch.block_p <= 16 * 32 * launch.num_warps


REFUSED = {
    "groups": (lambda x: launch_group_norm(x, 5), "8 channels in 5 groups"),
    "integers": (lambda x: launch_group_norm(x.long(), 4), "torch.int64"),
    "a vector of another dtype": (lambda x: launch_group_norm(x, 4, vector=x[:, :, 0, 0].double()), "float64"),
    "an image of another shape": (lambda x: launch_group_norm(x, 4, image=x[:1]), r"image, \[1, 8, 3, 3\]"),
    "a weight of another length": (lambda x: launch_group_norm(x, 4, x[0, :3, 0, 0]), r"weight, \[3\]"),
    "no tensor": (lambda x: launch_group_norm(3, 4), "x=3"),
    "a flag that is text": (lambda x: launch_group_norm(x, 4, silu="no"), "True or False"),
    "no positions": (lambda x: launch_group_norm(x[:, :, :0], 4), "x, "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, kernel_device):
    work, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        work(torch.zeros(2, 8, 3, 3, device=kernel_device))


def test_without_a_gpu_it_says_so(monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(DeviceUnavailableError, match="CUDA tensors"):
        launch_group_norm(torch.zeros(1, 4, 2, 2), 2)


def test_operators_agree_with_what_they_promise(kernel_device):
    """Schema, fake implementation, and strides that the fake one foretells."""
    ops, given = torch.ops.skipstep, operands("padded, one tile", torch.float16, True, kernel_device)
    x, image = given["x"], given["image"]
    arguments = (8, given["weight"], given["bias"], 1e-5, True)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for tensor in (x, x.contiguous(), x.mT):
        torch.library.opcheck(ops.group_norm.default, (tensor, *arguments, given["vector"]), test_utils=checks)
        torch.library.opcheck(ops.group_norm.default, (tensor, *arguments, None), test_utils=checks)
        torch.library.opcheck(
            ops.add_group_norm.default, (tensor, image.reshape(tensor.shape), *arguments), test_utils=checks
        )
    found, total = ops.add_group_norm(x, image, *arguments)
    expected = launch_group_norm(x, 8, given["weight"], given["bias"], silu=True, image=image, store_sum=True)
    torch.testing.assert_close(found, expected[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(total, x + image, rtol=0, atol=0)
    torch.testing.assert_close(total, expected[1], rtol=0, atol=0)
    assert launch_for(x, 8).launches == 1
