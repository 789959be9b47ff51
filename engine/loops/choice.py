"""Which loop runs on which device, and how one is made of a backend. ADD A LOOP FORM here.

CPU   stepwise                            the host loop
GPU   captured -> step_graph -> stepwise  the first that works, and the reason (skipstep.loops.programs)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from skipstep.errors import check_choice
from skipstep.loops.contract import Lifecycle, Loop
from skipstep.networks.spec import NetworkSpec, network_batch_sizes

if TYPE_CHECKING:
    from skipstep.backends.denoiser import Denoiser, DeviceDenoiser, MakeDenoiser
    from skipstep.backends.processor import Splits
    from skipstep.cuda.device import Device

FORMS: Mapping[str, tuple[str, ...]] = {"cpu": ("stepwise",), "cuda": ("captured", "step_graph", "stepwise")}


def resolve_form(name: str, *, device: str) -> str:
    """Turn "auto" into the form with the fewest launches from the host: a GPU tries that first, and reports which form
    was possible. Raises InputError for an unknown name, and for a form that the device ("cpu" or "cuda") lacks."""
    forms = FORMS[device]
    check_choice("loop", name, ("auto", *forms), remedy=f"use 'auto': a {device} device has no others")
    return forms[0] if name == "auto" else name


def make_loop(
    make: MakeDenoiser,
    network: NetworkSpec,
    batch_sizes: Sequence[int],
    *,
    form: str,
    required: bool,
    lifecycle: Lifecycle,
    device: Device | None = None,
    precision: str = "float32",
    reference: Callable[[], Denoiser] | None = None,
    ready: bool = False,
    splits: Splits | None = None,
) -> Loop:
    """The loop of a network on the CPU, or on the GPU `device`. `required` refuses any form but `form`.

    `reference` makes a denoiser of two samples in host memory, with which those on the GPU, in `precision`, are
    compared (skipstep.loops.agreement). Raises ExportError where they disagree. On the CPU `ready` makes the denoisers
    of all batch sizes at once, not when they are first needed; `splits` are the target's.
    """
    if device is None:
        from skipstep.loops.stepwise import HostLoop

        made = network_batch_sizes(network, batch_sizes) if ready else ()
        return HostLoop(make, network, ready=made, splits=splits)
    from skipstep.loops.agreement import NetworkProbe
    from skipstep.loops.captured import CudaLoop
    from skipstep.loops.programs import LADDER

    denoisers = {size: cast("DeviceDenoiser", make(size)) for size in network_batch_sizes(network, batch_sizes)}
    if reference is not None:
        probe = NetworkProbe.of(reference(), network)
        for denoiser in denoisers.values():
            probe.check(denoiser, precision=precision, device=device)
    return CudaLoop(
        denoisers,
        network,
        device,
        lifecycle,
        batch_sizes=batch_sizes,
        wanted=next(name for name in LADDER if name == form),
        required=required,
    )
