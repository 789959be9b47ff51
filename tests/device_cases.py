"""Networks and engines on the simulated device."""

from __future__ import annotations

import numpy as np
import torch
from engines import SCHEDULE
from tiny_networks import Labelled

from skipstep import Plan
from skipstep.backends.torch import TorchDenoiser, prepare_module
from skipstep.backends.torch_cuda import TorchDeviceDenoiser
from skipstep.calls.request import resolve_request
from skipstep.loops.captured import CudaLoop
from skipstep.loops.contract import Lifecycle
from skipstep.loops.stepwise import HostLoop
from skipstep.networks.spec import NetworkSpec

CPU = torch.device("cpu")


PLANS = {
    name: Plan(schedule=SCHEDULE, **{"steps": 4, **options})
    for name, options in {
        "ddim": {},
        "eta": {"eta": 0.7, "convention": "guided"},
        "ddpm": {"solver": "ddpm"},
        "heun": {"solver": "heun"},
        "rk4": {"solver": "rk4", "midpoints": "nearest"},
        "dpm_solver_2": {"solver": "dpm_solver_2", "midpoints": "nearest"},
        "dpm_solver_pp_2m": {"solver": "dpm_solver_pp_2m"},
        "unipc_2": {"solver": "unipc_2", "steps": 5},
        "lms": {"solver": "lms", "steps": 6},  # Its fourth step reads three slots, one of which it overwrites.
        "dynamic": {"clip": "dynamic", "dynamic_quantile": 0.7},
        "interval": {"steps": 6, "guidance_interval": (0.3, 20.0), "clip": None},
        "weights": {"solver": "dpm_solver_pp_2m", "eta": 0.0, "guidance_weights": [1.0, 0.0, 0.3, 0.0]},
    }.items()
}


SPEC = NetworkSpec((2, 5, 7), num_classes=10, null_label=10)


def loops(device, network=None, spec=SPEC, *, batch_size=3, half=False, **options):
    """The loop on the device, where images are in channels-last order, and the one in host memory. `half`: with a
    denoiser of half the batch too."""
    last = len(spec.sample_shape) == 3
    module, spec = prepare_module(Labelled() if network is None else network, spec)
    denoisers = {
        size: TorchDeviceDenoiser(module, spec, batch_size=size, device=CPU, dtype=torch.float32, channels_last=last)
        for size in (batch_size, batch_size // 2)[: 1 + half]
    }
    host = HostLoop(lambda size: TorchDenoiser(module, spec, batch_size=size), spec)
    sizes = [batch_size, batch_size // 2] if spec.can_guide else [batch_size]
    return CudaLoop(denoisers, spec, device, Lifecycle(), batch_sizes=sizes, **options), host


def request_of(stages, spec=SPEC, **arguments):
    given = {"seeds": [3, 2**64 - 1, 0], "x_T": None, "class_labels": [1, 5, 9], "adds_noise": stages.adds_noise}
    return resolve_request(spec, **{**given, **arguments})


def drawn(loop, stages, request):
    out = np.full((request.num_samples, *SPEC.sample_shape), np.nan, np.float32)
    assert loop.enqueue(stages, request, out).wait() == {}
    return out
