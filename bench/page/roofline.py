"""The step kernel's roofline: what its memory traffic allows, and what was measured of that.

    rate <= min(peak, bandwidth · FLOP/byte)

A step reads and writes the float32 state, and the network's output and next input in the network's dtype, both twice
where guidance doubles the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from skipstep.bench.page.html import Html, element, prose
from skipstep.bench.page.inputs import MachineGroup, ReportInputs, is_finite
from skipstep.bench.page.parts import Album, missing
from skipstep.bench.page.plots import RooflinePoint, roofline_plot

# NVIDIA's data sheets: GB/s of memory, and GFLOP/s of float32 outside the tensor cores. By a part of the GPU's name.
ROOFS: Final[Mapping[str, tuple[float, float]]] = {
    "H200": (4800.0, 67000.0),
    "H100 PCIe": (2000.0, 51000.0),
    "H100": (3350.0, 67000.0),
    "A100": (2039.0, 19500.0),
    "L40S": (864.0, 91600.0),
    "L4": (300.0, 30300.0),
    "RTX 4090": (1008.0, 82600.0),
}
_MODEL: Final = "H100"
_STATE_BYTES: Final = 8
_NETWORK_BYTES: Final = {"float16": 4, "bfloat16": 4, "float32": 8}
# Of the arithmetic in skipstep.kernels.step_kernel: predicted image, predicted noise and update have two products and a
# sum each, the clip two comparisons. Noise adds a product, a sum and the four functions of Box and Muller; guidance a
# difference, a product and a sum. The integer operations of Philox are no FLOP.
_STEP_FLOP: Final = 11
_NOISE_FLOP: Final = 6
_GUIDANCE_FLOP: Final = 3


def roofline_section(inputs: ReportInputs, album: Album) -> list[Html]:
    """Measured points for each machine that has them; the model alone, called so, where none has."""
    lede = element(
        "p",
        "A step reads and writes each operand once: 12 bytes an element with a half-precision network, 16 with a "
        f"float32 one, for {_STEP_FLOP} operations, or {_STEP_FLOP + _NOISE_FLOP} with noise. That is about one "
        "operation a byte, far left of where arithmetic would become the limit: memory bandwidth alone decides.",
    )
    figures = [figure for group in inputs.groups if (figure := _measured(group, album)) is not None]
    if not figures:
        remedy = prose(
            "on a machine with a GPU run `make gpu`, and give its latency.json and step-kernel.json to "
            "`skipstep report`."
        )
        figures = [_model(album), missing("No point here is measured:", remedy)]
    return [lede, element("div", *figures, class_="plots"), *_compiled(inputs.kernels)]


def _measured(group: MachineGroup, album: Album) -> Html | None:
    """The largest state of each variant: smaller ones are served by the cache or measure the launch."""
    largest: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    cases = group.bandwidth.get("cases") if group.bandwidth is not None else None
    for case in cases if isinstance(cases, list) else []:
        if not isinstance(case, Mapping) or not case.get("beyond_cache", True):
            continue
        numbers = (case.get("step_gb_per_s"), case.get("copy_gb_per_s"), case.get("bytes"))
        if case.get("dtype") in _NETWORK_BYTES and all(is_finite(each) and each > 0 for each in numbers):
            key = case["dtype"], bool(case.get("eta")), bool(case.get("guided"))
            if key not in largest or case["bytes"] > largest[key]["bytes"]:
                largest[key] = case
    if not largest or group.bandwidth is None or group.bandwidth.get("dry_run"):
        return None
    points = []
    for (dtype, noisy, guided), case in largest.items():
        intensity = _intensity(dtype, noisy=noisy, guided=guided)
        points.append(RooflinePoint(_name(dtype, noisy, guided), intensity, intensity * case["step_gb_per_s"]))
    copy = max(case["copy_gb_per_s"] for case in largest.values())
    roof = next((roof for name, roof in ROOFS.items() if name in group.machine_class), None)
    share = min(case["step_gb_per_s"] / case["copy_gb_per_s"] for case in largest.values())
    plot = roofline_plot(
        album.name("roofline", group.machine_class),
        f"Step kernel: {group.machine_class}",
        bandwidth=copy,
        peak=roof[1] if roof else None,
        points=points,
    )
    note = f"Measured: the slope is a copy's {copy:,.0f} GB/s, of which the slowest step reaches {share:.0%}."
    return album.figure(plot, caption=group.machine_class, note=note)


def _model(album: Album) -> Html:
    bandwidth, peak = ROOFS[_MODEL]
    points = [
        RooflinePoint(_name(dtype, noisy, False), _intensity(dtype, noisy=noisy, guided=False), None)
        for dtype in ("float16", "float32")
        for noisy in (False, True)
    ]
    title = f"Step kernel: model of an {_MODEL}, not measured"
    plot = roofline_plot(album.name("roofline-model"), title, bandwidth=bandwidth, peak=peak, points=points)
    note = f"Model, not measured: the data sheet's {bandwidth:,.0f} GB/s and {peak / 1e3:,.0f} TFLOP/s in float32."
    return album.figure(plot, caption=f"NVIDIA {_MODEL} SXM", note=note)


def _compiled(kernels: Sequence[Mapping[str, Any]]) -> list[Html]:
    counts = ("registers", "spill_instructions", "stack_bytes", "local_bytes")
    whole = [kernel for kernel in kernels if all(is_finite(kernel.get(name)) for name in counts)]
    if not whole:
        return []
    registers = [kernel["registers"] for kernel in whole]
    lost = sum(kernel[name] for kernel in whole for name in counts[1:])
    text = (
        f"Compiled ahead of time for {len({str(kernel.get('arch')) for kernel in whole})} architectures: {len(whole)} "
        f"kernels of {min(registers)} to {max(registers)} registers; "
        + ("no spills, stack or local memory." if lost == 0 else f"{lost} bytes or instructions of spills and stack.")
    )
    return [element("p", text, class_="facts")]


def _intensity(dtype: str, *, noisy: bool, guided: bool) -> float:
    flop = _STEP_FLOP + _NOISE_FLOP * noisy + _GUIDANCE_FLOP * guided
    return flop / (_STATE_BYTES + _NETWORK_BYTES[dtype] * (2 if guided else 1))


def _name(dtype: str, noisy: bool, guided: bool) -> str:
    return ", ".join([dtype, *(["with noise"] if noisy else []), *(["guided"] if guided else [])])
