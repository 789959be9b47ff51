"""Which input of somebody's .onnx file is what: the state, the timestep, and the conditions that a network may take.

What the caller says holds. Else the ecosystem's names decide, and where they do not, the only input of a fitting shape.
ADD A CONDITION HERE: a row of ROLES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from onnx import GraphProto, TensorProto, ValueInfoProto

from skipstep.calls.conditioning import LABELS, PROMPTS
from skipstep.errors import InputError, ModelFormatError, check_text, shown
from skipstep.networks.condition import Condition
from skipstep.networks.graphs import PREDICTION, SAMPLE

TIMESTEP: Final = "timestep"
_FLOATS: Final[Mapping[int, str]] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.DOUBLE: "float64",
}
_INTEGERS: Final[Mapping[int, str]] = {TensorProto.INT64: "int64", TensorProto.INT32: "int32"}


@dataclass(frozen=True, slots=True)
class FileValue:
    """An input or output as its file declares it; a dimension is a number, or None where it is not fixed."""

    name: str
    elem_type: int
    dims: tuple[int | None, ...]

    @property
    def is_float(self) -> bool:
        return self.elem_type in _FLOATS

    @property
    def is_integer(self) -> bool:
        return self.elem_type in _INTEGERS

    @property
    def one_per_sample(self) -> bool:
        """Whether it is one number, or one for each sample."""
        return all(dim == 1 for dim in self.dims[1:])

    def __str__(self) -> str:
        known = {**_FLOATS, **_INTEGERS}
        kind = known.get(self.elem_type, f"type {self.elem_type}")
        return f"{self.name} {kind} [{', '.join('?' if dim is None else str(dim) for dim in self.dims)}]"


@dataclass(frozen=True, slots=True)
class Role:
    """What the engine gives a network. `names`: what exporters call it; `fits`: the inputs that can be it."""

    name: str
    names: tuple[str, ...]
    fits: Callable[[FileValue], bool]
    words: str
    required: bool = False


ROLES: Final = (
    Role(
        SAMPLE,
        ("sample", "x", "x_t", "noisy", "noisy_sample", "noisy_image", "latent", "latents", "latent_model_input"),
        lambda value: value.is_float and len(value.dims) == 4 and not value.one_per_sample,
        "the noisy state, float [batch, channels, height, width]",
        required=True,
    ),
    Role(
        TIMESTEP,
        ("timestep", "timesteps", "t", "time", "time_step", "step", "sigma", "noise_level"),
        lambda value: (value.is_float or value.is_integer) and value.one_per_sample,
        "the timestep, a number or one for each sample",
        required=True,
    ),
    Role(
        PROMPTS,
        ("encoder_hidden_states", "prompt_embeds", "text_embeddings", "context"),
        lambda value: value.is_float and len(value.dims) == 3,
        "prompt embeddings, float [batch, tokens, width]",
    ),
    Role(
        LABELS,
        ("class_labels", "class_label", "labels", "label", "y"),
        lambda value: value.is_integer and len(value.dims) == 1,
        "class labels, int [batch]",
    ),
)
_OUTPUTS = (PREDICTION, "sample", "noise_pred", "model_output", "output", "prediction")


def declared(values: Sequence[ValueInfoProto]) -> list[FileValue]:
    return [
        FileValue(
            value.name,
            value.type.tensor_type.elem_type,
            tuple(
                dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None
                for dim in value.type.tensor_type.shape.dim
            ),
        )
        for value in values
    ]


def free_inputs(graph: GraphProto) -> list[FileValue]:
    """The inputs that have no value of their own."""
    weights = {each.name for each in graph.initializer}
    return declared([each for each in graph.input if each.name not in weights])


def check_names(inputs: object) -> dict[str, str]:
    """The caller's names by role. Raises InputError."""
    if inputs is None:
        return {}
    known = (*(role.name for role in ROLES), PREDICTION)
    remedy = "pass e.g. inputs={'sample': 'noisy', 'timestep': 'sigma'}"
    if not isinstance(inputs, Mapping) or not all(isinstance(key, str) and key in known for key in inputs):
        raise InputError(got=f"inputs={shown(inputs)}", expected=f"names by {', '.join(known)}", remedy=remedy)
    return {key: check_text("inputs", name) for key, name in inputs.items()}


def assign_roles(found: Sequence[FileValue], said: Mapping[str, str]) -> tuple[dict[str, FileValue], list[str]]:
    """The input of each role, and what of that was guessed, in words. Inputs that are left are conditions.

    Raises InputError for names that are not there or do not fit, ModelFormatError where a role stays open.
    """
    by_name = {each.name: each for each in found}
    listed = ", ".join(map(str, found)) or "none"
    chosen: dict[str, FileValue] = {}
    guessed: list[str] = []
    for role in ROLES:
        name = said.get(role.name)
        if name is None:
            continue
        if name not in by_name or not role.fits(by_name[name]):
            raise InputError(
                got=f"inputs={{{role.name!r}: {name!r}}} for a network with the inputs {listed}",
                expected=role.words,
                remedy=f"name another input as {role.name!r}, or leave it out",
            )
        chosen[role.name] = by_name[name]
    for by_shape in (False, True):
        for role in ROLES:
            if role.name in chosen:
                continue
            taken = {each.name for each in chosen.values()}
            fitting = [each for each in found if each.name not in taken and role.fits(each)]
            named = [each for each in fitting if each.name.lower() in role.names]
            exact = [each for each in named if each.name == role.name]
            candidates = exact or named or (fitting if by_shape else [])
            if len(candidates) > 1:
                raise ModelFormatError(
                    got=f"a network with several inputs that may be {role.name!r}: {', '.join(map(str, candidates))}",
                    expected=role.words,
                    remedy=f"say which it is: inputs={{{role.name!r}: {candidates[0].name!r}}}",
                )
            if candidates:
                chosen[role.name] = candidates[0]
                if candidates[0].name != role.name:
                    reason = "its name" if named else "its shape"
                    guessed.append(f"{role.name} is {candidates[0].name!r}, by {reason}")
            elif by_shape and role.required:
                raise _lacks(role, listed, found)
    return chosen, guessed


def further_conditions(
    found: Sequence[FileValue], chosen: Mapping[str, FileValue], said: Mapping[str, Condition]
) -> tuple[dict[str, Condition], list[str]]:
    """The conditions that the other inputs of the file are, by its own names, and what of that was guessed, in words.

    Raises InputError for a condition that the file does not read, ModelFormatError where a shape is open.
    """
    further = {each.name: each for each in found if each not in chosen.values()}
    for name, condition in said.items():
        if name not in further or condition.concat_to_state:
            raise InputError(
                got=f"the condition {name!r}, {condition}, for a network that also reads "
                f"{', '.join(further) or 'nothing'}",
                expected="one of these, without concat_to_state: the file's own input is the condition",
                remedy="name the condition as the file's input, or leave it out",
            )
    conditions, guessed = {}, []
    for name, value in further.items():
        if name in said:
            conditions[name] = said[name]
            continue
        dtype = "float32" if value.is_float else "int64" if value.is_integer else "bool"
        if None in value.dims[1:] or not (value.is_float or value.is_integer or value.elem_type == TensorProto.BOOL):
            raise ModelFormatError(
                got=f"a network that also reads {value}",
                expected="an input of a known shape, of floats, integers or truth values",
                remedy=f"pass conditions={{{name!r}: Condition(shape)}}, or export it again with that as a constant",
            )
        shape = tuple(dim for dim in value.dims[1:] if dim is not None)
        shape = () if value.one_per_sample else shape
        conditions[name] = Condition(shape, dtype, null="same")  # type: ignore[arg-type]
        guessed.append(f"{name!r} is a condition of shape {shape}, the same in both halves of guidance")
    return conditions, guessed


def _lacks(role: Role, listed: str, found: Sequence[FileValue]) -> ModelFormatError:
    return ModelFormatError(
        got=f"a network without an input that can be {role.name!r}; it has {listed}",
        expected=role.words,
        remedy=f"export the network again with {role.words} as an input named {role.name!r}",
    )


def choose_output(found: Sequence[FileValue], said: str | None, sample: FileValue) -> FileValue:
    """The prediction among a graph's outputs. Raises InputError, ModelFormatError."""
    listed = ", ".join(map(str, found))
    if said is not None:
        for each in found:
            if each.name == said:
                return each
        raise InputError(
            got=f"inputs={{{PREDICTION!r}: {said!r}}} for a network with the outputs {listed}",
            expected="one of them",
            remedy="name another, or leave it out",
        )
    named = [each for name in _OUTPUTS for each in found if each.name == name]
    alike = [each for each in found if each.is_float and len(each.dims) == len(sample.dims)]
    if len(found) == 1 or named or len(alike) == 1:
        return found[0] if len(found) == 1 else (named or alike)[0]
    raise ModelFormatError(
        got=f"a network with several outputs that may be the prediction: {listed}",
        expected="one prediction of the sample's shape",
        remedy=f"say which it is: inputs={{{PREDICTION!r}: {found[0].name!r}}}",
    )
