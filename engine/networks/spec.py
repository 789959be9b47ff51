"""What a sampling loop must know of a network: the shape that it denoises and the conditions that it takes.

out = network(x_t [N, *sample_shape], timestep [N], condition [N, …], condition [N, …], …)

A network is a state, a time and named conditions. out has the shape of x_t, or 2C channels, of which the second half
says where the variance of the step lies (learned_range).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Final

import numpy as np

from skipstep.errors import (
    InputError,
    PlanError,
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_text,
    shown,
)
from skipstep.networks.condition import MAX_RANK, Condition, Side, check_shape
from skipstep.networks.families import (
    check_module,
    classes_in_table,
    config_conditions,
    prompt_width,
    state_shape,
    takes_fractional_timesteps,
)
from skipstep.plans.parameterization import STATES, TIME_INPUTS, State, TimeInput, state_scale
from skipstep.storage.untrusted import ADDED_LATER, Length, Within

if TYPE_CHECKING:
    from skipstep.plans.plan import Plan

MAX_BATCH_SIZE: Final = 4096
_MAX_LABEL: Final = 1 << 31
_MAX_CONDITIONS: Final = 64
LABELS: Final = "class_labels"
PROMPTS: Final = "encoder_hidden_states"
# What the graphs of a network call its state, its time and its prediction.
_OWN_NAMES: Final = ("sample", "timestep", "out_sample")
Label = Annotated[int, Within(0, _MAX_LABEL)]


@dataclass(frozen=True)
class NetworkSpec:
    """`sample_shape` is the state's without the batch, channels first: (C, H, W) of images, (C, L) of sequences,
    (C, F, H, W) of videos. `num_classes` counts the real classes; None: the network takes no labels.

    `null_label` is the label that stands for "no class", which classifier-free guidance needs, or None.
    `fractional_timesteps`: it takes timesteps between those of its training, as float32; otherwise int64 alone.
    `learns_variance`: its output has 2C channels; C is the first side.
    `prompt_shape` is (L, D), tokens by width, of the prompt embeddings that it attends to; None: it takes none.
    `conditions` are its other conditions by the names of the network's arguments, in their order.
    `time_input` is what it is told of a noise level, and `state` what it reads of a noised sample: "vp", "ve", "edm" or
    "flow" (skipstep.plans.parameterization). `sigma_data` is of "edm", 0.5 where it is left out.
    Raises InputError where these contradict each other.
    """

    sample_shape: Annotated[tuple[Side, ...], Length(1, MAX_RANK)]
    num_classes: Label | None = None
    null_label: Label | None = None
    class_names: tuple[str, ...] | None = None
    fractional_timesteps: bool = False
    learns_variance: bool = False
    prompt_shape: tuple[Side, Side] | None = None
    conditions: Annotated[Mapping[str, Condition], ADDED_LATER] = field(default_factory=dict, hash=False)
    time_input: Annotated[TimeInput, ADDED_LATER] = "timestep"
    state: Annotated[State, ADDED_LATER] = "vp"
    sigma_data: Annotated[float | None, ADDED_LATER] = None

    def __post_init__(self) -> None:
        remedy = "pass sample_shape=(channels, height, width), e.g. (3, 32, 32), or another state's, e.g. (2, 1024)"
        sides = check_shape("sample_shape", self.sample_shape, low=1, remedy=remedy)
        object.__setattr__(self, "sample_shape", sides)
        if self.prompt_shape is not None:
            remedy = "pass prompt_shape=(tokens, width) of a prompt's embeddings, e.g. (77, 768)"
            sides = check_shape("prompt_shape", self.prompt_shape, low=2, high=2, remedy=remedy)
            object.__setattr__(self, "prompt_shape", sides)
        for name in ("num_classes", "null_label"):
            number = getattr(self, name)
            if number is not None:
                remedy = "pass the numbers that the network was trained with"
                object.__setattr__(self, name, check_integer(name, number, low=0, high=_MAX_LABEL, remedy=remedy))
        for name in ("fractional_timesteps", "learns_variance"):
            check_flag(name, getattr(self, name))
        if self.class_names is not None:
            if not isinstance(self.class_names, tuple | list):
                raise InputError(
                    got=f"class_names={shown(self.class_names)}", expected="a tuple of texts", remedy="leave it out"
                )
            names = tuple(check_text("class_names", each) for each in self.class_names)
            object.__setattr__(self, "class_names", names)
        if self.num_classes is None:
            if self.null_label is not None:
                raise InputError(
                    got=f"null_label={self.null_label} for a network without classes",
                    expected="num_classes beside it",
                    remedy="pass num_classes, or leave null_label out",
                )
        elif self.num_classes < 1:
            raise InputError(
                got=f"num_classes={self.num_classes}",
                expected="at least one class",
                remedy="pass the numbers that the network was trained with",
            )
        self._check_time()
        self._check_conditions()

    def _check_time(self) -> None:
        remedy = "pass what the network was trained with"
        check_choice("time_input", self.time_input, TIME_INPUTS, remedy=remedy)
        check_choice("state", self.state, STATES, remedy=remedy)
        if self.state != "vp" and self.time_input == "timestep":
            raise InputError(
                got=f"state={self.state!r} with time_input='timestep'",
                expected=f"a time input that tells the noise level: {', '.join(TIME_INPUTS[1:])}",
                remedy="pass time_input='sigma', or what the network takes",
            )
        if self.state == "edm":
            given = 0.5 if self.sigma_data is None else self.sigma_data
            sigma_data = check_number("sigma_data", given, low=0.0, above=True, remedy=remedy)
            object.__setattr__(self, "sigma_data", sigma_data)
        elif self.sigma_data is not None:
            raise InputError(
                got=f"sigma_data={shown(self.sigma_data)} with state={self.state!r}",
                expected="state='edm' beside it",
                remedy="leave sigma_data out",
            )
        if self.time_input != "timestep":
            object.__setattr__(self, "fractional_timesteps", True)

    def _check_conditions(self) -> None:
        given = check_conditions(self.conditions)
        taken = {*_OWN_NAMES, *([LABELS] if self.num_classes else []), *([PROMPTS] if self.prompt_shape else [])}
        for name, condition in given.items():
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name) or name in taken:
                raise InputError(
                    got=f"a condition called {shown(name)}",
                    expected=f"the name of an argument of the network, other than {', '.join(sorted(taken))}",
                    remedy="use the argument's name; num_classes and prompt_shape describe labels and prompts",
                )
            if condition.concat_to_state and condition.shape[1:] != self.sample_shape[1:]:
                raise InputError(
                    got=f"conditions[{name!r}] of shape {condition.shape}, concatenated to {self.sample_shape}",
                    expected=f"(channels, {', '.join(map(str, self.sample_shape[1:]))})",
                    remedy="resize it: only the number of channels may differ",
                )
        object.__setattr__(self, "conditions", dict(given))

    @cached_property
    def all_conditions(self) -> Mapping[str, Condition]:
        """Everything that the network takes beside state and time, in the order of its arguments."""
        found: dict[str, Condition] = {}
        if self.prompt_shape is not None:
            found[PROMPTS] = Condition(self.prompt_shape)
        if self.num_classes is not None:
            found[LABELS] = Condition((), "int64", "same" if self.null_label is None else self.null_label)
        return found | dict(self.conditions)

    @cached_property
    def passed_conditions(self) -> Mapping[str, Condition]:
        """Those of which the caller passes arrays: not labels, and not what follows from the guidance scale."""
        labels = LABELS if self.num_classes is not None else None
        return {
            name: each for name, each in self.all_conditions.items() if name != labels and each.from_guidance is None
        }

    @cached_property
    def takes_guidance(self) -> bool:
        """Whether the guidance scale is one of its inputs: it is evaluated once for any scale."""
        return any(each.from_guidance for each in self.all_conditions.values())

    @property
    def described_conditions(self) -> list[str]:
        """What it takes, in words."""
        takes = ["prompts of {}×{}".format(*self.prompt_shape)] if self.prompt_shape is not None else []
        takes += [f"{self.num_classes} classes"] if self.num_classes is not None else []
        takes += [f"{name} {'×'.join(map(str, each.shape))}".strip() for name, each in self.conditions.items()]
        return takes

    @property
    def num_elements(self) -> int:
        """Of one sample."""
        return math.prod(self.sample_shape)

    @property
    def output_shape(self) -> tuple[int, ...]:
        channels, *sides = self.sample_shape
        return (2 * channels if self.learns_variance else channels), *sides

    @property
    def can_guide(self) -> bool:
        """Whether it can predict with and without its conditions, as classifier-free guidance needs."""
        return not self.takes_guidance and any(each.null != "same" for each in self.all_conditions.values())

    @property
    def timestep_dtype(self) -> type[np.float32] | type[np.int64]:
        return np.float32 if self.fractional_timesteps else np.int64

    @classmethod
    def of_module(
        cls,
        module: Any,
        *,
        sample_shape: tuple[int, ...] | None = None,
        num_classes: int | None = None,
        null_label: int | None = None,
        prompt_shape: tuple[int, int] | None = None,
        fractional_timesteps: bool | None = None,
        conditions: Mapping[str, Condition] | None = None,
        time_input: TimeInput = "timestep",
        state: State = "vp",
        sigma_data: float | None = None,
    ) -> "NetworkSpec":
        """Complete the arguments from a diffusers-style `module.config`.

        Raises InputError if something is still missing, ModelFormatError for a transformer that takes other inputs.
        """
        check_module(module)
        config, name = getattr(module, "config", None), type(module).__name__
        conditions = config_conditions(config, check_conditions(conditions), module)
        if sample_shape is None:
            sample_shape = state_shape(config, name, conditions)
        if sample_shape is None:
            raise InputError(
                got=f"a {name} without a config that holds in_channels and sample_size",
                expected="the shape of one sample",
                remedy="pass sample_shape=(channels, height, width), or another state's",
            )
        if num_classes is None and LABELS not in conditions:
            embedded, null = classes_in_table(config)
            if embedded is not None:
                embedded = check_integer("num_class_embeds", embedded, low=1)
                null_label = null if null_label is None else null_label
                # A null label inside the table is not one of the classes.
                inside = null_label is not None and check_integer("null_label", null_label, low=0) < embedded
                num_classes = embedded - inside
        if fractional_timesteps is None:
            fractional_timesteps = takes_fractional_timesteps(config)
        width = prompt_width(config)
        if prompt_shape is None and width is not None and PROMPTS not in conditions:
            raise InputError(
                got=f"a {type(module).__name__} that attends to prompts of an unknown number of tokens",
                expected="the shape of one prompt's embeddings",
                remedy=f"pass prompt_shape=(77, {width}), with its text encoder's token count",
            )
        return cls(
            sample_shape,
            num_classes,
            null_label,
            fractional_timesteps=fractional_timesteps,
            prompt_shape=prompt_shape,
            conditions=conditions,
            time_input=time_input,
            state=state,
            sigma_data=sigma_data,
        )


def check_conditions(given: Any) -> Mapping[str, Condition]:
    """The conditions by name; None stands for none of them. Raises InputError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or len(given) > _MAX_CONDITIONS:
        raise InputError(
            got=f"conditions={shown(given)}",
            expected=f"at most {_MAX_CONDITIONS} Conditions by name",
            remedy="pass conditions={'text_embeds': Condition((1280,))}",
        )
    for name, condition in given.items():
        if not isinstance(name, str) or not isinstance(condition, Condition):
            raise InputError(
                got=f"conditions with {shown(name)}: {shown(condition)}",
                expected="names, and a skipstep.Condition for each",
                remedy="pass conditions={'text_embeds': Condition((1280,))}",
            )
    return given


def network_state_scale(network: NetworkSpec, time: Any, *, of: Any = np) -> Any:
    """What it reads, against a plan's state, at its time inputs (skipstep.plans.parameterization)."""
    return state_scale(time, state=network.state, time_input=network.time_input, sigma_data=network.sigma_data, of=of)


def check_plan_fits(plan: "Plan", network: NetworkSpec) -> None:
    """Raise PlanError for a plan that needs what the network does not offer."""
    if plan.time_input != network.time_input:
        raise PlanError(
            got=f"{plan!r} for time_input={plan.time_input!r}",
            expected=f"time_input={network.time_input!r}, which this network takes",
            remedy=f"make the plan with time_input={network.time_input!r}",
        )
    if plan.is_fractional and not network.fractional_timesteps:
        first = float(plan.evaluation_timesteps[plan.evaluation_timesteps % 1.0 != 0.0][0])
        raise PlanError(
            got=f"fractional timesteps, {first}, from {plan!r}",
            expected="integers: this network takes no others",
            remedy="pass midpoints='nearest' to the plan, or fractional_timesteps=True when building the engine",
        )
    if plan.learns_variance and not network.learns_variance:
        raise PlanError(
            got=f"{plan!r} for a network with {network.sample_shape[0]} output channels",
            expected=f"{2 * network.sample_shape[0]}: a prediction, and where its variance lies",
            remedy="use variance='fixed_small' or 'fixed_large'",
        )


def network_batch_sizes(network: NetworkSpec, batch_sizes: Iterable[int]) -> list[int]:
    """The network's own batch sizes for these numbers of samples: guidance evaluates it on twice as many."""
    return sorted({copies * size for size in batch_sizes for copies in ((1, 2) if network.can_guide else (1,))})
