"""How noise was added in training: a noise schedule in diffusers' words. `schedules.py` makes rows of it.

    schedule = NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule.alphas_cumprod(), schedule.sigmas()

Symbols: see `schedules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from .errors import BundleError
from .schema import TRUTH, MisfitError, fit, one_of, shown, whole

Array = np.ndarray

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
Beta = Annotated[float, Meta(gt=0, lt=1, description="a number between 0 and 1")]

# Settings of diffusers' schedulers that change what a network was trained for or cannot be a linear row, with the only
# values supported. The request chooses the solver: settings that merely choose one are ignored.
_ONLY: dict[str, tuple[Any, ...]] = {
    "clip_sample": (False, None),  # clipping and thresholding are not linear
    "thresholding": (False, None),
    "variance_type": ("fixed_small", "fixed_small_log", None),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": (False, None),
}


@dataclass(frozen=True)
class NoiseSchedule:
    """How noise was added in training and which timesteps sampling visits, in diffusers' words.

    num_train_timesteps: T; timesteps are 0 ... T - 1, T - 1 the noisiest.
    beta_start, beta_end: in (0, 1); unused by "squaredcos_cap_v2".
    beta_schedule: "linear", "scaled_linear" (linear in √β) or "squaredcos_cap_v2" (arXiv 2102.09672, eq. 17).
    prediction_type: what the network predicts: "epsilon" the noise ε, "v_prediction" v = α ε - σ x0
        (arXiv 2202.00512, appendix D), "sample" the clean x0.
    rescale_betas_zero_snr: rescale so that timestep T - 1 is pure noise (arXiv 2305.08891, algorithm 1).
    timestep_spacing: "leading", "trailing" or "linspace" (arXiv 2305.08891, table 2).
    steps_offset: added to the timesteps of "leading".
    set_alpha_to_one: DDIM and PLMS end at ᾱ = 1 rather than at timestep 0's.
    trained_betas: the T betas themselves, each in (0, 1), in place of beta_schedule.

    The defaults are those of DDIMScheduler. What a file may say is what the annotations say: see `from_config`.
    """

    num_train_timesteps: Annotated[int, whole(2, 100_000)] = 1000
    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    beta_schedule: Annotated[str, one_of(*BETA_SCHEDULES)] = "linear"
    prediction_type: Annotated[str, one_of(*PREDICTION_TYPES)] = "epsilon"
    rescale_betas_zero_snr: Annotated[bool, TRUTH] = False
    timestep_spacing: Annotated[str, one_of(*TIMESTEP_SPACINGS)] = "leading"
    steps_offset: Annotated[int, whole(0, 100_000)] = 0
    set_alpha_to_one: Annotated[bool, TRUTH] = True
    trained_betas: Annotated[tuple[Beta, ...] | None, Meta(description="numbers between 0 and 1, or null")] = None

    def __post_init__(self) -> None:
        T, betas = self.num_train_timesteps, self.trained_betas
        if betas is not None and len(betas) != T:
            raise ValueError(f"The trained_betas must be {T} numbers, got {len(betas)}.")
        if self.beta_start > self.beta_end:
            raise ValueError(f"It must be beta_start <= beta_end, got {self.beta_start} and {self.beta_end}.")

    @classmethod
    def from_config(cls, config: Any) -> NoiseSchedule:
        """Reads a scheduler's configuration as diffusers saves it, or a manifest's entry of `schedules`.

        Unknown keys and those that choose a solver are ignored; absent ones take DDIMScheduler's defaults.
        Raises BundleError for a setting that is not one, or that would change the results and is not supported.
        """
        for name, allowed in _ONLY.items() if isinstance(config, Mapping) else ():
            if name in config and config[name] not in allowed:
                raise BundleError(
                    f"The scheduler's {name} must be {allowed[0]!r}, got {shown(config[name])}. If the network allows "
                    "it, change that in scheduler_config.json and run the command again."
                )
        try:
            return fit(config, cls)
        except MisfitError as error:
            raise BundleError(f"The noise schedule is not one that can be run. {error}") from None

    def alphas_cumprod(self) -> Array:
        """ᾱ of timesteps 0 ... T - 1, float64 [T], decreasing. The last is 0 with zero terminal SNR."""
        T = self.num_train_timesteps
        if self.trained_betas is not None:
            betas = np.array(self.trained_betas)
        elif self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, T)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(math.sqrt(self.beta_start), math.sqrt(self.beta_end), T) ** 2
        else:
            f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
        abar = np.cumprod(1 - betas)
        if self.rescale_betas_zero_snr:
            alpha = np.sqrt(abar)
            abar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        return abar

    def sigmas(self) -> Array:
        """Noise levels s = √((1 - ᾱ) / ᾱ) of sigma space, float64 [T], increasing.

        With zero terminal SNR the last would be infinite; ᾱ = 2^-24 stands in for 0, as in diffusers (s is
        about 4096).
        """
        abar = self.alphas_cumprod()
        if self.rescale_betas_zero_snr:
            abar[-1] = 2.0**-24
        return np.sqrt((1 - abar) / abar)
