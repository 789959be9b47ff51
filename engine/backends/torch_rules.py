"""Operations of a traced network that change no bit of their input, taken out of the graph.

    x·1, x/1, x − 0      dropout that is off      a conversion to what a value already is
    a copy, where nothing is written to           a view of the same shape

A NaN may keep its payload where arithmetic would change it. diffusers' networks divide each block's output by
`output_scale_factor`, which is 1. In floats x + 0 stays: it turns −0 into 0. A `view` becomes a `reshape`, which copies
where a view cannot be had, because taking out a copy may leave a value in another order in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, fx

_ATEN = torch.ops.aten
Rule = Callable[[fx.Node], fx.Node | None]


def simplify(graph: fx.Graph) -> None:
    """Apply RULES to every operation. Values keep their bits, shapes and dtypes."""
    for node in graph.nodes:
        rule = RULES.get(node.target)
        source = None if rule is None else rule(node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif node.target is _ATEN.view.default:
            node.target = _ATEN.reshape.default
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operation by name, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((each.name for each in schema), node.args, strict=False))
    return {each.name: each.default_value for each in schema if each.has_default_value()} | given | node.kwargs


def _by_one(node: fx.Node) -> fx.Node | None:
    """x·1 and x/1. Division of integers gives floats, and is no such thing."""
    return _source(node) if _is_number(arguments(node)["other"], 1.0) else None


def _less_zero(node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    return _source(node) if _is_number(given["other"], 0.0) and given["alpha"] == 1 else None


def _plus_zero(node: fx.Node) -> fx.Node | None:
    given, floating = arguments(node), _value(node).is_floating_point()
    neutral = -0.0 if floating else 0.0
    return _source(node) if _is_number(given["other"], neutral) and given["alpha"] == 1 else None


def _dropout(node: fx.Node) -> fx.Node | None:
    given = arguments(node)
    return _source(node) if not given["train"] or given["p"] == 0 else None


def _conversion(node: fx.Node) -> fx.Node | None:
    """Its result may only stand in another order in memory, which _source does not look at."""
    asks_for_order = arguments(node).get("memory_format") not in (None, torch.preserve_format)
    return None if asks_for_order else _source(node)


def _copy(node: fx.Node) -> fx.Node | None:
    """As it is, or in an order that the input has already. The default of `contiguous` is written as a number."""
    order, source = arguments(node)["memory_format"], _source(node)
    if source is None or order in (None, torch.preserve_format):
        return source
    order = order if isinstance(order, torch.memory_format) else torch.contiguous_format
    return source if _value(source).is_contiguous(memory_format=order) else None


def _same_shape(node: fx.Node) -> fx.Node | None:
    return _source(node)


def _whole(node: fx.Node) -> fx.Node | None:
    """A slice of everything. One from the end, or of every second, may have the input's shape by chance of the batch
    size."""
    given = arguments(node)
    is_whole = (
        given["start"] in (None, 0) and given["step"] == 1 and given["end"] in (None, torch.iinfo(torch.int64).max)
    )
    return _source(node) if is_whole else None


def _back(node: fx.Node) -> fx.Node | None:
    """Two transpositions of the same dimensions."""
    first = node.args[0]
    if not isinstance(first, fx.Node) or first.target is not node.target:
        return None
    rank = _value(node).ndim
    swapped = ({int(dim) % rank for dim in each.args[1:3]} for each in (first, node))  # type: ignore[arg-type]
    source = first.args[0]
    return source if next(swapped) == next(swapped) and isinstance(source, fx.Node) else None


def _source(node: fx.Node) -> fx.Node | None:
    """The first argument, if the result has its shape, dtype and device."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), Tensor):
        return None
    before, after = _value(source), _value(node)
    same = (before.dtype, before.device, *map(str, before.shape)) == (after.dtype, after.device, *map(str, after.shape))
    return source if same else None


def _value(node: fx.Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _is_number(argument: object, number: float) -> bool:
    """Whether an argument is that very number; 0.0 is not -0.0."""
    is_equal = isinstance(argument, bool | int | float) and argument == number
    return is_equal and math.copysign(1.0, float(argument)) == math.copysign(1.0, number)  # type: ignore[arg-type]


RULES: Final[Mapping[Any, Rule]] = {
    _ATEN.mul.Tensor: _by_one,
    _ATEN.mul.Scalar: _by_one,
    _ATEN.div.Tensor: _by_one,
    _ATEN.div.Scalar: _by_one,
    _ATEN.sub.Tensor: _less_zero,
    _ATEN.add.Tensor: _plus_zero,
    _ATEN.dropout.default: _dropout,
    _ATEN.feature_dropout.default: _dropout,
    _ATEN.to.dtype: _conversion,
    _ATEN.to.dtype_layout: _conversion,
    _ATEN.to.device: _conversion,
    _ATEN._to_copy.default: _conversion,
    _ATEN.type_as.default: _conversion,
    _ATEN.contiguous.default: _copy,
    _ATEN.clone.default: _copy,
    _ATEN.alias.default: _same_shape,
    _ATEN.detach.default: _same_shape,
    _ATEN.view.default: _same_shape,
    _ATEN.reshape.default: _same_shape,
    _ATEN.expand.default: _same_shape,
    _ATEN.slice.Tensor: _whole,
    _ATEN.transpose.int: _back,
}
