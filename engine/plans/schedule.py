"""Noise schedules: how much of the image is left at each training timestep.

    x_t = sqrt(alpha_bar_t)·x0 + sqrt(1 - alpha_bar_t)·eps        alpha_bar_t = prod_{i<=t} (1 - beta_i)

(Ho, Jain, Abbeel 2020, arXiv 2006.11239, eq. 4; Song, Meng, Ermon 2021, arXiv 2010.02502, write alpha for our
alpha_bar.) A schedule is that one float64 array and nothing else: every other number of a plan follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from skipstep.arrays import number_array
from skipstep.errors import PlanError, ScheduleError, check_integer, check_number
from skipstep.plans.diffusers_config import MAX_TIMESTEPS, read_diffusers_config

# Noise to signal of a level whose alpha_bar is 1e-16, the last that 1 - alpha_bar tells from none.
_MAX_SIGMA: Final = 1e8


@dataclass(frozen=True, slots=True, eq=False)
class NoiseSchedule:
    """`alpha_bar`: float64 `[T]`, strictly decreasing in [0, 1); `name` is for people and takes no part in equality.

    Raises ScheduleError where the array is not such a sequence.
    """

    alpha_bar: NDArray[np.float64]
    name: str = "alphas_cumprod"

    def __post_init__(self) -> None:
        alpha_bar = _float64_vector(self.alpha_bar, what="alpha_bar")
        if not (np.all(alpha_bar >= 0.0) and np.all(alpha_bar < 1.0)):
            raise ScheduleError(
                got=f"alpha_bar between {alpha_bar.min():.6g} and {alpha_bar.max():.6g}",
                expected="values in [0, 1): the share of the image's variance that is left",
                remedy="pass the cumulative product of 1 - beta",
            )
        rises = np.flatnonzero(np.diff(alpha_bar) >= 0.0)
        if rises.size:
            t = int(rises[0])
            raise ScheduleError(
                got=f"alpha_bar[{t}] = {alpha_bar[t]:.9g} followed by alpha_bar[{t + 1}] = {alpha_bar[t + 1]:.9g}",
                expected="a strictly decreasing sequence, timestep 0 first (the least noise)",
                remedy="sort it by timestep and drop repeated levels",
            )
        alpha_bar.setflags(write=False)
        object.__setattr__(self, "alpha_bar", alpha_bar)

    @property
    def num_timesteps(self) -> int:
        """T, the number of training timesteps."""
        return len(self.alpha_bar)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and np.array_equal(self.alpha_bar, other.alpha_bar)

    def __hash__(self) -> int:
        return hash(self.alpha_bar.tobytes())

    def __repr__(self) -> str:
        first, last = self.alpha_bar[0], self.alpha_bar[-1]
        return f"NoiseSchedule({self.name}, T={self.num_timesteps}, alpha_bar {first:.4g} to {last:.4g})"

    @classmethod
    def linear(cls, num_timesteps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Betas on a straight line: the schedule of DDPM and of the DDIM paper."""
        first, last = _checked_betas(beta_start, beta_end)
        betas = np.linspace(first, last, _checked_length(num_timesteps), dtype=np.float64)
        return cls.from_betas(betas, name=f"linear {first:g} to {last:g}")

    @classmethod
    def scaled_linear(
        cls, num_timesteps: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> NoiseSchedule:
        """Square roots of the betas on a straight line: the schedule of latent diffusion (arXiv 2112.10752)."""
        first, last = _checked_betas(beta_start, beta_end)
        roots = np.linspace(first**0.5, last**0.5, _checked_length(num_timesteps), dtype=np.float64)
        return cls.from_betas(roots**2, name=f"scaled_linear {first:g} to {last:g}")

    @classmethod
    def cosine(cls, num_timesteps: int = 1000, *, max_beta: float = 0.999) -> NoiseSchedule:
        """alpha_bar ∝ cos²((t/T + 0.008)/1.008·π/2), betas capped (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17).

        Known as `squaredcos_cap_v2` in diffusers' configurations.
        """
        length = _checked_length(num_timesteps)
        max_beta = check_number("max_beta", max_beta, low=0.0, high=1.0, above=True, error=ScheduleError)
        t = np.arange(length + 1, dtype=np.float64) / length
        level = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        return cls.from_betas(np.minimum(1.0 - level[1:] / level[:-1], max_beta), name="cosine")

    @classmethod
    def sigmoid(cls, num_timesteps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Betas on a logistic curve over [-6, 6] (GeoDiff, arXiv 2203.02923)."""
        first, last = _checked_betas(beta_start, beta_end)
        curve = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, _checked_length(num_timesteps), dtype=np.float64)))
        return cls.from_betas(curve * (last - first) + first, name=f"sigmoid {first:g} to {last:g}")

    @classmethod
    def karras(
        cls, num_timesteps: int = 1000, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
    ) -> NoiseSchedule:
        """Noise to signal between its bounds, at equal distances of sigma^(1/rho) (arXiv 2206.00364, eq. 5).

        A plan over all T timesteps visits exactly these levels.
        """
        low = check_number("sigma_min", sigma_min, low=0.0, above=True, error=ScheduleError)
        high = check_number("sigma_max", sigma_max, low=low, high=_MAX_SIGMA, above=True, error=ScheduleError)
        root = 1.0 / check_number("rho", rho, low=0.0, above=True, error=ScheduleError)
        sigmas = np.linspace(high**root, low**root, _checked_length(num_timesteps)) ** (1.0 / root)
        return cls.from_sigmas(sigmas, name=f"karras {low:g} to {high:g}")

    @classmethod
    def flow(cls, num_timesteps: int = 1000, *, shift: float = 1.0) -> NoiseSchedule:
        """Flow matching, (1-s)·x0 + s·eps with s from 1/T to 1, shifted towards noise: shift·s/(1+(shift-1)·s).

        The shift is that of Stable Diffusion 3 (arXiv 2403.03206, eq. 23).
        """
        shift = check_number("shift", shift, low=0.0, above=True, error=ScheduleError)
        share = np.linspace(1.0, 0.0, _checked_length(num_timesteps), endpoint=False)
        share = shift * share / (1.0 + (shift - 1.0) * share)
        image, noise = (1.0 - share) ** 2, share**2
        return cls((image / (image + noise))[::-1], name=f"flow, shift {shift:g}")

    @classmethod
    def from_sigmas(cls, sigmas: ArrayLike, *, name: str = "sigmas") -> NoiseSchedule:
        """From noise to signal `[T]`, decreasing, the noisiest first: alpha_bar is 1/(1+sigma²)."""
        sigma = _float64_vector(sigmas, what="sigmas")
        if not (np.all(sigma > 0.0) and sigma[0] <= _MAX_SIGMA and np.all(np.diff(sigma) < 0.0)):
            raise ScheduleError(
                got=f"sigmas between {sigma.min():.6g} and {sigma.max():.6g}",
                expected=f"positive numbers up to {_MAX_SIGMA:g} that decrease, the noisiest first",
                remedy="leave the last 0 of diffusers' scheduler.sigmas out: a plan ends without noise by itself",
            )
        return cls(1.0 / (1.0 + sigma[::-1] ** 2), name=name)

    @classmethod
    def from_betas(cls, betas: ArrayLike, *, name: str = "betas") -> NoiseSchedule:
        """From beta_t `[T]`, each in (0, 1)."""
        beta = _float64_vector(betas, what="betas")
        if not (np.all(beta > 0.0) and np.all(beta < 1.0)):
            raise ScheduleError(
                got=f"betas between {beta.min():.6g} and {beta.max():.6g}",
                expected="values in (0, 1): each step adds some noise and keeps some image",
                remedy="check beta_start and beta_end; for a zero terminal SNR use rescaled_to_zero_terminal_snr()",
            )
        return cls(np.cumprod(1.0 - beta, dtype=np.float64), name=name)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: ArrayLike, *, name: str = "alphas_cumprod") -> NoiseSchedule:
        """From alpha_bar_t `[T]` itself, e.g. `scheduler.alphas_cumprod.numpy()`."""
        return cls(_float64_vector(alphas_cumprod, what="alphas_cumprod"), name=name)

    @classmethod
    def from_diffusers(cls, config: str | Path | Mapping[str, Any]) -> NoiseSchedule:
        """From a diffusers `scheduler_config.json` (the file, its folder, or its contents as a dict).

        Every key is supported or refused by name with a ScheduleError. The keys that are not about the schedule
        (prediction type, clipping, spacing) are returned by `skipstep.plans.scheduler_config.read_scheduler_config`.
        """
        read = read_diffusers_config(config)
        if read.trained_betas is not None:
            schedule = cls.from_betas(read.trained_betas, name="trained_betas")
        elif read.beta_schedule == "squaredcos_cap_v2":
            schedule = cls.cosine(read.num_train_timesteps)
        else:
            make = {"linear": cls.linear, "scaled_linear": cls.scaled_linear, "sigmoid": cls.sigmoid}
            schedule = make[read.beta_schedule](
                read.num_train_timesteps, beta_start=read.beta_start, beta_end=read.beta_end
            )
        return schedule.rescaled_to_zero_terminal_snr() if read.rescale_betas_zero_snr else schedule

    def timestep_at(self, alpha_bar: float) -> float:
        """The timestep, between training timesteps where need be, at which the level is `alpha_bar`.

        Linear in log-SNR, ln(alpha_bar/(1 - alpha_bar)), between neighbours; clamped to [0, T-1].
        """
        alpha_bar = check_number("alpha_bar", alpha_bar, low=0.0, high=1.0, error=ScheduleError)
        level = np.clip(alpha_bar, self.alpha_bar[-1], self.alpha_bar[0])
        with np.errstate(divide="ignore"):  # A zero terminal SNR: its logarithm orders rightly.
            log_snr = np.log(self.alpha_bar) - np.log1p(-self.alpha_bar)
            wanted = np.log(level) - np.log1p(-level)
        return float(np.interp(-wanted, -log_snr, np.arange(self.num_timesteps)))

    def rescaled_to_zero_terminal_snr(self) -> NoiseSchedule:
        """Shift and scale sqrt(alpha_bar) so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1)."""
        root = np.sqrt(self.alpha_bar)
        rescaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        return NoiseSchedule(rescaled, name=f"{self.name}, zero terminal SNR")


def check_schedule(value: object) -> NoiseSchedule:
    """`value`, if it is a NoiseSchedule. Raises PlanError."""
    if not isinstance(value, NoiseSchedule):
        raise PlanError(
            got=f"schedule of type {type(value).__name__}",
            expected="a NoiseSchedule",
            remedy="build one, e.g. NoiseSchedule.linear(1000) or NoiseSchedule.from_diffusers(config)",
        )
    return value


def _float64_vector(values: ArrayLike, *, what: str) -> NDArray[np.float64]:
    """A private, contiguous float64 copy of a finite, non-empty vector."""
    given = number_array(values)
    if given is None:
        raise ScheduleError(
            got=f"{what} of type {type(values).__name__} that are no numbers",
            expected="a vector of T numbers",
            remedy="pass a list or a NumPy array of floats",
        )
    array = np.array(given, dtype=np.float64)
    fits = array.ndim == 1 and 0 < array.size <= MAX_TIMESTEPS
    if not fits or not np.all(np.isfinite(array)):
        problem = "NaN or infinity" if fits else f"shape {list(array.shape)}"
        raise ScheduleError(
            got=f"{what} with {problem}",
            expected=f"a vector of 1 to {MAX_TIMESTEPS} finite numbers",
            remedy="pass one value per training timestep",
        )
    return array


def _checked_length(num_timesteps: int) -> int:
    remedy = "pass the number of timesteps that the network was trained with, usually 1000"
    return check_integer("num_timesteps", num_timesteps, low=1, high=MAX_TIMESTEPS, remedy=remedy, error=ScheduleError)


def _checked_betas(beta_start: float, beta_end: float) -> tuple[float, float]:
    remedy = "pass the values that the network was trained with"
    first = check_number("beta_start", beta_start, low=0.0, high=1.0, above=True, remedy=remedy, error=ScheduleError)
    last = check_number("beta_end", beta_end, low=0.0, high=1.0, above=True, remedy=remedy, error=ScheduleError)
    return first, last
