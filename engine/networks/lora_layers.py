"""LoRAs in a network's layers: added to the weights once, or beside a layer where a swap can change them.

fuse             W + scale · alpha / rank · up · down
make_swappable   layer(x) + (x · down) · up              down and up are inputs of the graphs that are exported
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from skipstep.errors import EngineStateError, InputError
from skipstep.networks.graphs import LORA_INPUTS
from skipstep.networks.lora import NETWORK, Array, LoraFile, Named, Shape, Update, check_parts, fit, named

# The layers that LoRAs are usually trained for, and beside which inputs are put.
_USUAL: Final = re.compile(r"(^|\.)(attentions|transformer_blocks|layers)\.\d+\.")


def layers_of(network: nn.Module) -> dict[str, Any]:
    """The layers that a LoRA may update, by path."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {path: each for path, each in network.named_modules() if isinstance(each, kinds)}
    plain = {"groups": 1, "padding_mode": "zeros"}
    return {path: each for path, each in found.items() if all(getattr(each, n, v) == v for n, v in plain.items())}


def fuse(network: nn.Module, updates: Mapping[str, Sequence[Update]]) -> None:
    """Add updates to the weights of a network, in float32."""
    layers = layers_of(network)
    with torch.no_grad():
        for path, each in updates.items():
            weight = layers[path].weight
            for one in each:
                up, down = one.up.reshape(len(weight), -1), one.down.reshape(len(one.down), -1)
                weight += one.factor * torch.from_numpy(up @ down).reshape(weight.shape)


@dataclass(slots=True)
class Slot:
    """The factors beside one layer, of the highest rank, in memory that never moves: down `[rank, in, …]` and up
    `[out, rank, …]`, of a linear layer turned."""

    shape: Shape
    is_linear: bool
    down: Array
    up: Array

    @classmethod
    def of(cls, layer: Any, rank: int, rng: np.random.Generator) -> Slot:
        """With random factors: a graph that is compared with its network then shows that it reads them."""
        out, *inner = layer.weight.shape
        down = rng.standard_normal((rank, *inner), np.float32) / np.float32(math.sqrt(math.prod(inner)))
        up = rng.standard_normal((out, rank, *[1] * (len(inner) - 1)), np.float32) / np.float32(math.sqrt(10 * rank))
        linear = isinstance(layer, nn.Linear)
        turned = [np.ascontiguousarray(each.T if linear else each) for each in (down, up)]
        return cls((out, *inner), linear, *turned)

    def set(self, updates: Sequence[Update]) -> None:
        down, up = (self.down.T, self.up.T) if self.is_linear else (self.down, self.up)
        at = 0
        for each in updates:
            end = at + len(each.down)
            down[at:end] = each.down.reshape(-1, *self.shape[1:])
            up[:, at:end] = (each.up * np.float32(each.factor)).reshape(self.shape[0], -1, *up.shape[2:])
            at = end
        down[at:] = 0
        up[:, at:] = 0


class Swappable(nn.Module):
    """A layer with a slot beside it."""

    def __init__(self, layer: Any, slot: Slot) -> None:
        super().__init__()
        self.layer = layer
        self.options: dict[str, Any] = {}
        if not slot.is_linear:
            self.options = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
            self.convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(slot.shape) - 3]
        for name, tensor in zip(LORA_INPUTS, (slot.down, slot.up), strict=True):
            self.register_buffer(name, torch.from_numpy(tensor))

    def forward(self, x: Tensor) -> Tensor:
        down, up = map(self.get_buffer, LORA_INPUTS)
        beside = self.convolve(self.convolve(x, down, **self.options), up) if self.options else x @ down @ up
        return self.layer(x) + beside  # type: ignore[no-any-return]


def make_swappable(network: nn.Module, rank: int, also: Collection[str]) -> dict[str, Slot]:
    """Put slots beside the usual layers and those at the paths `also`."""
    layers, rng = layers_of(network), np.random.default_rng(0)
    slots = {}
    for path, layer in layers.items():
        if path not in also and not (_USUAL.search(path) and _is_small(layer)):
            continue
        slots[path] = Slot.of(layer, rank, rng)
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, Swappable(layer, slots[path]))
    return slots


def _is_small(layer: Any) -> bool:
    return isinstance(layer, nn.Linear) or math.prod(layer.kernel_size) == 1


def put(changes: Iterable[tuple[Slot, Sequence[Update]]]) -> None:
    for slot, updates in changes:
        slot.set(updates)


class Gate:
    """Entered by calls, which run side by side; a change of the network runs `alone`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._callers: list[int] = []

    def __enter__(self) -> None:
        with self._changed:
            self._callers.append(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._callers.remove(threading.get_ident())
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits for the calls under way, and holds up later ones. Raises EngineStateError inside of a call."""
        with self._changed:
            if threading.get_ident() in self._callers:
                raise EngineStateError(
                    got="a change of the network from a callback of a call that runs it",
                    expected="one between calls",
                    remedy="let the call return first",
                )
            self._changed.wait_for(lambda: not self._callers)
            yield


@dataclass(slots=True)
class Loras:
    """What an engine is built with: `files` that are fused, or with a `rank` slots, which hold the files at first.

    `slots` by a pipeline's part and a layer's path, and `names` of these layers in files; `inputs` are the slots'
    memory, by the names in the part's graph.
    """

    files: Sequence[LoraFile] = ()
    rank: int | None = None
    slots: dict[str, dict[str, Slot]] = field(default_factory=dict)
    names: dict[str, Named] = field(default_factory=dict)
    inputs: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict)
    gate: Gate = field(default_factory=Gate)

    def key(self, part: str) -> bytes:
        """What the part's graph depends on beside its weights; empty for nothing."""
        files = [each for each in self.files if part in each.parts]
        if self.rank is None:
            return b"".join(each.digest for each in files)
        return f"rank {self.rank}, {sorted({name for each in files for name in each.parts[part]})}".encode()

    def apply(self, part: str, network: nn.Module, prefix: str) -> None:
        """To a part, which the module that is exported calls `prefix`. Raises InputError for what does not fit."""
        layers = named({path: tuple(each.weight.shape) for path, each in layers_of(network).items()})
        updates = fit(self.files, part, layers)
        if self.rank is None:
            fuse(network, updates)
            return
        self._check_ranks(self.files, updates)
        slots = self.slots[part] = make_swappable(network, self.rank, updates)
        if not slots and part == NETWORK:
            raise InputError(
                got=f"lora_rank={self.rank} for a {type(network).__name__} without layers of attention",
                expected="layers that LoRAs update",
                remedy="name LoRAs of this network in loras=, or leave lora_rank out",
            )
        self.names[part] = {name: each for name, each in layers.items() if each[0] in slots}
        self.inputs[part] = {
            f"{prefix}.{path}.{name}": array
            for path, slot in slots.items()
            for name, array in zip(LORA_INPUTS, (slot.down, slot.up), strict=True)
        }

    def begin(self) -> None:
        """Put the files that the engine was built with into the slots, which held random numbers until then."""
        if self.rank is not None:
            put(self.changes(self.files))
            self.files = ()

    def changes(self, files: Sequence[LoraFile]) -> list[tuple[Slot, Sequence[Update]]]:
        """What each slot is to hold. Raises InputError for what does not fit, before anything is changed."""
        check_parts(files, self.slots)
        found: list[tuple[Slot, Sequence[Update]]] = []
        for part, slots in self.slots.items():
            updates = fit(files, part, self.names[part])
            self._check_ranks(files, updates)
            found += [(slot, updates.get(path, ())) for path, slot in slots.items()]
        return found

    def _check_ranks(self, files: Sequence[LoraFile], updates: Mapping[str, Sequence[Update]]) -> None:
        rank = max((sum(len(one.down) for one in each) for each in updates.values()), default=0)
        if rank > (self.rank or 0):
            raise InputError(
                got=f"{', '.join(each.path for each in files)} of rank {rank} together",
                expected=f"at most lora_rank={self.rank}, with which the engine was built",
                remedy=f"build the engine with lora_rank={rank}",
            )
