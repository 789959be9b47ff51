"""The launchers of the step and of the initial noise: they check the tensors, choose the grid and launch one kernel.

With TRITON_INTERPRET=1 (set before triton is imported) the same kernels run on CPU tensors; so they are tested without
a GPU. Nothing here reads a device value on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipstep.arrays import unreadable
from skipstep.errors import DeviceUnavailableError, InputError, check_integer, check_type, needs_packages
from skipstep.kernels.launch import DEFAULT_LAUNCH, StepLaunch, step_constants
from skipstep.kernels.layout import NUM_COLUMNS, NUM_SLOTS, StepFlags, Stream

with needs_packages("triton, which runs the step on a GPU", remedy="pip install 'skipstep[torch]'"):
    from triton import knobs

    from skipstep.kernels.philox_kernel import philox_normal_kernel
    from skipstep.kernels.step_kernel import ddim_step_kernel

NETWORK_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def ddim_step(
    *,
    state: Tensor,
    model_output: Tensor,
    network_input: Tensor | None,
    table: Tensor,
    stage: int,
    flags: StepFlags,
    seeds: Tensor | None = None,
    guidance: Tensor | None = None,
    rescale: Tensor | None = None,
    bound: Tensor | None = None,
    history: Tensor | None = None,
    x0: Tensor | None = None,
    counter: Tensor | None = None,
    broken: Tensor | None = None,
    places: Tensor | None = None,
    launch: StepLaunch = DEFAULT_LAUNCH,
) -> None:
    """Advance `state` from x_t to x_s in place and fill the network's next input, in one launch on the current stream.

    state         float32 `[B, C, …]`, of any rank from 2.
    model_output  float16, bfloat16 or float32 `[B, C, …]`, `[2B, C, …]` if flags.guided: predictions
                  with the condition, then without; 2C channels if flags.wide_output.
    network_input `[B or 2B, C, …]`, any of those dtypes; receives x_s, once or twice.
    table         float32 `[E, 1 or B, NUM_COLUMNS]` (skipstep.kernels.layout), `stage` its row.
    seeds         int64 `[B]`, unsigned 64-bit seeds reinterpreted as signed, if flags.add_noise.
    guidance      float32 `[B]`, if flags.guided.
    rescale       float32 `[B]`, a factor on the guided prediction, if flags.rescale.
    bound         float32 `[B]`, one bound per sample, if flags.threshold.
    history       float32 `[slots, B, C, …]`, kept between stages, with as many slots as flags.num_slots or more;
                  what is read must be finite, also where its weight is zero.
    x0            optional float32 `[B, C, …]`, receives the predicted image.
    counter       optional int32 `[1]`, the stage; `stage` is then not read.
    broken        optional int32 `[B]`, lowered to the first stage that leaves NaN or infinity in a sample.
    places        optional int32 `[N, 3]`: step N of the B samples, each at its own stage. For each its place among the
                  B, -1 for none, its row of the table `[E, 1, NUM_COLUMNS]`, and its stage. The network's output,
                  rescale and bound are then of N samples, the history is `[B, NUM_SLOTS, C, …]`, and neither
                  `network_input` nor `stage` and `counter` are used.

    All tensors are contiguous and on one device. Images may be in channels-last order, all of them then; the history is
    of the same shape as ever, and stands in memory as the state does. Raises InputError and DeviceUnavailableError.
    """
    check_type("flags", flags, StepFlags, remedy="pass the plan's, of this stage")
    last = any(map(_is_last, (state, model_output, network_input if places is None else None)))
    num_states, device = _check_state(state, launch, last)
    batch_size = num_states
    if places is not None:
        readable = isinstance(places, Tensor) and unreadable(places) is None and places.ndim > 0
        batch_size = len(places) if readable else 1
        _check("places", places, (batch_size, 3), (torch.int32,), device)
    network_shape = (flags.input_copies * batch_size, *state.shape[1:])
    channels = (2 if flags.wide_output else 1) * state.shape[1]
    output_shape = (2 * batch_size if flags.guided else batch_size, channels, *state.shape[2:])
    _check("model_output", model_output, output_shape, NETWORK_DTYPES, device, last=last)
    if places is None:
        _check("network_input", network_input, network_shape, NETWORK_DTYPES, device, last=last)
    known = isinstance(table, Tensor) and unreadable(table) is None and table.ndim == 3
    stages, rows = table.shape[:2] if known else (1, 1)
    own_rows = places is None and rows == batch_size
    _check("table", table, (stages, batch_size if own_rows else 1, NUM_COLUMNS), (torch.float32,), device)
    stage = check_integer("stage", stage, low=0, high=stages - 1, remedy="pass a row of the table")
    if flags.add_noise:
        _check("seeds", seeds, (num_states,), (torch.int64,), device)
    vectors = {
        "guidance": (guidance, flags.guided),
        "rescale": (rescale, flags.rescale),
        "bound": (bound, flags.threshold),
    }
    for name, (tensor, used) in vectors.items():
        if used:
            count = num_states if name == "guidance" else batch_size
            _check(name, tensor, (count,), (torch.float32,), device)
    images = {
        "history": (history, flags.num_slots > 0),
        "x0": (x0, x0 is not None),
    }
    slots = flags.num_slots
    if isinstance(history, Tensor) and unreadable(history) is None and history.ndim > 0:
        slots = max(slots, len(history))  # Those that the flags do not use are left alone.
    for name, (tensor, used) in images.items():
        shape = tuple(state.shape)
        if name == "history":
            shape = (slots, *shape) if places is None else (num_states, NUM_SLOTS, *shape[1:])
        if used:
            _check(name, tensor, shape, (torch.float32,), device, last=last and name == "x0")
    # The kernel does not touch an operand that the flags leave out; any pointer will do.
    operands = {
        "seeds": (seeds, flags.add_noise),
        "counter": (counter, counter is not None),
        "broken": (broken, broken is not None),
        **vectors,
        **images,
    }
    pointers = {name: tensor if used else state for name, (tensor, used) in operands.items()}
    for name, tensor, shape in (("counter", counter, (1,)), ("broken", broken, (num_states,))):
        if tensor is not None:
            _check(name, tensor, shape, (torch.int32,), device)
    _check_runnable(state)
    num_elements = state[0].numel()
    ddim_step_kernel[launch.grid(num_elements, batch_size)](
        state,
        state,
        model_output,
        state if network_input is None else network_input,
        pointers["x0"],
        pointers["history"],
        table,
        *(pointers[name] for name in ("seeds", "guidance", "rescale", "bound")),
        pointers["counter"] if places is None else places,
        pointers["broken"],
        num_elements,
        stage,
        **step_constants(
            flags,
            per_sample=rows > 1,
            store_x0=x0 is not None,
            counted=counter is not None and places is None,
            checked=broken is not None,
            placed=places is not None,
            channels=state.shape[1] if last else 0,
        ),
        BLOCK=launch.block_size,
        num_warps=launch.num_warps,
        # Triton's default changed between versions; with fusion the bits would differ from the CPU's.
        enable_fp_fusion=False,
    )


def initial_noise(
    *,
    state: Tensor,
    network_input: Tensor,
    seeds: Tensor,
    given: Tensor | None = None,
    launch: StepLaunch = DEFAULT_LAUNCH,
) -> None:
    """Fill `state` float32 `[B, C, …]` with x_T of the `seeds` int64 `[B]`, and the network's input with the same.

    `network_input` is `[B, C, …]` or, where guidance doubles the batch, `[2B, C, …]`. `given`, optional int32
    `[1]`: if it is not zero, the state is kept and only copied to the network's input. Both may be in channels-last
    order. Raises InputError.
    """
    last = any(map(_is_last, (state, network_input)))
    batch_size, device = _check_state(state, launch, last)
    readable = isinstance(network_input, Tensor) and unreadable(network_input) is None
    copies = 2 if readable and network_input.shape[:1] == (2 * batch_size,) else 1
    _check("network_input", network_input, (copies * batch_size, *state.shape[1:]), NETWORK_DTYPES, device, last=last)
    _check("seeds", seeds, (batch_size,), (torch.int64,), device)
    if given is not None:
        _check("given", given, (1,), (torch.int32,), device)
    _check_runnable(state)
    num_elements = state[0].numel()
    philox_normal_kernel[launch.grid(num_elements, batch_size)](
        state,
        network_input,
        seeds,
        state if given is None else given,
        num_elements,
        0,
        STREAM=int(Stream.INITIAL),
        COPIES=copies,
        CHOOSES=given is not None,
        CHANNELS=state.shape[1] if last else 0,
        BLOCK=launch.block_size,
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )


def _check_state(state: Tensor, launch: StepLaunch, last: bool) -> tuple[int, torch.device]:
    """The batch size and the device of a state that kernels can run on."""
    check_type("launch", launch, StepLaunch, remedy="pass choose_launch(...), or leave it out")
    check_type("state", state, Tensor, remedy="pass float32 [B, …]")
    fits = unreadable(state) is None and state.ndim > 1 and 0 not in state.shape
    shape = tuple(state.shape) if fits else (1, 1)
    _check("state", state, shape, (torch.float32,), state.device, last=last)
    return len(state), state.device


def _is_last(tensor: object) -> bool:
    """Whether it is in channels-last order and not in the plain one; some tensors are in both."""
    if not isinstance(tensor, Tensor) or unreadable(tensor) is not None or tensor.ndim != 4:
        return False
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _check(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    *,
    last: bool = False,
) -> None:
    order = torch.channels_last if last else torch.contiguous_format
    if not isinstance(tensor, Tensor):
        got = f"no {name}" if tensor is None else f"{name} of type {type(tensor).__name__}"
    elif unreadable(tensor) is not None:
        got = f"{name}, {unreadable(tensor)}"
    elif (
        tensor.shape == shape
        and tensor.dtype in dtypes
        and tensor.device == device
        and tensor.is_contiguous(memory_format=order)
    ):
        return
    else:
        layout = "" if tensor.is_contiguous(memory_format=order) else ", not contiguous"
        got = f"{name} {list(tensor.shape)} {tensor.dtype} on {tensor.device}{layout}"
    raise InputError(
        got=got,
        expected=f"contiguous {list(shape)} {' or '.join(map(str, dtypes))} on {device}"
        + (", in channels-last order" if last else ""),
        remedy=f"convert {name} before the loop starts",
    )


def _check_runnable(tensor: Tensor) -> None:
    if tensor.device.type != "cuda" and not knobs.runtime.interpret:
        raise DeviceUnavailableError(
            got=f"tensors on {tensor.device}",
            expected="CUDA tensors: this step is a GPU kernel",
            remedy="use skipstep.kernels.step_numpy.NumpyStep on the CPU, or set TRITON_INTERPRET=1 to test the kernel",
        )
