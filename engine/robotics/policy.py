"""A policy engine: observations in, actions out.

observations ─▶ normalise, encode (one graph) ─▶ global_cond ─▶ engine.sample ─▶ unnormalise ─▶ actions
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, Unpack

import numpy as np

from skipstep.arrays import float32, host_floats
from skipstep.delegates import Later
from skipstep.engine import Engine
from skipstep.errors import EngineStateError, InputError, check_type, needs_packages
from skipstep.loops.runner import SampleArguments
from skipstep.robotics.features import Array, PolicySpec

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from skipstep.robotics import bundle
else:
    bundle = Later("skipstep.robotics.bundle")

CONDITION: Final = "global_cond"
FEATURES: Final = "features"


class PolicyEngine:
    """An engine for chunks of actions, with the encoder of its observations and the statistics of its data set.

    Made by `from_policy` or `load_policy`. `engine` draws normalised chunks, `spec` names the features and the times.
    `graph`: the encoder as ONNX; ONNX Runtime runs it on the CPU, wherever the engine is.
    """

    save = bundle.save

    def __init__(self, engine: Engine, spec: PolicySpec, graph: bytes) -> None:
        check_type("engine", engine, Engine, remedy="make policy engines with from_policy or load_policy")
        check_type("spec", spec, PolicySpec, remedy="make policy engines with from_policy or load_policy")
        check_type("graph", graph, bytes, remedy="make policy engines with from_policy or load_policy")
        shape, expected = engine.network.sample_shape, (spec.horizon, *spec.action.shape)
        if shape != expected or tuple(engine.network.all_conditions) != (CONDITION,):
            raise InputError(
                got=f"an engine of {shape} with the conditions {tuple(engine.network.all_conditions)}",
                expected=f"one of {expected}, (horizon, action), with {CONDITION} alone",
                remedy="make policy engines with from_policy or load_policy",
            )
        self.engine, self.spec, self.graph = engine, spec, graph
        self._session = _encoder(graph, engine.num_threads)
        width = engine.network.all_conditions[CONDITION].shape
        found = {each.name for each in self._session.get_inputs()}, tuple(self._session.get_outputs()[0].shape[1:])
        if found != ({each.name for each in spec.observations}, width):
            raise InputError(
                got=f"an encoder of {sorted(found[0])!r:.200} that gives {found[1]}",
                expected=f"one of {sorted(each.name for each in spec.observations)!r:.200} that gives {width}",
                remedy="make policy engines with from_policy or load_policy",
            )

    def encode(self, observations: Mapping[str, Any]) -> Array:
        """global_cond `[B, D]` of observations `[B, n_obs_steps, *shape]` by name, as the data set has them: images
        are channels first, in [0, 1]. Raises InputError."""
        from skipstep.backends.onnxruntime import run_session

        given = self.spec.checked(observations, lead=("batch", "n_obs_steps"))
        return float32(run_session(self._session, [FEATURES], given)[FEATURES])

    def sample(
        self,
        observations: Mapping[str, Any] | None = None,
        *,
        global_cond: Any = None,
        **arguments: Unpack[SampleArguments],
    ) -> Array:
        """Normalised chunks `[B, horizon, A]` for `observations`, or for what `encode` gave for them.

        arguments: steps, plan, deadline_ms, seeds, x_T and so on: skipstep.Engine.sample. Raises what that raises.
        """
        if (observations is None) == (global_cond is None) or "conditions" in arguments:
            raise InputError(
                got="neither or both of observations and global_cond, or conditions=",
                expected="one of observations and global_cond",
                remedy="pass observations",
            )
        condition = self.encode(observations) if observations is not None else global_cond
        arguments["conditions"] = {CONDITION: condition}
        drawn: Array = self.engine.sample(**arguments)
        return drawn

    def predict(self, observations: Mapping[str, Any], **arguments: Unpack[SampleArguments]) -> Array:
        """The actions `[B, n_action_steps, A]` to carry out from now on, in the data set's units."""
        return self.actions(self.sample(observations, **arguments))

    def actions(self, chunks: Any, *, n_action_steps: int | None = None) -> Array:
        """Of normalised chunks `[B, horizon, A]` the actions from now on, in the data set's units."""
        count = self.spec.n_action_steps if n_action_steps is None else self.spec.check_action_steps(n_action_steps)
        chunks = float32(host_floats("chunks", chunks))
        if chunks.ndim != 3 or chunks.shape[1:] != self.engine.network.sample_shape:
            raise InputError(
                got=f"chunks of shape {chunks.shape}",
                expected=f"[batch, {', '.join(map(str, self.engine.network.sample_shape))}]",
                remedy="pass what sample() returned",
            )
        start, normalisation = self.spec.first_action, self.spec.action.normalisation
        kept = chunks[:, start : start + count]
        with np.errstate(over="ignore", invalid="ignore"):
            return kept.copy() if normalisation is None else normalisation.undone(kept)

    def close(self) -> None:
        """Release memory and threads. Later calls raise EngineStateError."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise EngineStateError(
            got="a policy engine to be pickled or copied",
            expected="one in each process: it holds threads and a runtime's session",
            remedy="save it with policy.save(path, license=...) and call load_policy(path) in the other process",
        )


def _encoder(graph: bytes, num_threads: int | None) -> InferenceSession:
    with needs_packages("onnxruntime, which encodes observations", remedy="pip install 'skipstep[cpu]'"):
        from skipstep.backends.onnxruntime import make_session
    # It runs between two loops, whose threads need the cores.
    return make_session(graph, num_threads=num_threads, before_loop=True)
