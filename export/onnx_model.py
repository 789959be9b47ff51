"""A network as an ONNX graph: sample, timestep and conditioning in, out_sample out."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from onnx import GraphProto
from torch import Tensor, nn

from skipstep.backends.torch import DenoisingModule, zero_conditioning
from skipstep.errors import ExportError, needs_packages
from skipstep.export.bundle_files import package_version
from skipstep.export.graph_writer import OPSET, serialised
from skipstep.export.large_model import lora_factors_as_inputs, take_weights_out
from skipstep.networks.graphs import BATCH
from skipstep.networks.spec import NetworkSpec

# Part of the key of cached graphs. Raise it when this module writes another graph for the same network.
_FORMAT = 4
_BEFORE_UPSAMPLING_COPIES = 63


def export_onnx(module: DenoisingModule, spec: NetworkSpec, *, batch_size: int | None = None) -> bytes:
    """Serialise `module` with torch's graph-capturing exporter, opset 20, weights included.

    `batch_size` fixes every shape; None leaves one symbolic dimension named "batch", which a runtime fixes when it
    loads the graph. Inputs: sample float32 `[N, *sample_shape]`, timestep int64 `[N]` (float32 if the network takes
    fractional ones), encoder_hidden_states float32 `[N, L, D]` and class_labels int64 `[N]` if it takes them. Output:
    out_sample float32 `[N, *output_shape]`.
    Weights of a gigabyte and more stay beside the graph (skipstep.networks.large_graph) and share the module's memory.
    Raises MissingDependencyError without onnx and onnxscript, and ExportError naming what could not be captured.
    """
    # The exporter specialises a dimension of size 1, so a symbolic one is traced at 2.
    traced = batch_size or 2
    arguments = [
        torch.zeros(traced, *spec.sample_shape),
        torch.zeros(traced, dtype=torch.float32 if spec.fractional_timesteps else torch.int64),
    ]
    conditioning = zero_conditioning(spec, traced)
    arguments += conditioning.values()
    names = ["sample", "timestep", *conditioning]
    symbols: set[str] = set()
    model: nn.Module | torch.export.ExportedProgram = module.eval()
    with quiet_exporter():
        shapes = None
        if batch_size is None:
            shapes = _batch_shapes({0: torch.export.Dim(BATCH, min=1)}, len(conditioning))
            traced_program = _traced(module, tuple(arguments), len(conditioning))
            if traced_program is not None:
                model, symbols = traced_program
        program = _export(module, model, tuple(arguments), names, None if symbols else shapes)
    lora_factors_as_inputs(program.model, dict(module.named_buffers()))
    weights = take_weights_out(program.model)
    exported = program.model_proto
    if symbols:
        _rename_batch(exported.graph, symbols)
    return serialised(exported, weights)


def _batch_shapes(batch: Any, num_conditions: int) -> Any:
    # What the module takes as *conditions is one entry of this tuple.
    return (batch, batch, *([(batch,) * num_conditions] if num_conditions else []))


def _traced(
    module: DenoisingModule, arguments: tuple[Tensor, ...], num_conditions: int
) -> tuple[torch.export.ExportedProgram, set[str]] | None:
    """The module traced with one symbol for the batch size, and that symbol; None where torch.export refuses.

    Some modules ask whether a batch is large, and give the same numbers for either answer: diffusers' upsampling makes
    its input contiguous from 64 samples on. They are traced for the sizes below, and the graph is good for all. So the
    first attempt is for less than 64: a module that asks nothing has the same graph, a UNet need not be traced again.
    """
    high = _BEFORE_UPSAMPLING_COPIES
    for _ in range(2):
        try:
            shapes = _batch_shapes({0: torch.export.Dim(BATCH, min=1, max=high)}, num_conditions)
            program = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # The exporter finds it again, and names the place.
            bound = re.search(rf"{BATCH} = Dim\('{BATCH}', max=(\d+)\)", str(error))
            if bound is None or high != _BEFORE_UPSAMPLING_COPIES:
                return None
            high = int(bound[1])
            continue
        _drop_empty_squeezes(program)
        inputs = set(program.graph_signature.user_inputs)
        leading = {str(node.meta["val"].shape[0]) for node in program.graph.nodes if node.name in inputs}
        return (program, leading) if len(leading) == 1 else None
    return None


def _drop_empty_squeezes(program: torch.export.ExportedProgram) -> None:
    """torch leaves a side as it is that is not 1; the exporter writes a Squeeze for it, which no runtime takes."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.squeeze.dim and node.meta["val"].ndim == node.args[0].meta["val"].ndim:
            node.replace_all_uses_with(node.args[0], lambda user: user.op != "output")
            if not node.users:
                program.graph.erase_node(node)
    program.graph_module.recompile()


def _rename_batch(graph: GraphProto, symbols: set[str]) -> None:
    """One name for all symbols of the batch size, also in multiples of it."""
    pattern = re.compile(rf"\b({'|'.join(sorted(symbols))})\b")
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = pattern.sub(BATCH, dim.dim_param)


def _export(
    module: DenoisingModule,
    model: nn.Module | torch.export.ExportedProgram,
    arguments: tuple[Tensor, ...],
    names: list[str],
    shapes: Any,
) -> torch.onnx.ONNXProgram:
    """Raises ExportError, naming the submodule that could not be captured or the operator that ONNX lacks."""
    with _first_failure(module.network) as stopped_in:
        try:
            program = torch.onnx.export(
                model,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=["out_sample"],
                dynamic_shapes=shapes,
                verbose=False,
            )
        except ImportError:
            raise
        except Exception as error:  # The exporter wraps whatever the traced module raised; its errors are not public.
            cause = error.__cause__ or error
            culprit = _untranslated(module, arguments, str(cause))
            where = culprit or f"{type(cause).__name__} in {stopped_in() or type(module.network).__name__}"
            raise ExportError(
                got=where + ("" if culprit else f": {_first_paragraph(cause)}"),
                expected=f"operators that ONNX opset {OPSET} can express"
                if culprit
                else "a network whose control flow does not depend on tensor values",
                remedy="use backend='torch', or rewrite the module that is named",
            ) from error
    assert program is not None, "it returns nothing only where it writes a file"
    return program


@contextlib.contextmanager
def _first_failure(network: nn.Module) -> Iterator[Callable[[], str | None]]:
    """Gives a function that names the module in which the first failed run of the network stopped."""
    running: list[str] = []
    first: list[str] = []

    def enter(name: str, outermost: bool) -> None:
        if outermost and running:  # The exporter tries again in another way.
            first.extend(running[-1:])
            running.clear()
        running.append(name)

    hooks = []
    for path, each in network.named_modules():
        name = f"{path or 'the network'} ({type(each).__name__})"
        hooks.append(each.register_forward_pre_hook(lambda *_, name=name, path=path: enter(name, not path)))
        hooks.append(each.register_forward_hook(lambda *_: running.pop() and None if running else None))
    try:
        yield lambda: next(iter(first or running[-1:]), None)
    finally:
        for hook in hooks:
            hook.remove()


def _untranslated(module: DenoisingModule, arguments: tuple[Tensor, ...], cause: str) -> str | None:
    """The operator that the exporter could not translate, and the module that calls it; None if it names none."""
    found = re.search(r"translating node %(\w+)", cause)
    if found is None:
        return None
    nodes = torch.export.export(module, arguments, strict=False).run_decompositions().graph.nodes
    for node in nodes:
        if node.name == found[1]:
            path, owner = list(node.meta.get("nn_module_stack", {"": ("", "the network")}).values())[-1]
            owner = str(getattr(owner, "__name__", owner)).rsplit(".", 1)[-1]
            return f"the operator {node.target} in {path.removeprefix('network.') or 'the network'} ({owner})"
    return f"the operator {found[1]}"


def _first_paragraph(error: BaseException) -> str:
    return str(error).strip().split("\n\n")[0].replace("\n", " ")[:500]


def exporter_versions() -> str:
    """The versions that an exported graph depends on beside the network; part of a cache key."""
    versions = {package: package_version(package) for package in ("torch", "onnx", "onnxscript", "diffusers")}
    return ", ".join([f"format {_FORMAT}", *(f"{name} {value}" for name, value in versions.items() if value)])


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """The exporter logs which optional packages it does not find (torchvision); users need not read that.

    Raises MissingDependencyError where one is not there that it needs.
    """
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        exporter = "torch's ONNX exporter with onnx and onnxscript"
        with warnings.catch_warnings(), needs_packages(exporter, remedy="pip install 'skipstep[export]'"):
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)
