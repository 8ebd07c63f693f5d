"""Rotations as 6 numbers, matrices and axis-angle vectors, in numpy."""

from __future__ import annotations

import numpy as np


def rotation_6d_to_matrix(x: np.ndarray) -> np.ndarray:
    """[..., 6] -> [..., 3, 3] float64: the first two columns, orthonormalised (Zhou et al. 2019, eq. 15)."""
    a, b = x[..., :3].astype(np.float64), x[..., 3:].astype(np.float64)
    a = a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-8)
    b = b - (a * b).sum(-1, keepdims=True) * a
    b = b / np.maximum(np.linalg.norm(b, axis=-1, keepdims=True), 1e-8)
    return np.stack([a, b, np.cross(a, b)], -1)


def matrix_to_axis_angle(matrix: np.ndarray) -> np.ndarray:
    """[N, 3, 3] rotations -> [N, 3]: the axis times the angle, in radians from 0 to pi."""
    # By way of the quaternion, through whichever component is largest: stable up to and at half turns.
    m = matrix.astype(np.float64)
    trace = np.trace(m, axis1=-2, axis2=-1)
    diagonal = np.diagonal(m, axis1=-2, axis2=-1)
    squares = np.concatenate([trace[:, None], 2 * diagonal - trace[:, None]], -1) + 1  # 4 (w², x², y², z²)
    wx, wy, wz = m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]
    xy, xz, yz = m[:, 1, 0] + m[:, 0, 1], m[:, 0, 2] + m[:, 2, 0], m[:, 2, 1] + m[:, 1, 2]
    products = np.array(  # 4 q qᵀ; its rows are all the same quaternion, up to scale
        [
            [squares[:, 0], wx, wy, wz],
            [wx, squares[:, 1], xy, xz],
            [wy, xy, squares[:, 2], yz],
            [wz, xz, yz, squares[:, 3]],
        ]
    )
    q = products[squares.argmax(-1), :, np.arange(len(m))]  # [N, 4]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    q = np.where(q[:, :1] < 0, -q, q)
    sine = np.linalg.norm(q[:, 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[:, :1])
    return q[:, 1:] * np.where(sine > 1e-12, angle / np.maximum(sine, 1e-12), 2.0)


def axis_angle_to_matrix(vector: np.ndarray) -> np.ndarray:
    """[N, 3] axis times angle (radians) -> [N, 3, 3] (Rodrigues' formula)."""
    angle = np.linalg.norm(vector, axis=-1)[:, None, None]
    x, y, z = (vector / np.maximum(angle[:, 0], 1e-12)).T
    zero = np.zeros_like(x)
    k = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)
