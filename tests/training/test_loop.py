"""The training loop: killed anywhere, on any number of processes, it ends where an undisturbed run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from handiffuser.errors import TrainingError
from handiffuser.training import loop
from handiffuser.training.cli import LOCK, alone
from handiffuser.training.draws import Draws, order, rows_of
from handiffuser.training.loop import Stage, _Steps, fit
from handiffuser.training.recipe import Plan
from handiffuser.training.state import STATE, Average, averages, changes, finished, load_state
from safetensors.torch import load_file
from torch import nn

PLAN = Plan(steps=8, batch=12, learning_rate=0.05, warmup=2, save_every=4, log_every=4, validate_every=4)


class Fitted(nn.Module):
    """(x0 x1)(n), learned from noisy samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x, noise):
        return (self.layers(x + 0.01 * noise)[:, 0] - x[:, 0] * x[:, 1]).square().mean()


def read(rows):
    return {"x": torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(row)) for row in rows])}


def inputs(rows, draws):
    return rows["x"] * (0.5 + draws.uniform()[:, None]), draws.normal(3)


def stage(**changes):
    return Stage(
        "fit", Fitted(), read, inputs, **{"train": range(100), "held": range(100, 110), "data": "d", **changes}
    )


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_clock_ends_a_stage_and_lowers_its_rate(tmp_path, monkeypatch):
    """A second a step: 30 steps in half a minute. A run that was stopped keeps the time that it took."""
    now = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(rows):
        now[0] += 1.0
        return read(rows)

    def timed():
        made = stage(held=())
        made.read = slow
        return made

    plan = msgspec.structs.replace(PLAN, steps=10_000, minutes=0.5, warmup=0, log_every=1, save_every=10)
    fit(timed(), plan, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines]
    assert lines[-1]["step"] == 30 and rates == sorted(rates, reverse=True) and rates[-1] < 0.01 * plan.learning_rate
    assert finished(tmp_path, plan.steps, 0.5) and not finished(tmp_path, plan.steps, 0.6)
    assert not finished(tmp_path, plan.steps)
    fit(timed(), plan, tmp_path)
    assert now[0] == 30, "a finished stage takes no more time"
    fit(timed(), msgspec.structs.replace(plan, minutes=0.75), tmp_path)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 45
    assert plan.rate(15, 0.5) == pytest.approx(plan.learning_rate / 2)


def test_bfloat16_only_where_it_is_fast(tmp_path, monkeypatch, capsys):
    """Without instructions for it, PyTorch's convolutions take fifty times as long."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for fast, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(loop, "has_bf16", lambda fast=fast: fast)
        assert loop.usable("bf16") == wanted and loop.usable("fp16") == "fp16" and loop.usable("fp32") == "fp32"
    half = fit(stage(), msgspec.structs.replace(PLAN, precision="bf16"), tmp_path / "half")
    assert "trains in float32" in capsys.readouterr().err
    assert same(half, fit(stage(), PLAN, tmp_path / "full"))


def test_resumed_equals_uninterrupted(tmp_path):
    whole = fit(stage(), PLAN, tmp_path / "whole")

    def stop(step):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(stage(on_save=stop), PLAN, tmp_path / "halves")
    assert not finished(tmp_path / "halves", 8) and finished(tmp_path / "halves", 4)
    halves = fit(stage(), PLAN, tmp_path / "halves")
    assert same(whole, halves) and finished(tmp_path / "halves", 8)
    untouched = Stage("fit", Fitted(), lambda rows: pytest.fail("trained again"), inputs, range(100), data="d")
    assert same(whole, fit(untouched, PLAN, tmp_path / "halves"))
    learned = averages(tmp_path / "halves")
    assert all(torch.equal(learned[name], value) for name, value in whole.state_dict().items())


def test_parts_of_a_batch_add_up_to_it(tmp_path):
    whole = fit(stage(), PLAN, tmp_path / "whole")
    parts = fit(stage(), msgspec.structs.replace(PLAN, accumulate=3), tmp_path / "parts")
    for one, other in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_workers_change_nothing(tmp_path):
    one = fit(stage(), PLAN, tmp_path / "one")
    assert same(one, fit(stage(), msgspec.structs.replace(PLAN, workers=2), tmp_path / "two"))


def test_rows_that_are_held_give_the_same_steps():
    """On a CPU, where every row draws for itself; a GPU draws other numbers."""
    plan = Plan(batch=6, accumulate=2, seed=3)
    read_ahead = _Steps(stage(), plan, 1, 2)
    held = _Steps(stage(), plan, 1, 2, torch.device("cpu"))
    for step in (0, 5):
        for one, other in zip(read_ahead[step], held[step], strict=True):
            assert all(map(torch.equal, one, other))


def test_it_learns_and_validates(tmp_path):
    plan = msgspec.structs.replace(PLAN, steps=300, save_every=1000, validate_every=10)
    fit(stage(), plan, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    scores = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(scores) == 30 and scores[-1] < 0.5 * scores[0]
    assert plan.rate(0) < plan.rate(1) and plan.rate(299) < 1e-4 * plan.learning_rate
    assert {"loss", "learning_rate", "samples_per_second", "gradient_norm"} <= lines[0].keys()


def test_every_sample_comes_once_in_an_epoch():
    seen = [row for step in range(25) for row in rows_of(step, 100, 12, seed=3)]
    assert sorted(seen[:100]) == list(range(100)) and sorted(seen[100:200]) == list(range(100))
    assert seen[:100] != seen[100:200]
    assert seen[12:24] == rows_of(1, 100, 12, seed=3) != rows_of(1, 100, 12, seed=4)
    assert not np.array_equal(order(0, 0, 100), order(0, 1, 100))


def test_a_row_draws_the_same_in_any_process():
    whole = Draws(1, 5, 6, range(6))
    parts = [Draws(1, 5, 6, range(rank, 6, 3)) for rank in range(3)]
    for ask in (
        lambda d: d.normal(4, 2),
        lambda d: d.uniform()[:, None],
        lambda d: d.integers(50)[:, None],
        lambda d: d.spread()[:, None],
    ):
        expected, found = ask(whole), [ask(part) for part in parts]
        assert all(torch.equal(expected[rank::3], found[rank]) for rank in range(3))
    assert {whole.one(1000)} == {part.one(1000) for part in parts}
    spread = Draws(1, 5, 100, range(100)).spread().sort().values
    assert (spread * 100).diff().max() < 2.1  # one in every hundredth


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (msgspec.structs.replace(PLAN, batch=6), "batch must stay"),
        (msgspec.structs.replace(PLAN, seed=2), "seed must stay"),
        (msgspec.structs.replace(PLAN, accumulate=5), "multiple of 5"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path, plan, words):
    fit(stage(), msgspec.structs.replace(PLAN, steps=2), tmp_path)
    with pytest.raises(TrainingError, match=words):
        fit(stage(), plan, tmp_path)


def test_other_data_and_damaged_states_are_refused(tmp_path):
    fit(stage(), msgspec.structs.replace(PLAN, steps=2), tmp_path)
    with pytest.raises(TrainingError, match="data must stay"):
        fit(stage(data="other"), PLAN, tmp_path)
    path = tmp_path / STATE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match="is damaged"):
        fit(stage(), PLAN, tmp_path)


def test_a_diverging_run_says_so(tmp_path):
    def explode(rows, draws):
        return rows["x"] * float("inf"), draws.normal(3)

    with pytest.raises(TrainingError, match="Lower the --learning-rate"):
        fit(Stage("fit", Fitted(), read, explode, range(100)), PLAN, tmp_path)


def test_a_full_disk_keeps_the_last_state(tmp_path, monkeypatch):
    from handiffuser.training import state

    fit(stage(), msgspec.structs.replace(PLAN, steps=4), tmp_path)
    before = load_file(tmp_path / STATE)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(TrainingError, match="No space left"):
        fit(stage(), PLAN, tmp_path)
    monkeypatch.undo()
    after = load_file(tmp_path / STATE)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


SCRIPT = textwrap.dedent(
    """
    import sys
    from pathlib import Path

    sys.path.insert(0, sys.argv[1])
    import test_loop

    from handiffuser.training.loop import fit
    from handiffuser.training.processes import run_processes

    def go(folder, steps, batch, shard):
        import msgspec
        plan = msgspec.structs.replace(
            test_loop.PLAN, steps=steps, batch=batch, shard=shard, save_every=3, schedule=sys.argv[6]
        )
        fit(test_loop.stage(), plan, Path(folder))

    if __name__ == "__main__":
        folder, steps, count, shard = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "shard"
        run_processes(go, count, folder, steps, 12, shard)
    """
)


def command(tmp_path, folder, steps, processes, shard=False, schedule="cosine"):
    from pathlib import Path

    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    words = (Path(__file__).parent, folder, steps, processes, "shard" if shard else "whole", schedule)
    return [sys.executable, str(script), *map(str, words)]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_on_two_processes_it_is_the_same_run(tmp_path, shard):
    """The gradients agree to rounding; also begun on one process and gone on with on two, and back."""
    plan = msgspec.structs.replace(PLAN, steps=9, save_every=3, schedule="constant")  # a cosine depends on its end
    one = fit(stage(), plan, tmp_path / "one")
    for steps, processes in ((6, 2), (9, 2)) if shard else ((3, 1), (6, 2), (9, 1)):
        result = subprocess.run(
            command(tmp_path, tmp_path / "more", steps, processes, shard, "constant"),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-2000:]
    found = averages(tmp_path / "more")
    for name, value in one.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_weights(tmp_path):
    """kill -9 at five random moments of a run of one process: bit for bit."""
    whole = fit(stage(), msgspec.structs.replace(PLAN, steps=2000, save_every=3, log_every=1000), tmp_path / "whole")
    run = command(tmp_path, tmp_path / "killed", 2000, 1)
    for step in sorted(np.random.default_rng(0).choice(np.arange(30, 1600), 5, replace=False).tolist()):
        process = subprocess.Popen(run, stderr=subprocess.DEVNULL)
        while not finished(tmp_path / "killed", step):
            assert process.poll() is None, "the run was over before it could be killed"
            time.sleep(0.003)
        process.kill()
        assert process.wait() == -signal.SIGKILL and not finished(tmp_path / "killed", 2000)
    assert subprocess.run(run, stderr=subprocess.DEVNULL, timeout=300).returncode == 0
    found = averages(tmp_path / "killed")
    assert finished(tmp_path / "killed", 2000)
    assert all(torch.equal(found[name], value) for name, value in whole.state_dict().items())


class Breaks(Fitted):
    """Its loss is NaN or infinite in some steps, counted from the first."""

    def __init__(self, steps, infinite=False) -> None:
        super().__init__()
        self.steps, self.infinite, self.calls = steps, infinite, 0

    def forward(self, x, noise):
        loss = super().forward(x, noise)
        if self.training:
            self.calls += 1
            if self.calls - 1 in self.steps:  # NaN, or a finite loss whose gradient is infinite
                return loss + (loss - loss.detach()).abs().sqrt() if self.infinite else loss * float("nan")
        return loss


def broken(*steps):
    return Stage("fit", Breaks(steps), read, inputs, range(100), data="d")


def test_a_step_without_a_gradient_is_left_out_and_many_end_the_run(tmp_path):
    """Also where it is one that is logged. Once weights are no numbers, no step is one."""
    plan = msgspec.structs.replace(PLAN, schedule="constant", log_every=2)
    found = fit(broken(3, 5), plan, tmp_path / "two").state_dict()
    assert all(torch.isfinite(value).all() for value in found.values())
    assert not same(fit(stage(), plan, tmp_path / "none"), fit(broken(3, 5), plan, tmp_path / "again"))
    with pytest.raises(TrainingError, match="the loss became nan at step 5"):
        fit(broken(*range(2, 100)), plan, tmp_path / "many")
    steep = Stage("fit", Breaks(range(2, 100), infinite=True), read, inputs, range(100), data="d")
    with pytest.raises(TrainingError, match="the gradient became infinite or NaN at step 5"):
        fit(steep, plan, tmp_path / "steep")


def test_one_bad_step_is_counted_and_spoils_no_other_line(tmp_path, capsys):
    plan = msgspec.structs.replace(PLAN, schedule="constant", log_every=1, steps=12)
    fit(broken(3, 7), plan, tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "  loss " in line]
    assert len(said) == 11 and not any("nan" in line for line in said)
    assert "(1 step left out: not finite)" in said[5] and "(2 steps left out: not finite)" in said[-1]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if line.get("loss", 0) is None] == [None, None], "JSON has no NaN"


def test_going_on_with_other_settings_is_said(tmp_path, capsys):
    fit(stage(), msgspec.structs.replace(PLAN, steps=4), tmp_path)
    capsys.readouterr()
    fit(stage(), msgspec.structs.replace(PLAN, steps=6, save_every=3, log_every=1), tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "other settings than before: steps 4 (now 6); the learning rate would be 0 here and becomes 0.025" in said
    fit(stage(), msgspec.structs.replace(PLAN, steps=8, learning_rate=0.5, clip=2.0), tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert "learning_rate 0.05 (now 0.5)" in said and "clip 1.0 (now 2.0)" in said and "--run" in said
    assert changes(tmp_path, PLAN) == "learning_rate 0.5 (now 0.05), clip 2.0 (now 1.0)", "of a run that is done"
    fit(stage(), msgspec.structs.replace(PLAN, steps=9, learning_rate=0.5, clip=2.0, workers=0), tmp_path)
    capsys.readouterr()
    assert not changes(tmp_path, msgspec.structs.replace(PLAN, steps=9, learning_rate=0.5, clip=2.0, log_every=9))


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    """The lock is the process's own: killed, it is free at once, though what it forked lives on."""
    script = f"""
import os, time
from pathlib import Path
from handiffuser.files import lock
held = lock(Path({str(tmp_path / LOCK)!r}))
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, b"x")  # it runs, and has let go of the lock
    time.sleep(30)
    os._exit(0)
os.read(reader, 1)
print("held", flush=True)
time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with (
            pytest.raises(TrainingError, match=f"Another hd-train uses .* \\(process {other.pid}\\)"),
            alone(tmp_path),
        ):
            pass
        other.kill()
        other.wait()
        with alone(tmp_path):
            pass
        with alone(tmp_path):
            pass
    finally:
        os.killpg(other.pid, signal.SIGKILL)


def test_a_state_goes_back_to_where_its_parameters_are(tmp_path):
    """AdamW's fused kernel counts its steps on the parameters' device, which is not where a file is read to."""
    whole = fit(stage(), PLAN, tmp_path)
    elsewhere = stage()
    elsewhere.module.to("meta")  # stands for a GPU
    parameters = dict(elsewhere.module.named_parameters())
    for fused in (True, False):
        optimizer = torch.optim.AdamW(parameters.values(), foreach=False)
        optimizer.defaults["fused"] = fused
        assert load_state(tmp_path, PLAN, elsewhere, Average(parameters), optimizer) == PLAN.steps
        for parameter in parameters.values():
            state = optimizer.state[parameter]
            assert state["exp_avg"].device == parameter.device
            assert state["step"].device.type == ("meta" if fused else "cpu")
    assert len(parameters) == len(dict(whole.named_parameters()))
