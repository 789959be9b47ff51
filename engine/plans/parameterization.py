"""What a network predicts, what it is told of a noise level, and how large the state is that it reads.

A plan is written in one notation, x = √alpha_bar·x0 + √(1-alpha_bar)·eps, whose variance is that of the data. Networks
of other families read the same state at another scale, and the level as another number. With
sigma = √((1-alpha_bar)/alpha_bar), noise to signal, and s = sigma/(1+sigma),

    family      the state that it reads          against x                   its time input
    vp (DDPM)   √alpha_bar·x0 + √(1-alpha_bar)·eps   1                       the training timestep
    ve          x0 + sigma·eps                   √(1+sigma²)                 sigma               (arXiv 2011.13456)
    edm         (x0 + sigma·eps)/√(sigma²+d²)    √((1+sigma²)/(sigma²+d²))   c_noise             (arXiv 2206.00364)
    flow        (1-s)·x0 + s·eps                 √((1-s)²+s²)                1000·s              (arXiv 2210.02747)

d is sigma_data, the spread of the data, and c_noise is ln(sigma)/4. `log_snr` is ln(alpha_bar/(1-alpha_bar)).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, get_args

import numpy as np

from skipstep.plans.update_weights import Levels

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow", "edm"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
TimeInput = Literal["timestep", "sigma", "c_noise", "log_snr", "alpha_bar", "flow"]
State = Literal["vp", "ve", "edm", "flow"]
STATES: tuple[str, ...] = get_args(State)
FLOW_TIMESTEPS: Final = 1000.0


def state_scale(time: Any, *, state: str, time_input: str, sigma_data: float | None, of: Any = np) -> Any:
    """What a network's state is, against x, at its time inputs, an array of the module `of`: numpy or torch.

    image and noise are the weights of x0 and eps, up to a factor: sigma, noise/image, may be infinite.
    """
    one = of.ones_like(time)
    match time_input:
        case "sigma":
            image, noise = one, time
        case "c_noise":
            image, noise = one, of.exp(4 * time)
        case "log_snr":
            image, noise = one, of.exp(-time / 2)
        case "alpha_bar":
            image, noise = of.sqrt(time), of.sqrt(1 - time)
        case _:
            image, noise = 1 - time / FLOW_TIMESTEPS, time / FLOW_TIMESTEPS
    both = of.sqrt(image * image + noise * noise)
    if state == "ve":
        return both / image
    if state == "edm":
        return both / of.sqrt(noise * noise + (sigma_data or 0.0) ** 2 * image * image)
    return both / (image + noise)


def noise_to_signal(alpha_bars: Levels) -> Levels:
    """sigma, infinite at alpha_bar = 0."""
    with np.errstate(divide="ignore"):
        ratio: Levels = np.sqrt((1.0 - alpha_bars) / alpha_bars)
    return ratio


def flow_time(alpha_bars: Levels) -> Levels:
    """s, in [0, 1]: the share of noise in (1-s)·x0 + s·eps."""
    share: Levels = np.sqrt(1.0 - alpha_bars) * flow_scale(alpha_bars)
    return share


def flow_scale(alpha_bars: Levels) -> Levels:
    """√((1-s)²+s²): (1-s)·x0 + s·eps is so many times x."""
    scale: Levels = 1.0 / (np.sqrt(alpha_bars) + np.sqrt(1.0 - alpha_bars))
    return scale


# Of levels. At alpha_bar = 0 all but two are infinite.
_OF_LEVELS: Final[Mapping[str, Callable[[Levels], Levels]]] = {
    "sigma": noise_to_signal,
    "c_noise": lambda levels: np.log(noise_to_signal(levels)) / 4,
    "log_snr": lambda levels: -2 * np.log(noise_to_signal(levels)),
    "alpha_bar": lambda levels: levels,
    "flow": lambda levels: FLOW_TIMESTEPS * flow_time(levels),
}
TIME_INPUTS: Final = ("timestep", *_OF_LEVELS)


def time_inputs(kind: str, alpha_bars: Levels) -> Levels:
    """What a network of that kind is told of these levels; "timestep" is not a function of them."""
    with np.errstate(divide="ignore"):
        return _OF_LEVELS[kind](alpha_bars)
