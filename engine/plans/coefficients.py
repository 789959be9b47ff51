"""From a plan's noise levels to the float32 table that the step reads (columns: skipstep.kernels.layout).

Converting the network's output into an image and a noise is linear for every prediction type, so it is table
columns and not a branch:

    epsilon        x0 = x/√a - √(1-a)/√a·out          eps = out
    v_prediction   x0 = √a·x - √(1-a)·out             eps = √(1-a)·x + √a·out      (arXiv 2202.00512, section 4)
    sample         x0 = out                           eps = x/√(1-a) - √a/√(1-a)·out
    flow           x0 = n·x - s·out                   eps = n·x + (1-s)·out            (out: noise less image)
    edm            x0 = c_skip/√a·x + c_out·out       eps from x and x0, as for sample (arXiv 2206.00364, table 1)

with sigma, s and d as in skipstep.plans.parameterization, n = √((1-s)²+s²), c_skip = d²/(sigma²+d²) and
c_out = sigma·d/√(sigma²+d²).

Everything is computed in float64 and cast once: in float16 alpha_bar itself would round to 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import PlanError
from skipstep.kernels.layout import NUM_COLUMNS, NUM_SLOTS, Column, StepFlags
from skipstep.plans.parameterization import flow_scale, flow_time
from skipstep.plans.update_weights import UPDATE_COLUMNS, UpdateWeights


def coefficient_table(
    alpha_bar: NDArray[np.float64],
    weights: UpdateWeights,
    *,
    prediction_type: str,
    sigma_data: float | None,
    clip: float | None,
    guidance: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Return float32 `[E, NUM_COLUMNS]` for the E noise levels `alpha_bar` of the network's timestep inputs.

    `guidance` `[E]`: the weights of guidance (skipstep.plans.plan_options.resolve_guidance).
    Raises PlanError for epsilon prediction at alpha_bar = 0, where the predicted image is 1/0.
    """
    a, noise = alpha_bar, 1.0 - alpha_bar
    root_a, root_noise = np.sqrt(a), np.sqrt(noise)
    table = np.zeros((len(a), NUM_COLUMNS), np.float64)
    match prediction_type:
        case "epsilon":
            if np.any(a == 0.0):
                raise PlanError(
                    got="prediction_type='epsilon' at a timestep with alpha_bar = 0 (zero terminal SNR)",
                    expected="a noise level with some image left: the predicted image is (x - eps)/sqrt(alpha_bar)",
                    remedy="use a network trained for v_prediction, or a schedule without zero-terminal-SNR rescaling",
                )
            table[:, Column.X0_X] = 1.0 / root_a
            table[:, Column.X0_OUT] = -root_noise / root_a
            table[:, Column.EPS_OUT] = 1.0
        case "v_prediction":
            table[:, Column.X0_X] = root_a
            table[:, Column.X0_OUT] = -root_noise
            table[:, Column.EPS_X] = root_noise
            table[:, Column.EPS_OUT] = root_a
        case "sample":
            table[:, Column.X0_OUT] = 1.0
            table[:, Column.EPS_X] = 1.0 / root_noise
            table[:, Column.EPS_OUT] = -root_a / root_noise
        case "flow":
            share = flow_time(a)
            table[:, Column.X0_X] = table[:, Column.EPS_X] = flow_scale(a)
            table[:, Column.X0_OUT] = -share
            table[:, Column.EPS_OUT] = 1.0 - share
        case "edm":
            assert sigma_data is not None, "the plan has checked"
            # sigma²+d² times a: finite at a = 0, where sigma is not.
            spread = noise + a * sigma_data**2
            table[:, Column.X0_X] = root_a * sigma_data**2 / spread
            table[:, Column.X0_OUT] = root_noise * sigma_data / np.sqrt(spread)
            table[:, Column.EPS_X] = (1.0 - root_a * table[:, Column.X0_X]) / root_noise
            table[:, Column.EPS_OUT] = -root_a * sigma_data / np.sqrt(spread)
    table[:, Column.CLIP] = 0.0 if clip is None else clip
    # Zero where the scale is the call's own: the tables, and so the keys, of most plans have no such column.
    table[:, Column.GUIDANCE] = np.where(guidance == 1.0, 0.0, guidance)
    table[:, Column.RE_X] = 1.0 / root_noise
    table[:, Column.RE_X0] = -root_a / root_noise
    for name in UPDATE_COLUMNS:
        table[:, Column[name.upper()]] = getattr(weights, name)
    return table.astype(np.float32)


def stage_flags(
    weights: UpdateWeights,
    coefficients: NDArray[np.float32],
    *,
    clip: float | str | None,
    rederives: bool,
    learned_variance: bool,
    guidance: NDArray[np.float64],
) -> tuple[StepFlags, ...]:
    """What the step does after each of the E evaluations: which columns of its row count."""
    uses = {name: coefficients[:, Column[name.upper()]] != 0.0 for name in UPDATE_COLUMNS}
    adds_noise = bool(np.any(uses["sigma"]))
    written = np.where(uses["m_x"] | uses["m_x0"] | uses["m_eps"] | uses["m_h"], weights.slot, -1)
    history = {}
    for slot in range(NUM_SLOTS):
        history[f"read_h{slot}"] = uses[f"c_h{slot}"] | (uses["m_h"] & (written == slot))
        history[f"write_h{slot}"] = written == slot
    return tuple(
        StepFlags(
            clip=isinstance(clip, float),
            threshold=clip == "dynamic",
            rederive_eps=rederives,
            add_state=bool(uses["c_x"][row]),
            **{name: bool(values[row]) for name, values in history.items()},
            # All rows alike: a last row without noise would be one more kernel to compile, for nothing.
            add_noise=adds_noise,
            learned_variance=learned_variance,
            unguided=bool(guidance[row] == 0.0),
            scale_guidance=bool(guidance[row] not in (0.0, 1.0)),
        )
        for row in range(len(coefficients))
    )
