"""An existing .onnx file as a network: the graph under our names, and what the sampling loop must know of it.

file -> read and checked -> which input is what -> any batch, a timestep for each sample -> float32 outside -> partition

The graph is the one that skipstep.export.onnx_model writes for a module: inputs sample, timestep, encoder_hidden_states
and class_labels, output out_sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, TensorProto, helper
from onnxscript import optimizer

from skipstep.backends.onnx_file import FileInput
from skipstep.calls.conditioning import LABELS, PROMPTS
from skipstep.errors import InputError, ModelFormatError, check_flag
from skipstep.export.graph_writer import rename_graph, serialised
from skipstep.export.onnx_batch import Shapes, free_batch, free_timestep, infer_at, settled
from skipstep.export.onnx_reading import modernised, read_onnx_model
from skipstep.export.onnx_roles import (
    TIMESTEP,
    FileValue,
    assign_roles,
    check_names,
    choose_output,
    declared,
    free_inputs,
    further_conditions,
)
from skipstep.export.onnx_state import SCALED, scaled_state
from skipstep.networks.condition import Condition
from skipstep.networks.graphs import BATCH, PREDICTION, SAMPLE
from skipstep.networks.spec import NetworkSpec, check_conditions

_ELEMENTS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}
_INSIDE = "file/"  # Before every name of the file's, so that none is one of ours.


@dataclass(frozen=True, slots=True)
class OnnxNetwork:
    """A file that was read. `graph` has our names; `guessed` says in words what was guessed.

    `original` is the file's own graph with its weights; `inputs` and `output` say how it is called. `half_precision`:
    some of its weights are float16 or bfloat16, and so is what is computed with them.
    """

    spec: NetworkSpec
    graph: bytes
    digest: str
    guessed: tuple[str, ...]
    original: bytes
    half_precision: bool
    inputs: tuple[FileInput, ...]
    output: str


def read_onnx(
    path: Path,
    *,
    inputs: object = None,
    config: Mapping[str, Any] | None = None,
    sample_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    null_label: int | None = None,
    prompt_shape: tuple[int, int] | None = None,
    fractional_timesteps: bool | None = None,
    conditions: Mapping[str, Condition] | None = None,
    **time: Any,
) -> OnnxNetwork:
    """Read `path`. `inputs` are names of the file by ours; `config` is the network's diffusers configuration, where one
    is known. What is left out is taken from the file.

    Raises ModelFormatError, IntegrityError and InputError.
    """
    said = check_names(inputs)
    model = read_onnx_model(path)
    found = free_inputs(model.graph)
    roles, guessed = assign_roles(found, said)
    others, further = further_conditions(found, roles, check_conditions(conditions))
    guessed += further
    by_name = {each.name: each for each in found}
    output = choose_output(declared(model.graph.output), said.get(PREDICTION), roles[SAMPLE])
    shape = _shape(roles[SAMPLE], sample_shape, _configured_shape(config), "sample_shape", "(4, 64, 64)")
    prompts = None
    if PROMPTS in roles:
        width = roles[PROMPTS].dims[2] or (config or {}).get("cross_attention_dim")
        prompts = _shape(roles[PROMPTS], prompt_shape, None, "prompt_shape", f"(77, {width or 768})")
    elif prompt_shape is not None:
        raise _not_taken("prompt_shape", PROMPTS)
    original = serialised(model)
    if LABELS in roles and num_classes is None:
        num_classes = _table_rows(model, roles[LABELS].name)
        if num_classes is None:
            raise ModelFormatError(
                got=f"a network that takes {LABELS!r} of unknown number",
                expected="how many classes there are",
                remedy="pass num_classes=, and null_label= where one of the labels stands for none",
            )
        guessed.append(f"{num_classes} labels, the rows of the table that they are looked up in")
        num_classes -= null_label is not None and 0 <= null_label < num_classes
    elif LABELS not in roles and num_classes is not None:
        raise _not_taken("num_classes", LABELS)
    takes_fractions = roles[TIMESTEP].is_float
    if fractional_timesteps is not None:
        check_flag("fractional_timesteps", fractional_timesteps)
        if fractional_timesteps and not takes_fractions:
            raise InputError(
                got=f"fractional_timesteps=True for a network that takes {roles[TIMESTEP]}",
                expected="a timestep in floating point",
                remedy="leave fractional_timesteps out",
            )
        takes_fractions = fractional_timesteps
    if not takes_fractions and time.get("time_input", "timestep") != "timestep":
        raise InputError(
            got=f"time_input={time['time_input']!r} for a network that takes {roles[TIMESTEP]}",
            expected="a time in floating point",
            remedy="leave time_input out",
        )
    spec = NetworkSpec(
        shape,
        num_classes,
        null_label,
        fractional_timesteps=takes_fractions,
        prompt_shape=prompts,
        conditions=others,
        **time,
    )
    batch = roles[SAMPLE].dims[0]
    roles |= {name: by_name[name] for name in others}
    graph, channels = _standard(modernised(model, path), roles, output.name, spec, batch)
    if channels != spec.sample_shape[0]:
        spec = replace(spec, learns_variance=True)
    called = tuple(
        FileInput(role, each.name, each.elem_type, len(each.dims), (each.dims[:1] or (None,))[0] or 1)
        for role, each in roles.items()
    )
    digest = hashlib.sha256(graph).hexdigest()
    return OnnxNetwork(spec, graph, digest, tuple(guessed), original, _is_half(model), called, output.name)


def _shape(value: FileValue, said: Any, configured: Any, option: str, example: str) -> Any:
    """All dimensions of one sample's input, from the file, from the caller, from its configuration."""
    fixed = value.dims[1:]
    for source, what in ((said, option), (configured, "its config.json")):
        if source is None:
            continue
        if not isinstance(source, tuple | list) or len(source) != len(fixed):
            return source  # NetworkSpec says what is wrong.
        if any(own is not None and own != other for own, other in zip(fixed, source, strict=True)):
            raise InputError(
                got=f"{what} {tuple(source)} for a network that takes {value}",
                expected="the shape that the file fixes",
                remedy=f"leave {option} out"
                if what == option
                else "remove config.json, or use the one of this network",
            )
        return tuple(source)
    if None in fixed:
        raise ModelFormatError(
            got=f"a network that takes {value}, whose size is not fixed",
            expected="the shape of one sample, for which the engine is compiled",
            remedy=f"pass {option}, e.g. {option}={example}",
        )
    return fixed


def _configured_shape(config: Mapping[str, Any] | None) -> tuple[int, int, int] | None:
    channels, size = (None, None) if config is None else (config.get("in_channels"), config.get("sample_size"))
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(isinstance(each, int) for each in (channels, *sides)):
        return None
    return channels, *sides  # type: ignore[return-value]


def _is_half(model: ModelProto) -> bool:
    return any(each.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for each in model.graph.initializer)


def _not_taken(option: str, role: str) -> InputError:
    return InputError(
        got=f"{option}= for a network without an input that was taken for {role!r}",
        expected=f"one that takes {role!r}",
        remedy=f"leave {option} out",
    )


def _table_rows(model: ModelProto, labels: str) -> int | None:
    """The rows of the table that labels are looked up in, None where they are used otherwise."""
    weights = {each.name: each for each in model.graph.initializer}
    same = {labels}
    for node in model.graph.node:
        if node.op_type in ("Identity", "Cast") and node.input[0] in same:
            same.add(node.output[0])
        if node.op_type == "Gather" and node.input[1] in same and node.input[0] in weights:
            return int(weights[node.input[0]].dims[0])
    return None


def _standard(
    model: ModelProto, roles: Mapping[str, FileValue], output: str, spec: NetworkSpec, batch: int | None
) -> tuple[bytes, int]:
    """The graph under our names, for any batch, and the channels of its prediction."""
    try:
        model = optimizer.optimize(model)
        ranks = {name: len(dims) for name, dims in infer_at(model).items()}
    except Exception as error:  # The optimizer infers types, too, and raises what it comes across.
        raise ModelFormatError(
            got=f"a graph whose types do not fit: {str(error).splitlines()[0]:.300}",
            expected="a valid network",
            remedy="export the network again; onnx.checker.check_model(path, full_check=True) says what is wrong",
        ) from error
    try:
        if batch is not None:
            free_batch(model, batch, [each.name for each in roles.values()])
        for_all = None if roles[TIMESTEP].dims else free_timestep(model, roles[TIMESTEP].name, ranks)
        if for_all is not None:
            raise ModelFormatError(
                got=f"a network whose {roles[TIMESTEP]} is one number for all samples, in its operator {for_all}",
                expected="a timestep for each sample of a batch",
                remedy="export the network again with a timestep of shape [batch]",
            )
        _set_interface(model, roles, output, spec)
        model, shapes = settled(model, optimizer.optimize)
    except onnx.shape_inference.InferenceError as error:
        raise _fixed_batch(roles, batch, str(error).splitlines()[0]) from error
    predicted = shapes.get(PREDICTION, [])
    channels, *sides = spec.sample_shape
    fitting = ([channels, *sides], [2 * channels, *sides])
    if predicted[:1] != [BATCH] or predicted[1:] not in fitting:
        if predicted[1:] in fitting:
            raise _fixed_batch(roles, batch, f"its prediction is {predicted} for any batch")
        raise ModelFormatError(
            got=f"a network that predicts {predicted or 'an unknown shape'} for {[BATCH, *spec.sample_shape]}",
            expected="a prediction of the sample's shape, or with twice its channels where the variance is learned",
            remedy="check which output is the prediction: inputs={'out_sample': 'NAME'}",
        )
    _write_shapes(model, shapes)
    return serialised(model), int(predicted[1])  # type: ignore[arg-type]


def _fixed_batch(roles: Mapping[str, FileValue], batch: int | None, why: str) -> ModelFormatError:
    axes = ", ".join(f"{each.name!r}: {{0: 'batch'}}" for each in roles.values())
    fixed = "a batch" if batch is None else f"its batch of {batch}"
    return ModelFormatError(
        got=f"a network that fixes {fixed} in a way that cannot be taken out of it ({why:.200})",
        expected="a graph for any batch",
        remedy=f"export the network again with dynamic_axes={{{axes}}}",
    )


def _set_interface(model: ModelProto, roles: Mapping[str, FileValue], output: str, spec: NetworkSpec) -> None:
    """Give the graph our inputs and output, in float32 and int64, before and after those of the file."""
    graph = model.graph
    rename_graph(graph, lambda name: name and _INSIDE + name)
    del graph.value_info[:]
    ours: dict[str, tuple[int, tuple[int, ...]]] = {
        SAMPLE: (TensorProto.FLOAT, spec.sample_shape),
        TIMESTEP: (TensorProto.FLOAT if spec.fractional_timesteps else TensorProto.INT64, ()),
    }
    ours |= {name: (_ELEMENTS[each.dtype], each.shape) for name, each in spec.all_conditions.items()}
    before = scaled_state(graph, spec)
    for role, (_, shape) in ours.items():
        value, inner = roles[role], _INSIDE + roles[role].name
        given = SCALED if role == SAMPLE and before else role
        if len(value.dims) > 1 + len(shape):
            axes = f"{role}/axes"
            trailing = list(range(1, len(value.dims)))
            graph.initializer.append(helper.make_tensor(axes, TensorProto.INT64, [len(trailing)], trailing))
            before.append(helper.make_node("Unsqueeze", [role, axes], [f"{role}/wide"], name=f"{role}/wide"))
            given = f"{role}/wide"
        before.append(helper.make_node("Cast", [given], [inner], name=inner, to=value.elem_type))
    inner = _INSIDE + output
    nodes = [
        *before,
        *graph.node,
        helper.make_node("Cast", [inner], [PREDICTION], name=PREDICTION, to=TensorProto.FLOAT),
    ]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.input.extend(
        helper.make_tensor_value_info(role, elem_type, [BATCH, *shape]) for role, (elem_type, shape) in ours.items()
    )
    graph.output.append(helper.make_tensor_value_info(PREDICTION, TensorProto.FLOAT, None))


def _write_shapes(model: ModelProto, shapes: Shapes) -> None:
    """Declare what was inferred: the partition moves a value only where it knows that it has a row for each sample."""
    graph = model.graph
    typed = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed.value_info, *typed.output)}
    made = {name for node in graph.node for name in node.output if name}
    graph.output[0].CopyFrom(helper.make_tensor_value_info(PREDICTION, TensorProto.FLOAT, shapes[PREDICTION]))
    del graph.value_info[:]
    graph.value_info.extend(
        helper.make_tensor_value_info(name, types[name], dims)
        for name, dims in shapes.items()
        if name in made and name != PREDICTION and types.get(name)
    )
