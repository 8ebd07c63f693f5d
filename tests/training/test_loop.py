"""The training loop: a run that was stopped goes on as if it had not been."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from handiffuser.training.loop import Plan, finished, fit
from torch import nn

PLAN = Plan(steps=8, learning_rate=0.05, warmup=2, save_every=4, log_every=4)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def loss(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(16, 3, generator=generator)
    return (module(x)[:, 0] - x[:, 0] * x[:, 1]).square().mean()


def test_resumed_equals_uninterrupted(tmp_path):
    whole = fit("whole", model(), loss, PLAN, tmp_path / "whole")

    def stop(_: nn.Module, step: int) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit("halves", model(), loss, PLAN, tmp_path / "halves", stop)
    assert not finished(tmp_path / "halves", 8) and finished(tmp_path / "halves", 4)
    halves = fit("halves", model(), loss, PLAN, tmp_path / "halves")
    for one, other in zip(whole.state_dict().values(), halves.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert finished(tmp_path / "halves", 8)


def test_a_finished_run_is_only_loaded(tmp_path):
    first = fit("run", model(), loss, PLAN, tmp_path)
    again = fit("run", model(), lambda *_: pytest.fail("trained again"), PLAN, tmp_path)
    for one, other in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_it_learns_and_the_rate_falls_to_zero(tmp_path):
    plan = replace(PLAN, steps=300, save_every=1000)
    generator = torch.Generator().manual_seed(5)
    before = loss(model(), generator).item()
    trained = fit("learn", model(), loss, plan, tmp_path)
    assert loss(trained, torch.Generator().manual_seed(5)).item() < 0.5 * before
    assert plan.rate(0) < plan.rate(1) and plan.rate(299) < 1e-4 * plan.learning_rate


def test_a_diverging_run_says_so(tmp_path):
    def explode(module: nn.Module, generator: torch.Generator) -> torch.Tensor:
        return loss(module, generator) * float("inf")

    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        fit("boom", model(), explode, PLAN, tmp_path)
