"""What a bundle is made for, from the words of a command line.

cpu              ONNX Runtime: the step network, its earlier parts and tables; every bundle holds them
rtx:sm86         TensorRT-RTX engines for that architecture
sm_87            step kernels compiled for that architecture
tensorrt         the step network in the precision asked for; skipstep build makes engines of it on the device
onnx-loop        the whole loop of each plan from seeds as one ONNX graph, for hosts that are not Python
onnx-unrolled    the same without control flow from given noise, for providers without Loop or uint64; of short plans
server           the loops from given noise, and the bundle itself, as models for Triton Inference Server
trtexec          the step network, the plans as arrays and the loop as examples, for TensorRT's own tools
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from skipstep.errors import InputError, check_items, check_text
from skipstep.export.tensorrt_engine import EngineTarget, parse_targets

_OTHERS = {
    "tensorrt": "step_network",
    "onnx-loop": "onnx_loop",
    "onnx-unrolled": "onnx_unrolled",
    "server": "server",
    "trtexec": "trtexec",
}


@dataclass(frozen=True, slots=True)
class Targets:
    """`engines` to build now, architectures of `kernels` to compile, and which of the others are asked for."""

    engines: tuple[EngineTarget, ...] = ()
    kernels: tuple[int, ...] = ()
    step_network: bool = False
    onnx_loop: bool = False
    onnx_unrolled: bool = False
    server: bool = False
    trtexec: bool = False

    @classmethod
    def parse(cls, words: Iterable[str]) -> Targets:
        """Each word may hold several targets with commas between them. Raises InputError for an unknown one."""
        engines: dict[EngineTarget, None] = {}
        kernels: dict[int, None] = {}
        others = dict.fromkeys(_OTHERS.values(), False)
        remedy = "name the architecture of the device, as in rtx:sm89 or sm_87"
        given = check_items("targets", words, expected="a list of targets", remedy=remedy)
        for word in (part.strip() for each in given for part in check_text("target", each).split(",")):
            if word.startswith("rtx"):
                engines.update(dict.fromkeys(parse_targets(word)))
            elif engines and re.fullmatch(r"sm\d+", word):  # rtx:sm86,sm89
                engines.update(dict.fromkeys(parse_targets(f"rtx:{word}")))
            elif word.startswith("sm_"):
                from skipstep.export.cubins import parse_architecture

                kernels[parse_architecture(word)] = None
            elif word in _OTHERS:
                others[_OTHERS[word]] = True
            elif word != "cpu":
                raise InputError(
                    got=f"target {word!r}",
                    expected="cpu, rtx:smNN, sm_NN, tensorrt, onnx-loop, onnx-unrolled, server or trtexec",
                    remedy=remedy,
                )
        return cls(tuple(engines), tuple(kernels), **others)
