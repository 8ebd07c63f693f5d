"""Attention for training on a CPU: matrix products and a softmax, in place of PyTorch's fused kernels.

    with plain_attention():
        loss = model(*inputs)

PyTorch's fused kernels for CPUs are made for long sequences and inference. Over short ones their backward pass takes
several times as long as plain products. Heads of unequal widths, as those of the positional kernel, have no fused
kernel at all: PyTorch then computes in float32, and looks for rows that see nothing.

Under autocast the logits are bfloat16, which fused kernels keep in float32: a logit of 20 is off by up to 0.06. The
validation loss and sample grids use PyTorch's own attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

MOST = 1 << 18  # weights of a head, which plain attention keeps for the backward pass; fused kernels keep none


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` with its arguments. query [..., Q, D], key [..., L, D], value [..., L, V].

    attn_mask: broadcastable to [..., Q, L], bool (True is seen) or added to the logits. Returns [..., Q, V]. Raises
    NotImplementedError for dropout and for grouped queries, which our networks do not have.
    """
    if dropout_p or enable_gqa:
        raise NotImplementedError("plain attention has neither dropout nor grouped queries")
    logits = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    if is_causal:
        unseen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(unseen, float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        else:
            logits = logits + attn_mask
    with torch.autocast(logits.device.type, enabled=False):  # which would compute the softmax in float32
        weights = logits.softmax(-1)
    return weights @ value


SIGNATURE = inspect.signature(attention)


class plain_attention(TorchFunctionMode):  # noqa: N801, a context manager as torch.no_grad is
    """While it lasts, `attention` replaces `F.scaled_dot_product_attention` in all modules, over short sequences."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[Any], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = SIGNATURE.bind(*args, **kwargs).arguments
            short = given["query"].shape[-2] * given["key"].shape[-2] <= MOST
            if short and not given.get("dropout_p") and not given.get("enable_gqa"):
                return attention(*args, **kwargs)
        return func(*args, **kwargs)
