"""What a bundle is made for, from the words of a command line.

cpu              the whole loop as one ONNX graph, for ONNX Runtime; every bundle has it
rtx:sm86         a TensorRT-RTX engine for that architecture
sm_87            the step kernels compiled for that architecture
tensorrt         the step network, for skipstep build to make an engine of where it will run
server           a model repository for Triton Inference Server
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from skipstep.errors import InputError
from skipstep.export.tensorrt_engine import EngineTarget, parse_targets


@dataclass(frozen=True, slots=True)
class Targets:
    """`engines` to build now, architectures of `kernels` to compile, and whether the rest is wanted."""

    engines: tuple[EngineTarget, ...] = ()
    kernels: tuple[int, ...] = ()
    step_network: bool = False
    server: bool = False

    @classmethod
    def parse(cls, words: Iterable[str]) -> Targets:
        """Each word may hold several, with commas. Raises InputError for one that is none."""
        engines: dict[EngineTarget, None] = {}
        kernels: dict[int, None] = {}
        step_network = server = False
        for word in (part.strip() for each in words for part in each.split(",")):
            if word.startswith("rtx"):
                engines.update(dict.fromkeys(parse_targets(word)))
            elif engines and re.fullmatch(r"sm\d+", word):  # rtx:sm86,sm89
                engines.update(dict.fromkeys(parse_targets(f"rtx:{word}")))
            elif word.startswith("sm_"):
                from skipstep.export.cubins import parse_architecture

                kernels[parse_architecture(word)] = None
            elif word == "tensorrt":
                step_network = True
            elif word == "server":
                server = True
            elif word != "cpu":
                raise InputError(
                    got=f"target {word!r}",
                    expected="cpu, rtx:smNN, sm_NN, tensorrt or server",
                    remedy="name the architecture of the device, as in rtx:sm89 or sm_87",
                )
        return cls(tuple(engines), tuple(kernels), step_network, server)
