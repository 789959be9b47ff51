"""LoRAs of an engine: into its network when it is built, and swapped later. `swap_loras` is a function over an engine,
which is a method of `skipstep.Engine`."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from skipstep.errors import InputError, check_integer
from skipstep.loops.contract import Sampler
from skipstep.model_source import GraphSource, ModelSource
from skipstep.networks.lora import NETWORK, Lora, check_parts, read_loras
from skipstep.networks.lora_layers import Loras, put
from skipstep.opening import OpenedModel

_MAX_RANK = 1024
# Where the memory of a graph's inputs is the network's.
_SWAP = (("onnxruntime", "cpu", "float32"), ("torch", "cpu", "float32"))


class Swapped(Sampler, Protocol):
    loras: Loras | None


def read_with_loras(
    opened: OpenedModel, loras: Iterable[Lora] | None, rank: int | None, *, where: tuple[str, ...], texts: Sequence[str]
) -> tuple[GraphSource, Loras]:
    """The model with these in its network. `where`: backend, device and precision; `texts`: the pipeline's text
    encoders. A caller's own module stays as it is. Raises InputError, ModelFormatError."""
    files = [] if loras is None else read_loras(loras)
    check_parts(files, [NETWORK, *texts])
    if rank is not None:
        check_integer("lora_rank", rank, low=1, high=_MAX_RANK, remedy="pass the highest rank of the LoRAs to swap")
        if where not in _SWAP:
            raise InputError(
                got=f"lora_rank={rank} with {' '.join(where)}",
                expected=f"one of {', '.join(map(' '.join, _SWAP))}",
                remedy="leave lora_rank out: loras= alone are fused, and run everywhere",
            )
    if not opened.is_torch:
        raise InputError(
            got="loras or lora_rank for an .onnx file",
            expected="a folder, a .safetensors file or a module, whose layers have names",
            remedy="fuse them before the export",
        )
    source, found = opened.read(), Loras(files, rank)
    assert isinstance(source, ModelSource)
    module = source.network
    if source.digest is None:
        module = copy.deepcopy(module).float().to("cpu")
    # Beside ControlNets the network is a part (skipstep.pipelines.modules.Controlled).
    place = "unet" if hasattr(module.network, "nets") else ""
    found.apply(NETWORK, module.network.get_submodule(place), f"network.{place}".rstrip("."))
    digest = source.digest
    if digest is not None and found.key(NETWORK):
        digest = hashlib.sha256(digest.encode() + found.key(NETWORK)).hexdigest()
    return replace(source, network=module, digest=digest), found


def swap_loras(engine: Swapped, loras: Iterable[Lora]) -> None:
    """Put these LoRAs, (path, scale) pairs, in the place of those that the engine has; an empty list leaves none.

    The engine was built with lora_rank=. Calls under way end as they began. Equal LoRAs give equal samples, whatever
    was between. Raises InputError, ModelFormatError, EngineStateError from a callback of a call.
    """
    engine.runner.check()
    if engine.loras is None:
        raise InputError(
            got="an engine without room for LoRAs to swap",
            expected="one that was built with lora_rank=, the highest rank that is swapped",
            remedy="build it again, on the CPU in float32, with lora_rank=16",
        )
    changes = engine.loras.changes(read_loras(loras, digests=False))
    with engine.loras.gate.alone():
        put(changes)
