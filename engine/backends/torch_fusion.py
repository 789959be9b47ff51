"""GroupNorms of a step graph, each with what stands around it, as one operator (skipstep.kernels.group_norm).

    silu(norm(x))                       group_norm, as is a norm alone
    silu(norm(x + e[n, c]))             group_norm with a vector, where the norm alone reads the sum
    silu(norm(x + r)), and x + r        add_group_norm: two results
    norm(reshape(x + r)), and x + r     the same, where the reshape leaves samples and channels: before attention

The operator keeps float32 from the sum to SiLU, where torch rounds to the network's dtype after each operation. It
reads channels-last values as they stand and writes such, also of three dimensions, where torch's norm copies.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from skipstep.backends.torch_rules import arguments
from skipstep.kernels.group_norm import DTYPES, MAX_ELEMENTS

_ATEN = torch.ops.aten
# The module that is imported above defines them.
_GROUP_NORM = torch.ops.skipstep.group_norm.default
_ADD_GROUP_NORM = torch.ops.skipstep.add_group_norm.default


def fuse_norms(graph: fx.Graph) -> None:
    """Put an operator in the place of every GroupNorm that the kernel can compute."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    for norm in graph.find_nodes(op="call_function", target=_ATEN.group_norm.default):
        given = arguments(norm)
        if not _fits(norm, given):
            continue
        readers = list(norm.users)
        silu = len(readers) == 1 and readers[0].target is _ATEN.silu.default
        affine = (given["num_groups"], given["weight"], given["bias"], given["eps"], silu)
        source = given["input"]
        found = _addition(source)
        if found is not None and found.is_vector and len(found.sum.users) == 1 and found.sum is source:
            result = _insert(graph, norm, _GROUP_NORM, (found.x, *affine, found.added), norm)
        elif found is not None and not found.is_vector and _precede(affine, found.sum, place):
            both = _insert(graph, found.sum, _ADD_GROUP_NORM, (found.x, found.added, *affine), None)
            result, total = (
                _insert(graph, found.sum, operator.getitem, (both, index), found.sum) for index in range(2)
            )
            place |= dict.fromkeys((both, result, total), place[found.sum])
            if found.sum is not source:
                result = _insert(graph, norm, source.target, (result, *source.args[1:]), norm)
            found.sum.replace_all_uses_with(total)
        else:
            result = _insert(graph, norm, _GROUP_NORM, (source, *affine, None), norm)
        (readers[0] if silu else norm).replace_all_uses_with(result)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


@dataclass(frozen=True, slots=True)
class _Addition:
    """A sum, and its operands: `x` of its shape, and what is added to it, of the same or a value for each channel."""

    sum: fx.Node
    x: fx.Node
    added: fx.Node
    is_vector: bool


def _fits(norm: fx.Node, given: dict[str, Any]) -> bool:
    x, affine = _value(given["input"]), [given[name] for name in ("weight", "bias") if given[name] is not None]
    if x is None or x.ndim < 2 or x.dtype not in DTYPES or not 0 < given["eps"] <= 1:
        return False
    sizes: tuple[Any, ...] = tuple(x.shape[1:])
    elements = 1
    for size in sizes:
        elements *= size if isinstance(size, int) else MAX_ELEMENTS + 1
    values = [_value(each) for each in affine]
    return 0 < elements <= MAX_ELEMENTS and all(each is not None and each.dtype in DTYPES for each in values)


def _addition(source: fx.Node) -> _Addition | None:
    """What a norm's input is the sum of, also where a reshape of what follows the channels stands between."""
    if source.target is _ATEN.reshape.default and isinstance(source.args[0], fx.Node):
        before, after = _value(source.args[0]), _value(source)
        if before is None or after is None or _sizes(before)[:2] != _sizes(after)[:2]:
            return None
        source = source.args[0]
    if source.target is not _ATEN.add.Tensor:
        return None
    given, total = arguments(source), _value(source)
    operands = (given["self"], given["other"])
    values = [_value(each) for each in operands]
    if total is None or given["alpha"] != 1 or any(each is None or each.dtype != total.dtype for each in values):
        return None
    sizes = [_sizes(each) for each in values if each is not None]
    if sizes == [_sizes(total)] * 2:
        # The result stands in memory as x does: rather as the sum does.
        first = next((k for k, each in enumerate(values) if each is not None and _strides(each) == _strides(total)), 0)
        return _Addition(source, operands[first], operands[1 - first], is_vector=False)
    for first in range(2):
        per_channel = [*_sizes(total)[:2], *["1"] * (total.ndim - 2)]
        if sizes[first] == _sizes(total) and sizes[1 - first] == per_channel:
            return _Addition(source, operands[first], operands[1 - first], is_vector=True)
    return None


def _precede(given: tuple[Any, ...], node: fx.Node, place: dict[fx.Node, int]) -> bool:
    """Whether all that is given is known before a node: the operator takes the node's place."""
    return all(place[each] < place[node] for each in given if isinstance(each, fx.Node))


def _insert(graph: fx.Graph, before: fx.Node, target: Any, given: tuple[Any, ...], like: fx.Node | None) -> fx.Node:
    with graph.inserting_before(before):
        made = graph.call_function(target, given)
    if like is not None:
        made.meta = dict(like.meta)
    return made


def _value(node: object) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _sizes(value: Tensor) -> list[str]:
    """As text: a comparison of symbols would be taken for a condition on them."""
    return [str(size) for size in value.shape]


def _strides(value: Tensor) -> list[str]:
    return [str(stride) for stride in value.stride()]
