"""DDIM as the paper has it (Song, Meng, Ermon 2021, eq. 12 with η = 0), in plain PyTorch: the reference of all others.

x_s = √p · x̂0 + √(1 − p) · ε̂,        x̂0 = (x_t − √(1 − a) · ε̂) / √a,        a = ᾱ_t, p = ᾱ_s
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from skipstep.bench.contenders.workload import BuiltContender, Contender, Draw, Setup, Workload
from skipstep.bench.models import Subject
from skipstep.plans.plan import Plan


@torch.inference_mode()
def ddim(network: Any, plan: Plan, x_t: Tensor, conditioning: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """x_0 `[B, *sample_shape]` float32 from x_T; `network` computes in `dtype`."""
    alpha_bar = torch.tensor(plan.schedule.alpha_bar, dtype=torch.float32, device=x_t.device)
    final = torch.tensor(plan.final_alpha_bar, dtype=torch.float32, device=x_t.device)
    for t, s in zip(plan.timesteps, (*plan.timesteps[1:], None), strict=True):
        a, p = alpha_bar[t], final if s is None else alpha_bar[s]
        timestep = torch.full((len(x_t),), t, device=x_t.device)
        out = network(x_t.to(dtype), timestep, *conditioning).float()
        if plan.prediction_type == "v_prediction":
            x_0, eps = a.sqrt() * x_t - (1 - a).sqrt() * out, a.sqrt() * out + (1 - a).sqrt() * x_t
        elif plan.prediction_type == "sample":
            x_0, eps = out, (x_t - a.sqrt() * out) / (1 - a).sqrt()
        else:
            x_0, eps = (x_t - (1 - a).sqrt() * out) / a.sqrt(), out
        x_t = p.sqrt() * clipped(x_0, plan) + (1 - p).sqrt() * eps
    return x_t


def clipped(x_0: Tensor, plan: Plan) -> Tensor:
    if plan.clip is None:
        return x_0
    if plan.thresholding is None:
        bound = float(plan.clip)
        return x_0.clamp(-bound, bound)
    quantile = torch.quantile(x_0.flatten(1).abs(), plan.thresholding.quantile, dim=1)
    bounds = quantile.clamp(1.0, plan.thresholding.maximum).view(-1, *[1] * (x_0.ndim - 1))
    return x_0.clamp(-bounds, bounds) / bounds


def build(subject: Subject, setup: Setup) -> BuiltContender:
    device, dtype = setup.torch_device, getattr(torch, setup.dtype)
    network = on_device(subject.prepared[0], setup)
    if setup.on_gpu and dtype == torch.float32:
        # It is the reference: without the rounding of TF32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def prepare(workload: Workload) -> Draw:
        x_T = torch.from_numpy(workload.x_T).to(device)
        conditions = [torch.from_numpy(array) for array in workload.conditioning().values()]
        given = tuple(each.to(device, dtype if each.is_floating_point() else None) for each in conditions)
        return lambda: ddim(network, workload.plan, x_T, given, dtype)

    return BuiltContender(prepare)


def on_device(module: torch.nn.Module, setup: Setup) -> torch.nn.Module:
    """The module itself if it needs no change, else a copy on the device: others hold the original."""
    dtype = getattr(torch, setup.dtype)
    if not setup.on_gpu and dtype == torch.float32:
        return module
    return setup.accelerator.place(copy.deepcopy(module), dtype)


def lacks(subject: Subject, setup: Setup) -> str | None:
    return "a bundle holds no network that torch could run" if subject.is_bundle else None


TEXTBOOK = Contender("textbook", build, lacks)
