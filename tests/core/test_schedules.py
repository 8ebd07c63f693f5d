"""Every solver against diffusers' own scheduler, driving the same fake network from the same noise.

The exact comparison runs diffusers in float64, by letting torch.float32 mean float64 while it works.
"""

from __future__ import annotations

import math
import types
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from handiffuser import noise_schedule, schedules
from handiffuser.contract import row_columns
from handiffuser.errors import BundleError, RequestError
from handiffuser.runtime.canvas import Blend
from handiffuser.schedules import NoiseSchedule, rows, solve
from reference import reference_step

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SIZE = 6
STEPS = (1, 2, 5, 7, 20)
SPACINGS = ("leading", "trailing", "linspace")
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TRAINED = {"trained_betas": tuple((np.linspace(0.03, 0.12, 1000) ** 2).tolist())}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
PEERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {}),
}
HISTORY = {name: history for name, (_, history) in schedules.SOLVERS.items()}
A = np.random.default_rng(3).normal(size=(SIZE, SIZE)) / math.sqrt(SIZE)


def network(x, t):
    """Bounded, nonlinear, and different at every timestep. x [SIZE], float64."""
    return np.tanh(A @ x + np.sin(np.arange(SIZE) + float(t) / 100))


def unit_noise(steps):
    return np.random.default_rng(4).normal(size=(steps + 2, SIZE))


@contextmanager
def float64_diffusers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(np, "float32", np.float64)
        yield


def diffusers_loop(config, solver, steps, timesteps=None, start=0, blend=None):
    """Final sample and timesteps of diffusers' own loop. `timesteps` replaces those that the network sees.

    start: steps that are left out, where a picture with noise begins. blend: (picture, mask) to keep after each step.
    """
    name, extra = PEERS[solver]
    config = {**config, **extra}
    peer = getattr(diffusers, name)
    accepted = peer.__init__.__wrapped__.__code__.co_varnames
    scheduler = peer(**{key: value for key, value in config.items() if key in accepted})
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)  # else timesteps that occur twice start it one step late
    noise = iter(unit_noise(steps))
    first = torch.from_numpy(next(noise))[None]
    x = first * scheduler.init_noise_sigma
    times = scheduler.timesteps[start:]
    if blend is not None:
        picture, mask = (torch.from_numpy(value)[None] for value in blend)
        x = scheduler.add_noise(picture, first, times[:1])
    module = __import__(peer.__module__, fromlist=["randn_tensor"])
    with pytest.MonkeyPatch.context() as patch:
        if solver in ("ddpm", "lcm"):
            patch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.from_numpy(next(noise))[None])
        for i, t in enumerate(times):
            shown = t if timesteps is None else timesteps[i]
            m = torch.from_numpy(network(scheduler.scale_model_input(x, t)[0].numpy(), shown))[None]
            x = scheduler.step(m, t, x).prev_sample
            if blend is not None:
                kept = scheduler.add_noise(picture, first, times[i + 1 : i + 2]) if i + 1 < len(times) else picture
                x = mask * x + (1 - mask) * kept
    return x[0].numpy(), times.numpy()


def our_loop(recurrence, table_rows, K, steps, blend=None):
    """Runs rows [N, 6 + 2 K] of any precision through reference_step."""
    noise = unit_noise(steps)
    x, history = noise[None, 0] * recurrence.init_sigma, np.zeros((1, K, SIZE))
    if blend is not None:
        keep = Blend(blend[0], noise[0], blend[1], recurrence.levels)
        x = keep.start()[None]
    for i, (t, row) in enumerate(zip(recurrence.timesteps, table_rows, strict=True)):
        m = network(row[1] * x[0], t)[None]
        x, history = reference_step(row[None], x, history, m, noise[None, i + 1])
        if blend is not None:
            x = keep(i, x)
    return x[0]


def exact_rows(recurrence, K):
    """What `rows` computes, before it is rounded to float32."""
    table = np.zeros((len(recurrence.timesteps), 6 + 2 * K))
    table[:, 0], table[:, 1], table[:, 5] = recurrence.timesteps, recurrence.scale, recurrence.d
    table[:, 3], table[:, 4] = recurrence.A[0], recurrence.B[0]
    table[:, 6::2], table[:, 7::2] = recurrence.A[1:].T, recurrence.B[1:].T
    return table


def runs(solver, prediction, zero_snr, first_is_noisy=True):
    if solver == "plms":
        return prediction != "sample" and not zero_snr
    if solver == "lcm":  # has a grid of its own, which ends below T - 1 only where it is not whole
        first_is_noisy = True
    return not (solver in ("ddim", "ddpm", "lcm") and prediction == "epsilon" and zero_snr and first_is_noisy)


@pytest.mark.parametrize("betas", [STABLE_DIFFUSION, COSINE], ids=["stable-diffusion", "cosine"])
@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero-snr"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", noise_schedule.PREDICTION_TYPES)
@pytest.mark.parametrize("solver", PEERS)
def test_equals_diffusers(solver, prediction, spacing, zero_snr, betas):
    config = {
        **betas,
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": zero_snr,
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    schedule = NoiseSchedule.from_config(config)
    K = HISTORY[solver]
    for steps in STEPS:
        first_is_noisy = spacing == "trailing" or (spacing == "linspace" and steps > 1)
        if not runs(solver, prediction, zero_snr, first_is_noisy):
            with pytest.raises(RequestError, match=r"Choose (ddim|euler)"):
                rows(schedule, solver, steps, 1.0, K)
            continue
        recurrence = solve(schedule, solver, steps)
        # diffusers cuts the fractions off these timesteps; its solver itself does not look at them.
        fractional = solver == "dpm++2m-karras" and betas is COSINE
        with float64_diffusers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, timesteps = diffusers_loop(config, solver, steps, recurrence.timesteps if fractional else None)
        np.testing.assert_allclose(recurrence.timesteps, timesteps, atol=1 if fractional else 1e-9, rtol=0)
        scale = np.abs(expected).max()
        exact = our_loop(recurrence, exact_rows(recurrence, K), K, steps)
        close = 1e-6 if solver == "lcm" else 1e-8  # diffusers computes LCM's boundary condition in float32
        np.testing.assert_allclose(exact, expected, atol=close * scale, rtol=0, err_msg=f"{steps} steps")
        table = rows(schedule, solver, steps, 1.0, K)
        assert table.rows.dtype == np.float32
        rounded = our_loop(recurrence, table.rows.astype(np.float64), K, steps)
        np.testing.assert_allclose(rounded, expected, atol=2e-6 * scale, rtol=0, err_msg=f"{steps} steps, float32")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", PEERS)
def test_pictures_begin_later_and_are_kept_as_in_diffusers(solver, spacing):
    """With a soft mask. Multistep solvers begin without a history, and theirs is not blended."""
    config = {
        **STABLE_DIFFUSION,
        "prediction_type": "v_prediction",
        "timestep_spacing": spacing,
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    picture, mask = np.random.default_rng(1).normal(size=SIZE), np.linspace(0, 1, SIZE)
    schedule, K, steps = NoiseSchedule.from_config(config), HISTORY[solver], 8
    for start in (0,) if solver == "plms" else (0, 1, 3, 7):  # see `plms` about diffusers' PNDMScheduler
        recurrence = solve(schedule, solver, steps, start)
        with float64_diffusers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, timesteps = diffusers_loop(config, solver, steps, None, start, (picture, mask))
        np.testing.assert_allclose(recurrence.timesteps, timesteps, atol=1e-9, rtol=0)
        ours = our_loop(recurrence, exact_rows(recurrence, K), K, steps, (picture, mask))
        close = 1e-6 if solver == "lcm" else 1e-8
        np.testing.assert_allclose(ours, expected, atol=close * np.abs(expected).max(), rtol=0, err_msg=f"{start}")


def test_plms_begins_anew_after_steps_that_are_left_out():
    """As if the schedule had begun there: its first two rows average two outputs over one stride."""
    schedule = NoiseSchedule(**STABLE_DIFFUSION, timestep_spacing="leading")
    whole, part = solve(schedule, "plms", 10), solve(schedule, "plms", 10, 4)
    np.testing.assert_array_equal(part.timesteps, [whole.timesteps[5], *whole.timesteps[6:7], *whole.timesteps[6:]])
    np.testing.assert_allclose(part.A[0, :2], [part.A[0, 0], 0])


@pytest.mark.parametrize(
    ("steps", "strength", "left"), [(20, 0.8, 4), (10, 0.29, 8), (4, 1.0, 0), (7, 0.5, 4), (3, 0.34, 2)]
)
def test_skipped_steps_are_diffusers(steps, strength, left):
    pipeline = types.SimpleNamespace(scheduler=types.SimpleNamespace(timesteps=np.arange(steps), order=1))
    timesteps, kept = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
    assert schedules.skipped(steps, strength) == left == steps - kept == steps - len(timesteps)
    with pytest.raises(RequestError, match="strength must leave at least one of the"):
        schedules.skipped(steps, 0.5 / steps)


@pytest.mark.parametrize("betas", [STABLE_DIFFUSION, COSINE], ids=["stable-diffusion", "cosine"])
@pytest.mark.parametrize("prediction", noise_schedule.PREDICTION_TYPES)
@pytest.mark.parametrize("solver", PEERS)
def test_close_to_diffusers_as_it_is(solver, prediction, betas):
    """diffusers keeps its own tables in float32, which is what it loses against the exact ones."""
    if not runs(solver, prediction, zero_snr=False):
        return
    config = {
        **betas,
        "prediction_type": prediction,
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
    }
    recurrence = solve(NoiseSchedule.from_config(config), solver, 20)
    shown = recurrence.timesteps if solver == "dpm++2m-karras" else None
    expected, _ = diffusers_loop(config, solver, 20, shown)
    ours = our_loop(recurrence, exact_rows(recurrence, HISTORY[solver]), HISTORY[solver], 20)
    np.testing.assert_allclose(ours, expected, atol=2e-4 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "betas", [STABLE_DIFFUSION, COSINE, {}, TRAINED], ids=["stable-diffusion", "cosine", "linear", "trained"]
)
def test_alphas_cumprod(betas, zero_snr):
    with float64_diffusers():
        expected = diffusers.DDIMScheduler(**betas, rescale_betas_zero_snr=zero_snr).alphas_cumprod.numpy()
    ours = NoiseSchedule(**betas, rescale_betas_zero_snr=zero_snr).alphas_cumprod()
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-16)
    assert (ours[-1] == 0) == zero_snr


@pytest.mark.parametrize("solver", PEERS)
def test_clean_prediction_ends_clean(solver):
    """A network that knows the answer is believed: the loop ends at x0 itself, in x0's scale."""
    schedule = NoiseSchedule(**STABLE_DIFFUSION, prediction_type="v_prediction", timestep_spacing="trailing")
    abar = schedule.alphas_cumprod()
    x0, noise = np.random.default_rng(0).normal(size=(2, 1, SIZE))
    recurrence = solve(schedule, solver, 10)
    K = HISTORY[solver]
    table = exact_rows(recurrence, K)
    x, history = noise * recurrence.init_sigma, np.zeros((1, K, SIZE))
    for row in table:
        alpha = math.sqrt(abar[round(row[0])])
        sigma = math.sqrt(1 - alpha**2)
        epsilon = (row[1] * x - alpha * x0) / sigma
        x, history = reference_step(row[None], x, history, alpha * epsilon - sigma * x0)
    # PLMS mixes velocities of different timesteps, as diffusers does, so it is only near; LCM's boundary condition
    # keeps (0.05 / t)² of the noise.
    np.testing.assert_allclose(x, x0, atol={"plms": 0.2, "lcm": 1e-5}.get(solver, 1e-9))


def test_early_steps_stay_on_the_line_and_lean_to_noise():
    """A network that knows picture and noise is taken to α x0 + σ ε of the next timestep, and ends at x0."""
    schedule = NoiseSchedule(**STABLE_DIFFUSION, prediction_type="v_prediction")
    abar = schedule.alphas_cumprod()
    x0, noise = np.random.default_rng(0).normal(size=(2, 1, SIZE))
    for steps in (1, 2, 4, 10, 31):
        recurrence = solve(schedule, "ddim-early", steps)
        t = recurrence.timesteps.astype(int)
        assert t[0] == 999 and (np.diff(t) < 0).all() and (t[1:] > 999 - 1000 * np.arange(1, steps) / steps).all()
        x = math.sqrt(abar[999]) * x0 + math.sqrt(1 - abar[999]) * noise
        for row, after in zip(exact_rows(recurrence, 0), [*t[1:], -1], strict=True):
            alpha, sigma = math.sqrt(abar[int(row[0])]), math.sqrt(1 - abar[int(row[0])])
            x, _ = reference_step(row[None], x, np.zeros((1, 0, SIZE)), alpha * noise - sigma * x0)
            there = 1.0 if after < 0 else abar[after]
            np.testing.assert_allclose(x, math.sqrt(there) * x0 + math.sqrt(1 - there) * noise, atol=1e-12)
    assert solve(schedule, "ddim-early", 4).timesteps.tolist() == [999, 937, 749, 437]
    with pytest.raises(RequestError, match="Choose 31 or fewer"):
        solve(schedule, "ddim-early", 60)


def test_lcm_takes_as_many_steps_as_it_was_distilled_on():
    assert solve(NoiseSchedule(), "lcm", 4).timesteps.tolist() == [999, 759, 499, 259]  # as diffusers' own
    assert rows(NoiseSchedule(), "lcm", 4, 1, 0).stochastic
    with pytest.raises(RequestError, match="more than the 50"):
        solve(NoiseSchedule(), "lcm", 51)


def test_table():
    table = rows(NoiseSchedule(), "plms", 10, 7.5, num_history=6)
    assert table.rows.shape == (11, len(row_columns(6))) and table.timesteps.shape == (11,)
    assert table.timesteps[1] == table.timesteps[2]
    assert not table.rows[:, 14:].any()  # the history that PLMS does not use
    assert table.rows[:, 12:14].any() and set(table.rows[:, 2]) == {7.5}
    assert not table.stochastic and rows(NoiseSchedule(), "ddpm", 10, 1, 0).stochastic
    np.testing.assert_array_equal(
        rows(NoiseSchedule(), "ddim", 10, 2.0, 0).rows, rows(NoiseSchedule(), "ddim", 10, 2.0, 4).rows[:, :6]
    )
    assert rows(NoiseSchedule(), "ddpm", 10, 1, 0).rows[-1, 5] == 0  # no noise on the result


def test_trailing_never_visits_a_timestep_before_0():
    """For 62 of 1000 step counts, 61 the first, diffusers' "trailing" appends a timestep of -1."""
    for steps in range(1, 1001):
        timesteps = solve(NoiseSchedule(timestep_spacing="trailing"), "ddim", steps).timesteps
        assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0


@pytest.mark.parametrize("solver", PEERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_all_step_counts_are_finite_or_refused(solver, spacing):
    schedule = NoiseSchedule(num_train_timesteps=50, timestep_spacing=spacing, steps_offset=1)
    for steps in range(1, 51):
        try:
            table = rows(schedule, solver, steps, 1.0, 4)
        except RequestError:
            assert steps > 24
        else:
            assert np.isfinite(table.rows).all() and math.isfinite(table.init_sigma)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "from 1 to 1000"),
        ({"steps": 1001}, "from 1 to 1000"),
        ({"steps": 2.5}, "whole number"),
        ({"solver": "heun"}, "ddim, ddpm, euler"),
        ({"guidance": math.nan}, "finite"),
        ({"guidance": math.inf}, "finite"),
        ({"guidance": "strong"}, "finite"),
        ({"solver": "plms"}, "needs 4 history tensors .* has 1.*Choose ddim, ddpm, euler, dpm"),
        ({"solver": "dpm++2m", "num_history": 0}, "Choose ddim, ddpm, euler,"),
        ({"solver": "dpm++2m", "steps": 1000}, "twice"),
    ],
)
def test_refusals_say_what_is_allowed(change, words):
    request = {"solver": "ddim", "steps": 10, "guidance": 1.0, "num_history": 1, **change}
    with pytest.raises(RequestError, match=words):
        rows(NoiseSchedule(), **request)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule.*scaled_linear"),
        ({"prediction_type": "flow_prediction"}, "prediction_type"),
        ({"timestep_spacing": "random"}, "timestep_spacing"),
        ({"clip_sample": True}, "clip_sample must be False, got True"),
        ({"thresholding": True}, "thresholding"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas must be 1000 numbers, got 2"),
        ({"trained_betas": [0.1, 1.0], "num_train_timesteps": 2}, "trained_betas"),
        ({"variance_type": "learned_range"}, "fixed_small"),
        ({"final_sigmas_type": "sigma_min"}, "zero"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start <= beta_end"),
        ({"beta_end": math.nan}, "beta_end must be .* got nan"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"steps_offset": None}, "steps_offset"),
    ],
)
def test_unsupported_configurations_are_refused(config, words):
    with pytest.raises(BundleError, match=words):
        NoiseSchedule.from_config(config)


def test_reads_what_diffusers_saves():
    for name, extra in PEERS.values():
        scheduler = getattr(diffusers, name)(**STABLE_DIFFUSION, **extra)
        schedule = NoiseSchedule.from_config({**scheduler.config, "an_option_of_tomorrow": 1})
        assert schedule.beta_end == 0.012 and schedule.timestep_spacing == scheduler.config.timestep_spacing


def test_offset_beyond_training_is_refused():
    with pytest.raises(RequestError, match="fewer steps"):
        rows(NoiseSchedule(steps_offset=1), "ddim", 1000, 1.0, 0)


def test_reference_step_is_per_row():
    generator = np.random.default_rng(1)
    row, history = generator.normal(size=(3, 10)), generator.normal(size=(3, 2, 4, 5))
    x, m, noise = generator.normal(size=(3, 3, 4, 5))
    together = reference_step(row, x, history, m, noise)
    for i in range(3):
        part = slice(i, i + 1)
        alone = reference_step(row[part], x[part], history[part], m[part], noise[part])
        np.testing.assert_array_equal(alone[0], together[0][part])
        np.testing.assert_array_equal(alone[1], together[1][part])


def test_guidance_in_an_interval_of_the_steps():
    schedule = NoiseSchedule(timestep_spacing="trailing", prediction_type="v_prediction")
    guidance = rows(schedule, "ddim", 10, 4.0, 1, (0.2, 0.5)).rows[:, 2]
    assert guidance.tolist() == [1, 1, 4, 4, 4, 1, 1, 1, 1, 1]
    everywhere = rows(schedule, "ddim", 10, 4.0, 1)
    assert set(everywhere.rows[:, 2]) == {4.0}
    np.testing.assert_array_equal(
        np.delete(rows(schedule, "ddim", 10, 4.0, 1, (0.2, 0.5)).rows, 2, 1), np.delete(everywhere.rows, 2, 1)
    )
