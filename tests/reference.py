"""What a step graph computes after its network, in numpy: the oracle for graphs, samplers and schedules."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def reference_step(row: Array, x: Array, history: Array, m: Array, noise: Array | None = None) -> tuple[Array, Array]:
    """One step: the form of a row that `core/schedules.py` describes.

    row [B, 6 + 2 K], x [B, ...], history [B, K, ...], m [B, ...] guided, noise [B, ...] or None for zeros.
    Returns the next x and history, of the same shapes.
    """
    row = np.asarray(row)
    K = history.shape[1]
    column = row.reshape(*row.shape, *[1] * (x.ndim - 1))  # [B, R, 1 ...]
    a, b, d = column[:, 3], column[:, 4], column[:, 5]
    shifted = np.concatenate([history, np.zeros_like(x)[:, None]], axis=1)  # h_1 ... h_K, 0
    x_next = a * x + b * m + shifted[:, 0]
    if noise is not None:
        x_next = x_next + d * noise
    later = [column[:, 4 + 2 * k] * x + column[:, 5 + 2 * k] * m + shifted[:, k] for k in range(1, K + 1)]
    return x_next, np.stack(later, axis=1) if K else history
