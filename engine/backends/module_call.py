"""How a torch module is called with its conditions: which of its arguments each becomes.

    the network's `forward` has                 a condition becomes
    an argument of its name                     that argument
    an argument NAME, the condition is NAME_3   the item 3 of a list for that argument (ControlNet's residuals)
    the argument added_cond_kwargs              an entry of that mapping, or an item of a list there (diffusers' UNets)
    none of these                               labels and prompts the next positional argument, anything else an error

The timestep is the second argument, or the later one of the name `timestep` (diffusers' transformers).
`concat_to_state` conditions are appended to the channels of the state.
"""

from __future__ import annotations

import inspect
import re
from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from skipstep.errors import InputError
from skipstep.networks.condition import Condition
from skipstep.networks.spec import LABELS, PROMPTS

_ENTRIES: Final = "added_cond_kwargs"
_TIME: Final = "timestep"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value goes: an argument, its entry where that is a mapping, its item where that is a list."""

    argument: str
    entry: str | None = None
    item: int | None = None


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """`channels`, `positional`: the numbers of the conditions that go there; `places` of the others, by number.
    `names_time`: the timestep is passed by its name."""

    channels: tuple[int, ...] = ()
    positional: tuple[int, ...] = ()
    places: tuple[tuple[int, _Place], ...] = ()
    known: bool = False
    names_time: bool = False

    @classmethod
    def of(cls, network: nn.Module, conditions: Mapping[str, Condition]) -> ModuleCall:
        """Raises InputError for a condition that the network has no argument for."""
        parameters, takes_any, names_time = _parameters(network)
        channels, positional, places = [], [], []
        for number, (name, condition) in enumerate(conditions.items()):
            place = _place(name, parameters, takes_any)
            if condition.concat_to_state:
                channels.append(number)
            elif place is not None:
                places.append((number, place))
            elif name in (LABELS, PROMPTS):
                positional.append(number)
            else:
                raise InputError(
                    got=f"a condition {name} for {type(network).__name__}, whose forward has no such argument",
                    expected=f"one of {', '.join(sorted(parameters)) or 'none'}",
                    remedy="name the condition as the argument, pass concat_to_state=True for channels beside the "
                    "state's, or wrap the network in a module with this argument",
                )
        places.sort(key=lambda each: each[1].item or 0)
        _check_items([place for _, place in places])
        return cls(tuple(channels), tuple(positional), tuple(places), bool(conditions), names_time)

    def arranged(
        self,
        sample: Tensor,
        timestep: Tensor,
        values: Sequence[Tensor],
        entries: Callable[[], MutableMapping[str, Any]] = dict,
    ) -> tuple[Sequence[Tensor], dict[str, Any]]:
        """The network's positional arguments and those by name; `entries` makes the mapping of an argument that is
        one."""
        time: dict[str, Any] = {_TIME: timestep} if self.names_time else {}
        first = () if self.names_time else (timestep,)
        if not self.known:
            return (sample, *first, *values), time
        if self.channels:
            sample = torch.cat([sample, *(values[number] for number in self.channels)], dim=1)
        keywords = time
        for number, place in self.places:
            target, key = keywords, place.argument
            if place.entry is not None:
                target, key = keywords.setdefault(place.argument, entries()), place.entry
            if place.item is None:
                target[key] = values[number]
            else:
                target.setdefault(key, []).append(values[number])
        return (sample, *first, *(values[number] for number in self.positional)), keywords


class Watched(UserDict[str, Any]):
    """A mapping that knows which of its entries were read: networks ignore those that they do not know."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)


def _parameters(network: nn.Module) -> tuple[set[str], bool, bool]:
    """The names of the arguments of `forward` after state and timestep, whether it takes any name, and whether the
    timestep is none of the first two."""
    try:
        found = list(inspect.signature(network.forward).parameters.values())
    except (TypeError, ValueError):  # Compiled modules may have none.
        return set(), False, False
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [each.name for each in found[1:] if each.kind in named]
    names_time = _TIME in names[1:]
    others = set(names) - {_TIME} if names_time else set(names[1:])
    return others, any(each.kind is each.VAR_KEYWORD for each in found), names_time


def _place(name: str, parameters: set[str], takes_any: bool) -> _Place | None:
    if name in parameters:
        return _Place(name)
    numbered = re.fullmatch(r"(\w+)_(\d+)", name)
    if numbered and numbered[1] in parameters:
        return _Place(numbered[1], item=int(numbered[2]))
    if name in (LABELS, PROMPTS):
        return None
    if _ENTRIES in parameters:
        return _Place(_ENTRIES, numbered[1], int(numbered[2])) if numbered else _Place(_ENTRIES, name)
    return _Place(name) if takes_any else None


def _check_items(places: Sequence[_Place]) -> None:
    """The items of each list are numbered from 0 on, without a gap."""
    lists: dict[tuple[str, str | None], list[int]] = {}
    for place in places:
        if place.item is not None:
            lists.setdefault((place.argument, place.entry), []).append(place.item)
    for (argument, entry), items in lists.items():
        if items != list(range(len(items))):
            name = entry or argument
            raise InputError(
                got=f"conditions {', '.join(f'{name}_{item}' for item in items)}",
                expected=f"{name}_0 to {name}_{len(items) - 1}",
                remedy="number the items of a list from 0 on",
            )
