"""Attention for training on a CPU computes what PyTorch's does."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from handiffuser.training.attention import attention, plain_attention
from handiffuser.training.loop import Stage, Trainer, fit
from handiffuser.training.recipe import Plan
from torch import nn

Q, L, D, V = 5, 7, 12, 8
GENERATOR = torch.Generator().manual_seed(0)
QUERY, KEY, VALUE = (torch.randn(2, 3, *shape, generator=GENERATOR) for shape in ((Q, D), (L, D), (L, V)))
SEEN = torch.rand(2, 1, Q, L, generator=GENERATOR) < 0.7
SEEN[..., 0] = True
WAYS = {
    "plain": {},
    "scale": {"scale": 1.0},
    "bool": {"attn_mask": SEEN},
    "added": {"attn_mask": torch.randn(Q, L, generator=GENERATOR)},
    "causal": {"is_causal": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_pytorchs(way):
    results = []
    for function in (F.scaled_dot_product_attention, attention):
        inputs = [tensor.clone().requires_grad_() for tensor in (QUERY, KEY, VALUE)]
        mixed = function(*inputs, **WAYS[way])
        mixed.square().sum().backward()
        results.append([mixed, *(tensor.grad for tensor in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_under_autocast_it_stays_in_bfloat16():
    query, key, value = (tensor.bfloat16() for tensor in (QUERY, KEY, VALUE))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attention(query, key, value)
    assert mixed.dtype == torch.bfloat16
    exact = F.scaled_dot_product_attention(QUERY, KEY, VALUE)
    torch.testing.assert_close(mixed.float(), exact, atol=0.05, rtol=0.05)


def test_all_modules_use_it_while_it_lasts(monkeypatch):
    calls = []
    monkeypatch.setattr("handiffuser.training.attention.attention", lambda *args, **kwargs: calls.append(kwargs))
    long = torch.zeros(1, 1, 1 << 18, 2)
    with plain_attention():
        F.scaled_dot_product_attention(QUERY, KEY, VALUE, scale=2.0)
        F.scaled_dot_product_attention(long, long[:, :, :2], long[:, :, :2])  # its weights would fill the memory
        torch.nn.functional.scaled_dot_product_attention(QUERY, KEY, VALUE, dropout_p=0.5)  # PyTorch's own
    F.scaled_dot_product_attention(QUERY, KEY, VALUE)
    assert calls == [{"scale": 2.0}]


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 4)

    def forward(self, x):
        return F.scaled_dot_product_attention(self.query(x), x, x).square().mean()


def stage() -> Stage:
    rows = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(0))
    return Stage("fit", Attends(), lambda at: {"x": rows[list(at)]}, lambda rows, draws: (rows["x"],), range(8))


def test_steps_on_a_cpu_use_it(tmp_path, monkeypatch):
    calls = []
    ours = attention

    def counted(*args, **kwargs):
        calls.append(1)
        return ours(*args, **kwargs)

    monkeypatch.setattr("handiffuser.training.attention.attention", counted)
    fit(stage(), Plan(steps=2, batch=4, warmup=1), tmp_path)
    assert len(calls) == 2


@pytest.mark.parametrize("way", ["compile", "gradient_checkpointing"])
def test_some_ways_of_training_keep_pytorchs_own(way, tmp_path):
    trainer = Trainer(stage(), Plan(steps=2, batch=4, **{way: True}), tmp_path)
    assert isinstance(trainer.attention, nullcontext)


@pytest.mark.parametrize("more", [{"dropout_p": 0.1}, {"enable_gqa": True}])
def test_what_our_networks_lack_is_refused(more):
    with pytest.raises(NotImplementedError, match="neither dropout nor grouped queries"):
        attention(QUERY, KEY, VALUE, **more)
