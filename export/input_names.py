"""Names for step inputs that say where in the network they belong, from the names of its parameters.

A step input is a value between two graphs, and the exporter numbers values: unsqueeze_7. It is named here after the
layer that made it, as in down_blocks.2.resnets.0.time_emb_proj: the nearest before it that has parameters, within what
runs before the loop; without one, after the nearest that reads it. Several of one layer are numbered. What is an input
of the network itself keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import onnx
from onnx import GraphProto, NodeProto

from skipstep.networks.graphs import SAMPLE, Partition

_PARAMETER = re.compile(r"[A-Za-z_]\w*(\.\w+)+")
_PREFIX = "network."  # Of the parameters of a network within its wrapper (skipstep.backends.torch.DenoisingModule).
Onward = Callable[[NodeProto], Iterable[NodeProto]]


def layer_names(parts: Partition) -> dict[str, str]:
    """A name for each input of the step graph but the sample: letters, digits, "_", "." and "-" alone, no two alike."""
    step = onnx.load_from_string(parts.graphs.step).graph
    weights = {tensor.name for tensor in step.initializer}
    inputs = [each.name for each in step.input if each.name not in weights and each.name != SAMPLE]
    layers: dict[str, str | None] = {}
    for data in parts.graphs.before_loop.values():
        graph = onnx.load_from_string(data).graph
        layers |= {name: _layer_before(name, graph) for name in inputs if any(name in n.output for n in graph.node)}
    crossing = {name for names in parts.crossing.values() for name in names}
    wanted = {
        name: (layers.get(name) or _layer_after(name, step) or name) if name in crossing else name for name in inputs
    }
    # Every other value of the graph keeps its name.
    taken = (weights | {name for node in step.node for name in node.output} | {SAMPLE}) - set(inputs)
    return _unique(wanted, taken)


def layer_of(parameter: str) -> str | None:
    """down_blocks.0.conv for network.down_blocks.0.conv.weight; None for what is not called like a parameter."""
    if not _PARAMETER.fullmatch(parameter):
        return None
    layer = parameter.removeprefix(_PREFIX)
    return layer.rpartition(".")[0] or layer


def _layer_before(name: str, graph: GraphProto) -> str | None:
    made = {output: node for node in graph.node for output in node.output}
    return _nearest([made[name]], graph, lambda node: [made[each] for each in node.input if each in made])


def _layer_after(name: str, graph: GraphProto) -> str | None:
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for each in node.input:
            readers.setdefault(each, []).append(node)
    return _nearest(
        readers.get(name, []),
        graph,
        lambda node: [reader for each in node.output for reader in readers.get(each, [])],
    )


def _nearest(start: Iterable[NodeProto], graph: GraphProto, onward: Onward) -> str | None:
    """The layer of the nearest node with parameters, by breadth."""
    weights = {tensor.name for tensor in graph.initializer}
    queue, seen = list(start), set()
    for node in queue:  # It grows while it is read.
        for name in node.input:
            if name in weights and (layer := layer_of(name)):
                return layer
        for each in onward(node):
            if each.output[0] not in seen:
                seen.add(each.output[0])
                queue.append(each)
    return None


def _unique(wanted: Mapping[str, str], taken: Iterable[str]) -> dict[str, str]:
    clean = {name: re.sub(r"[^A-Za-z0-9_.-]", "_", layer).lstrip(".-") or "input" for name, layer in wanted.items()}
    # Names become files, and some file systems have one case.
    shared = [layer.lower() for layer in clean.values()]
    used, named = {name.lower() for name in taken}, {}
    for name, layer in clean.items():
        number, candidate = 0, f"{layer}.0" if shared.count(layer.lower()) > 1 else layer
        while candidate.lower() in used:
            number += 1
            candidate = f"{layer}.{number}"
        used.add(candidate.lower())
        named[name] = candidate
    return named
