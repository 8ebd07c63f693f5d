"""Attention for training on a CPU computes what PyTorch's does."""

import pytest
import torch
import torch.nn.functional as F
from handiffuser.training.attention import attention, plain_attention

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


@pytest.mark.parametrize("more", [{"dropout_p": 0.1}, {"enable_gqa": True}])
def test_what_our_networks_lack_is_refused(more):
    with pytest.raises(NotImplementedError, match="neither dropout nor grouped queries"):
        attention(QUERY, KEY, VALUE, **more)
