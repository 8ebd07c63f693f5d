"""The sampling loop as numbers: a noise schedule and a solver become one row of coefficients a step.

A step graph (see `handiffuser.contract`) knows no solver. Each step it is given a row, and it computes

    m    = u + guidance (c - u)                    the guided network output, network(scale x, timestep)
    x'   = a x + b m + h_1 + d noise
    h_k' = p_k x + q_k m + h_(k+1)                 what this step adds to the state k steps later

Every solver below is linear in x and m once its schedule is fixed, so it is a small pure function that
returns those coefficients in float64: which paper, which equation, no hidden state. The conventions, also at
the ends of a schedule, are those of diffusers' schedulers: the tests run both loops side by side.

Try it:

    from handiffuser.schedules import NoiseSchedule, rows
    schedule = NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    table = rows(schedule, "dpm++2m", steps=20, guidance=7.5, num_history=1)
    table.timesteps, table.rows, table.init_sigma

Symbols: ᾱ is the product of (1 - β) up to a timestep ("alphas_cumprod"), α = √ᾱ and σ = √(1 - ᾱ) scale signal
and noise in x = α x0 + σ ε. "Sigma space" divides by α: the noise level there is s = σ / α.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .contract import ROW_HEAD
from .errors import RequestError
from .noise_schedule import NoiseSchedule as NoiseSchedule

Array = np.ndarray


class Table(NamedTuple):
    """A schedule ready to run: N steps, which is `steps`, or one more for PLMS."""

    timesteps: Array  # float64 [N]: what the network is told, and what `unet_time` is run on
    rows: Array  # float32 [N, 6 + 2 K], columns as `handiffuser.contract.row_columns(K)`
    init_sigma: float  # the first state is this times unit normal noise
    stochastic: bool  # whether any step adds noise
    levels: Array  # float64 [N + 1, 2], see `Recurrence`


class Recurrence(NamedTuple):
    """A solver on a fixed schedule, in float64.

        x_(i+1) = Σ_k (A[k, i-k] x_(i-k) + B[k, i-k] m_(i-k)) + d_i noise

    A[k, j] is how much of step j's state goes into the state k steps after its own result; B likewise for the
    network's outputs. Their rows 0 are the columns a and b of a table, the rows k above are p_k and q_k.
    levels[i] are the shares of picture and noise in the state before step i; the last row, (1, 0), is the result's.
    """

    timesteps: Array  # [N]
    A: Array  # [K + 1, N]
    B: Array  # [K + 1, N]
    d: Array  # [N]
    scale: Array  # [N]
    init_sigma: float
    levels: Array  # [N + 1, 2]


# Solvers. Each takes the schedule, the number of steps, and how many of these a picture at the start replaces.


def ddim(schedule: NoiseSchedule, steps: int, start: int = 0) -> Recurrence:
    """DDIM with η = 0. Song et al., arXiv 2010.02502, equation 12: x' = α' x0 + σ' ε."""
    t = _spaced(schedule, steps)[start:]
    # One stride back, which is not always the next timestep ("linspace", uneven "trailing"): as in diffusers.
    return _ddim(schedule, t, t - schedule.num_train_timesteps // steps)


def ddim_early(schedule: NoiseSchedule, steps: int, start: int = 0) -> Recurrence:
    """DDIM whose steps lean towards noise, where few steps lose most: timesteps T (1 - (i / N)²) - 1 of N.

    With a distilled or a well-trained network four such steps do what six even ones do. Ours, not from a paper.
    """
    T = schedule.num_train_timesteps
    t = (T * (1 - (np.arange(steps) / steps) ** 2)).round().astype(np.int64) - 1
    if np.any(np.diff(t) == 0):
        raise RequestError(
            f"{steps} steps of ddim-early would visit a timestep twice. Choose {math.isqrt(T)} or fewer, or ddim.",
            "steps",
        )
    return _ddim(schedule, t[start:], np.append(t[1:], -1)[start:])


def _ddim(schedule: NoiseSchedule, t: Array, t_prev: Array) -> Recurrence:
    abar, abar_prev = _abar(schedule, t), _abar(schedule, t_prev)
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    x0, eps = _x0(schedule, alpha, sigma), _epsilon(schedule, alpha, sigma)
    A, B = np.sqrt(abar_prev) * x0 + np.sqrt(1 - abar_prev) * eps
    return Recurrence(t, A[None], B[None], np.zeros(len(t)), np.ones(len(t)), 1.0, _levels(alpha, sigma))


LCM_STEPS = 50  # steps of the grid that an LCM was distilled on, as in diffusers
LCM_DATA, LCM_TIME = 0.5, 10.0  # the boundary condition's σ_data and its factor of timesteps


def lcm(schedule: NoiseSchedule, steps: int, start: int = 0) -> Recurrence:
    """Sampling of latent consistency models: to x0 in one go, and back into noise. Luo et al., arXiv 2310.04378,
    equation 9 and algorithm 3:

        x0' = c_skip x + c_out x0       c_skip = σ_d² / ((10 t)² + σ_d²), c_out = 10 t / √((10 t)² + σ_d²), σ_d = 0.5
        x'  = α' x0' + σ' noise
    """
    T = schedule.num_train_timesteps
    grid = np.arange(1, min(LCM_STEPS, T) + 1) * (T // min(LCM_STEPS, T)) - 1
    if steps > len(grid):
        raise RequestError(
            f"{steps} steps of lcm are more than the {len(grid)} it was distilled on. Choose 1 to 8.", "steps"
        )
    t = grid[::-1][np.floor(np.linspace(0, len(grid), steps, endpoint=False)).astype(np.int64)][start:]
    abar, abar_prev = _abar(schedule, t), np.append(_abar(schedule, t[1:]), 1.0)
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    x0 = _x0(schedule, alpha, sigma)
    time = LCM_TIME * t
    skip, out = LCM_DATA**2 / (time**2 + LCM_DATA**2), time / np.sqrt(time**2 + LCM_DATA**2)
    A, B = np.sqrt(abar_prev) * out * x0
    A = A + np.sqrt(abar_prev) * skip
    return Recurrence(t, A[None], B[None], np.sqrt(1 - abar_prev), np.ones(len(t)), 1.0, _levels(alpha, sigma))


def ddpm(schedule: NoiseSchedule, steps: int, start: int = 0) -> Recurrence:
    """Ancestral sampling with the small variance. Ho et al., arXiv 2006.11239, equations 6 and 7."""
    t = _spaced(schedule, steps)[start:]
    abar = _abar(schedule, t)
    abar_prev = np.append(abar[1:], 1.0)
    beta = 1 - abar / abar_prev
    alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
    x0 = _x0(schedule, alpha, sigma)
    A, B = np.sqrt(abar_prev) * beta / (1 - abar) * x0
    A = A + np.sqrt(1 - beta) * (1 - abar_prev) / (1 - abar)
    d = np.sqrt((1 - abar_prev) / (1 - abar) * beta)
    return Recurrence(t, A[None], B[None], d, np.ones(len(t)), 1.0, _levels(alpha, sigma))


def euler(schedule: NoiseSchedule, steps: int, start: int = 0) -> Recurrence:
    """Euler's method in sigma space. Karras et al., arXiv 2206.00364, algorithm 1 with S_churn = 0:
    x' = x + (s' - s) (x - x0) / s. The state is x0 + s ε, and the network is shown x / √(s² + 1)."""
    t = _spaced(schedule, steps, whole=False)[start:]
    s = np.interp(t, np.arange(schedule.num_train_timesteps), schedule.sigmas())
    ratio = np.append(s[1:], 0.0) / s
    alpha = 1 / np.sqrt(s**2 + 1)
    x0 = _x0(schedule, alpha, s * alpha)
    A, B = (1 - ratio) * x0 * [alpha, np.ones(len(s))]  # _x0 expects α x, the state is x
    A = A + ratio
    init = s[0] if schedule.timestep_spacing != "leading" else math.hypot(s[0], 1.0)
    return Recurrence(t, A[None], B[None], np.zeros(len(t)), alpha, float(init), _levels(np.ones(len(s)), s))


def dpmpp_2m(schedule: NoiseSchedule, steps: int, start: int = 0, karras: bool = False) -> Recurrence:
    """DPM-Solver++(2M), midpoint. Lu et al., arXiv 2211.01095, algorithm 2:

        D  = (1 + 1/2r) x0_i - 1/2r x0_(i-1)
        x' = (σ'/σ) x - α' (e^-h - 1) D

    with h the step in log(α/σ) and r the ratio of the last h to this one. First and last step have D = x0_i.
    """
    t, s = (all[start:] for all in (_karras if karras else _spaced_for_dpm)(schedule, steps))
    s_next = np.append(s[1:], 0.0)
    alpha, alpha_next = 1 / np.sqrt(s**2 + 1), 1 / np.sqrt(s_next**2 + 1)
    half_r = np.zeros(len(s))  # 1 / 2r
    h = np.log(s[:-1] / s[1:])
    half_r[1:-1] = h[1:] / h[:-1] / 2
    x0 = _x0(schedule, alpha, s * alpha)
    gain = alpha_next * (1 - s_next / s)  # -α' (e^-h - 1)
    now = gain * (1 + half_r) * x0
    later = np.append(-(gain * half_r)[1:], 0.0) * x0  # what this step's x0 is to the next one
    A, B = np.stack([now, later], axis=1)
    A[0] += s_next * alpha_next / (s * alpha)
    return Recurrence(t, A, B, np.zeros(len(t)), np.ones(len(t)), 1.0, _levels(alpha, s * alpha))


def plms(schedule: NoiseSchedule, steps: int, start: int = 0) -> Recurrence:
    """Pseudo linear multistep. Liu et al., arXiv 2202.09778, equations 9 and 12, started as Stable Diffusion
    does: the second timestep is visited twice, the first time to average two outputs over the first stride.

    As in diffusers, outputs are combined as the network gives them: v-predictions before they become noise. After
    `start` steps it begins again in the same way, where diffusers' PNDMScheduler loses its place.
    """
    for unfit, what in (
        (schedule.prediction_type == "sample", "a network that predicts the sample"),
        (schedule.rescale_betas_zero_snr, "a schedule with zero terminal SNR"),
    ):
        if unfit:
            raise RequestError(f"The solver plms cannot run {what}. Choose ddim or dpm++2m.", "solver")
    stride = schedule.num_train_timesteps // steps
    t = _spaced(schedule, steps)[start:]
    t = np.concatenate([t[:2], t[1:2], t[2:]])
    begin, end = t.copy(), t - stride
    if len(t) > 1:
        begin[1], end[1] = t[1] + stride, t[1]
    abar, abar_prev = _abar(schedule, begin), _abar(schedule, end)
    # Equation 9: x' = gain x - drift ε
    gain = np.sqrt(abar_prev / abar)
    drift = (abar_prev - abar) / (abar * np.sqrt(1 - abar_prev) + np.sqrt(abar * (1 - abar) * abar_prev))
    eps_x, eps_m = _epsilon(schedule, np.sqrt(abar), np.sqrt(1 - abar))

    A, B = np.zeros((5, len(t))), np.zeros((5, len(t)))
    weights = ([1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
    outputs: list[int] = []  # steps whose output is kept, newest first
    for i in range(len(t)):
        base = 0 if i == 1 else i  # the second step starts over from the first one's state
        if i == 1:
            used = [(1, 1 / 2), (0, 1 / 2)]
        else:
            outputs = [i, *outputs[:3]]
            used = list(zip(outputs, weights[len(outputs) - 1], strict=True))
        A[i - base, base] = gain[i] - drift[i] * eps_x[i]
        for j, weight in used:
            B[i - j, j] = -drift[i] * eps_m[i] * weight
    before = _abar(schedule, t)
    levels = _levels(np.sqrt(before), np.sqrt(1 - before))
    return Recurrence(t, A, B, np.zeros(len(t)), np.ones(len(t)), 1.0, levels)


def dpmpp_2m_karras(schedule: NoiseSchedule, steps: int, start: int = 0) -> Recurrence:
    """DPM-Solver++(2M) at the noise levels of Karras et al., arXiv 2206.00364, equation 5 with ρ = 7."""
    return dpmpp_2m(schedule, steps, start, karras=True)


# Name of a solver -> its function and the history tensors it needs.
SOLVERS: dict[str, tuple[Callable[[NoiseSchedule, int, int], Recurrence], int]] = {
    "ddim": (ddim, 0),
    "ddpm": (ddpm, 0),
    "euler": (euler, 0),
    "dpm++2m": (dpmpp_2m, 1),
    "dpm++2m-karras": (dpmpp_2m_karras, 1),
    "plms": (plms, 4),
    "lcm": (lcm, 0),
    "ddim-early": (ddim_early, 0),
}


def rows(
    schedule: NoiseSchedule,
    solver: str,
    steps: int,
    guidance: float,
    num_history: int,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    start: int = 0,
) -> Table:
    """The table of a request, for a step graph with `num_history` history tensors.

    solver: a key of SOLVERS. steps: 1 ... num_train_timesteps. guidance: finite; 1 is the conditional output
    alone. guidance_interval: the part of the steps, from 0 to 1, that is guided. Outside of it guidance is 1, and the
    unconditional branch need not run (Kynkäänniemi et al. 2024). start: the first steps that are left out, because the
    state begins as a picture with noise (`skipped`).

    plms does not run "sample" prediction or zero terminal SNR. ddim, ddpm and lcm do not run "epsilon" prediction from
    a timestep without signal, which does not determine x0. All other combinations run.

    Raises RequestError, with the allowed values, also where a schedule is so extreme that its rows are not finite.
    """
    recurrence = solve(schedule, solver, steps, start)
    needed = SOLVERS[solver][1]
    if num_history < needed:
        runs = [name for name, (_, history) in SOLVERS.items() if history <= num_history]
        raise RequestError(
            f"The solver {solver} needs {needed} history tensors and the step graph has {num_history}. "
            f"Choose {', '.join(runs)}, or export again with more history tensors.",
            "solver",
        )
    try:
        guidance = float(guidance)
    except (TypeError, ValueError):
        guidance = math.nan
    if not math.isfinite(guidance):
        raise RequestError(f"guidance must be a finite number, got {guidance}. Usual are 1 (off) to 10.", "guidance")
    N = len(recurrence.timesteps)
    table = np.zeros((N, len(ROW_HEAD) + 2 * num_history))
    table[:, 0] = recurrence.timesteps
    table[:, 1] = recurrence.scale
    done = np.arange(start, start + N) / (start + N)
    table[:, 2] = np.where((guidance_interval[0] <= done) & (done < guidance_interval[1]), guidance, 1.0)
    table[:, 3], table[:, 4] = recurrence.A[0], recurrence.B[0]
    table[:, 5] = recurrence.d
    for k in range(1, needed + 1):
        table[:, 4 + 2 * k], table[:, 5 + 2 * k] = recurrence.A[k], recurrence.B[k]
    stochastic = bool(np.any(recurrence.d))
    with np.errstate(all="ignore"):
        numbers = table.astype(np.float32)
        finite = np.isfinite(numbers).all() and np.isfinite(np.float32(recurrence.init_sigma))
    if not finite:
        what = f"{steps} steps of {solver} on this network's noise schedule"
        raise RequestError(f"{what} are not finite numbers. Choose another solver.", "solver")
    return Table(recurrence.timesteps, numbers, recurrence.init_sigma, stochastic, recurrence.levels)


def skipped(steps: int, strength: float) -> int:
    """How many of the steps are left out at this strength: diffusers' `get_timesteps`. Raises RequestError for all."""
    kept = min(int(steps * strength), steps)
    if kept < 1:
        raise RequestError(
            f"strength must leave at least one of the {steps} steps, got {strength:g}. Take {1 / steps:.2g} or more, "
            "or more steps.",
            "strength",
        )
    return steps - kept


def solve(schedule: NoiseSchedule, solver: str, steps: int, start: int = 0) -> Recurrence:
    """The float64 recurrence behind `rows`; raises RequestError for a solver or steps that cannot run."""
    if solver not in SOLVERS:
        raise RequestError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}.", "solver")
    try:
        steps = operator.index(steps)
    except TypeError:
        raise RequestError(f"steps must be a whole number, got {steps!r}.", "steps") from None
    if not 1 <= steps <= schedule.num_train_timesteps:
        most = f"{schedule.num_train_timesteps}, the timesteps that the network was trained with"
        raise RequestError(f"steps must be from 1 to {most}, got {steps}.", "steps")
    with np.errstate(all="ignore"):  # `rows` refuses numbers that are not finite
        recurrence = SOLVERS[solver][0](schedule, steps, start)
    return recurrence._replace(timesteps=recurrence.timesteps.astype(np.float64))


# What the solvers share.


def _levels(picture: Array, noise: Array) -> Array:
    """[N] shares of picture and noise before each step -> [N + 1, 2], with the result's."""
    return np.append(np.stack([picture, noise], -1), [[1.0, 0.0]], 0)


def _x0(schedule: NoiseSchedule, alpha: Array, sigma: Array) -> Array:
    """The clean sample as x0 = row 0 times x plus row 1 times m, for x = α x0 + σ ε. Returns [2, N]."""
    if schedule.prediction_type == "sample":
        return np.stack([np.zeros_like(alpha), np.ones_like(alpha)])
    if schedule.prediction_type == "v_prediction":
        return np.stack([alpha, -sigma])
    if np.any(alpha == 0):
        raise RequestError(
            "This network predicts noise, and with zero terminal SNR the first timestep is noise alone, which does not "
            "determine a sample. Choose euler or dpm++2m, which start just below it.",
            "solver",
        )
    return np.stack([1 / alpha, -sigma / alpha])


def _epsilon(schedule: NoiseSchedule, alpha: Array, sigma: Array) -> Array:
    """The noise as ε = row 0 times x plus row 1 times m, for x = α x0 + σ ε. Returns [2, N]."""
    if schedule.prediction_type == "sample":
        return np.stack([1 / sigma, -alpha / sigma])
    if schedule.prediction_type == "v_prediction":
        return np.stack([sigma, alpha])
    return np.stack([np.zeros_like(alpha), np.ones_like(alpha)])


def _abar(schedule: NoiseSchedule, t: Array) -> Array:
    """ᾱ at integer timesteps; before timestep 0 it is 1, or timestep 0's without `set_alpha_to_one`."""
    abar = schedule.alphas_cumprod()
    return np.where(t >= 0, abar[np.maximum(t, 0)], 1.0 if schedule.set_alpha_to_one else abar[0])


def _spaced(schedule: NoiseSchedule, steps: int, whole: bool = True) -> Array:
    """Timesteps from noisy to clean [steps], integers unless `whole` is False and the spacing is "linspace".

    arXiv 2305.08891, table 2.
    """
    T = schedule.num_train_timesteps
    if schedule.timestep_spacing == "linspace":
        t = np.linspace(0, T - 1, steps)[::-1]
        return t.round().astype(np.int64) if whole else t
    if schedule.timestep_spacing == "leading":
        return _within(schedule, np.arange(steps)[::-1] * (T // steps) + schedule.steps_offset)
    # arange may give one timestep too many (-1) where T / steps is not exact: cut it.
    return np.arange(T, 0, -T / steps)[:steps].round().astype(np.int64) - 1


def _spaced_for_dpm(schedule: NoiseSchedule, steps: int) -> tuple[Array, Array]:
    """Timesteps and noise levels [steps] for DPM-Solver++: all but the cleanest of steps + 1 timesteps."""
    T = schedule.num_train_timesteps
    if schedule.timestep_spacing == "linspace":
        t = np.linspace(0, T - 1, steps + 1)[:0:-1].round().astype(np.int64)
    elif schedule.timestep_spacing == "leading":
        t = _within(schedule, np.arange(1, steps + 1)[::-1] * (T // (steps + 1)) + schedule.steps_offset)
    else:
        t = _spaced(schedule, steps)
    if np.any(np.diff(t) == 0):
        raise RequestError(
            f"{steps} steps of dpm++2m would visit a timestep twice. Choose {T // 2} steps or fewer.", "steps"
        )
    return t, schedule.sigmas()[t]


def _karras(schedule: NoiseSchedule, steps: int) -> tuple[Array, Array]:
    """Timesteps and noise levels [steps]: levels even in s^(1/7), timesteps by interpolation in log s.

    Timesteps are rounded as in diffusers, but not for the cosine schedule, where many levels lie between the
    last few timesteps. diffusers does not round there either, but then casts to integers.
    """
    levels = schedule.sigmas()
    rho = 7.0
    s = np.linspace(levels[-1] ** (1 / rho), levels[0] ** (1 / rho), steps) ** rho
    t = np.interp(np.log(s), np.log(levels), np.arange(len(levels)))
    return t if schedule.beta_schedule == "squaredcos_cap_v2" else t.round(), s


def _within(schedule: NoiseSchedule, t: Array) -> Array:
    if t[0] >= schedule.num_train_timesteps:
        raise RequestError(
            f"{len(t)} steps with steps_offset={schedule.steps_offset} would start at timestep {t[0]}; "
            f"the last one trained is {schedule.num_train_timesteps - 1}. Choose fewer steps.",
            "steps",
        )
    return t
