"""SMPL-H forward kinematics: joint rotations and shape -> a posed mesh and its joints.

The arithmetic is linear blend skinning as in SMPL (Loper et al. 2015) with the hands of MANO (Romero et al. 2017).
The code is written for tracing: the parents are Python integers, rotations are matrices, no operation is in place, and
two small tables hold the joint regression. Tests compare it with `smplx`.

    body = SMPLH.load("body.npz")
    vertices, joints = body(torch.eye(3).expand(1, 52, 3, 3), torch.zeros(1, 10))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..contract import HAND_JOINTS as HAND_JOINTS
from ..errors import CheckpointError

# The kinematic tree: pelvis, 21 body joints, 15 joints of the left hand, 15 of the right.
PARENTS = (
    *(-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19),
    *(20, 22, 23, 20, 25, 26, 20, 28, 29, 20, 31, 32, 20, 34, 35),
    *(21, 37, 38, 21, 40, 41, 21, 43, 44, 21, 46, 47, 21, 49, 50),
)
NUM_JOINTS = len(PARENTS)  # 52
# The tree by depth: `kinematics` turns the joints [n] of a level together. One joint at a time would be 51 tiny kernels
# in a row.
LEVELS = [[0]]
while deeper := [joint for joint, parent in enumerate(PARENTS) if parent in LEVELS[-1]]:
    LEVELS.append(deeper)
BY_DEPTH = [joint for level in LEVELS for joint in level]
BY_NUMBER = sorted(range(NUM_JOINTS), key=BY_DEPTH.__getitem__)
NUM_BETAS = 10
LEFT_WRIST, RIGHT_WRIST = 20, 21

# Vertices at the finger tips, thumb to little finger, left hand then right hand. They follow the 52 joints as 52-61.
TIP_VERTICES = (2746, 2319, 2445, 2556, 2673, 6191, 5782, 5905, 6016, 6133)

REQUIRED = ("v_template", "shapedirs", "posedirs", "J_regressor", "kintree_table", "weights", "f")


class SMPLH(nn.Module):
    """A body in SMPL-H format.

    Rotations are absolute with respect to the template's flat hand: `flat_hand_mean=True` in smplx's terms.
    """

    v_template: Tensor  # [V, 3] metres
    shape_dirs: Tensor  # [num_betas, V * 3]
    pose_dirs: Tensor | None  # [459, V * 3]; None where the body has none (the demo's): a smaller graph
    j_template: Tensor  # [52, 3]
    j_shape_dirs: Tensor  # [num_betas, 52 * 3]
    weights: Tensor  # [V, 52]
    faces: Tensor  # [F, 3]

    def __init__(self, arrays: dict[str, np.ndarray], num_betas: int = NUM_BETAS) -> None:
        super().__init__()
        template = np.asarray(arrays["v_template"], np.float64)
        shape_dirs = np.asarray(arrays["shapedirs"], np.float64)[:, :, :num_betas]
        regressor = np.asarray(arrays["J_regressor"], np.float64)
        pose_dirs = np.asarray(arrays["posedirs"], np.float64).reshape(len(template) * 3, -1).T

        def keep(name: str, value: np.ndarray) -> None:
            # Outside the state_dict: the body may be licensed, so saved weights must not hold it.
            self.register_buffer(name, torch.tensor(np.ascontiguousarray(value, np.float32)), persistent=False)

        keep("v_template", template)
        keep("shape_dirs", shape_dirs.transpose(2, 0, 1).reshape(num_betas, -1))
        keep("j_template", regressor @ template)
        keep("j_shape_dirs", np.einsum("jv,vcb->bjc", regressor, shape_dirs).reshape(num_betas, -1))
        keep("weights", np.asarray(arrays["weights"], np.float64))
        if np.any(pose_dirs):
            keep("pose_dirs", pose_dirs)
        else:
            self.pose_dirs = None
        self.register_buffer("faces", torch.tensor(np.asarray(arrays["f"], np.int64)), persistent=False)

    @classmethod
    def load(cls, path: str | Path, num_betas: int = NUM_BETAS) -> SMPLH:
        """Reads an SMPL-H `.npz` (v_template, shapedirs, posedirs, J_regressor, kintree_table, weights, f).

        Raises CheckpointError for a pickle, a missing array, or arrays that are not SMPL-H's.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise CheckpointError(
                f"{path} must be an .npz file: a pickle can run code when opened. Convert it safely: "
                f"hd-body convert {path.name} {path.stem}.npz"
            )
        try:
            with np.load(path, allow_pickle=False) as archive:
                missing = [name for name in REQUIRED if name not in archive]
                if missing:
                    raise CheckpointError(f"{path} must be an SMPL-H body, but lacks {', '.join(missing)}.")
                arrays = {name: archive[name] for name in REQUIRED}
        except FileNotFoundError:
            raise CheckpointError(f"The body model {path} does not exist.") from None
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as an .npz of plain arrays: {error}.") from error
        vertices = len(arrays["v_template"])
        wanted = {
            "v_template": (vertices, 3),
            "posedirs": (vertices, 3, 459),
            "J_regressor": (NUM_JOINTS, vertices),
            "kintree_table": (2, NUM_JOINTS),
            "weights": (vertices, NUM_JOINTS),
        }
        for name, shape in wanted.items():
            if arrays[name].shape != shape:
                raise CheckpointError(
                    f"{name} in {path} must be SMPL-H's of shape {shape}, got {arrays[name].shape}. "
                    "SMPL (24 joints) and SMPL-X (55 joints) bodies have other shapes."
                )
        if arrays["shapedirs"].ndim != 3 or arrays["shapedirs"].shape[2] < num_betas:
            raise CheckpointError(
                f"shapedirs in {path} must have {num_betas} betas or more, got shape {arrays['shapedirs'].shape}."
            )
        # The root's parent is stored as 2**32 - 1 (an unsigned -1).
        parents = arrays["kintree_table"][0].astype(np.int64)[1:]
        if vertices <= max(TIP_VERTICES) or tuple(parents) != PARENTS[1:]:
            raise CheckpointError(
                f"{path} must have SMPL-H's kinematic tree and vertices, got another tree or {vertices} vertices."
            )
        return cls(arrays, num_betas)

    def kinematics(self, rotations: Tensor, betas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Turns and places the 52 joints.

        rotations: [B, 52, 3, 3], each relative to its parent; betas: [B, num_betas].
        Returns the joints' orientations in the world [B, 52, 3, 3], their places [B, 52, 3] in metres, and their
        places at rest [B, 52, 3].
        """
        batch = rotations.shape[0]
        rest = self.j_template + (betas @ self.j_shape_dirs).reshape(-1, NUM_JOINTS, 3)
        offsets = torch.cat([rest[:, :1], rest[:, 1:] - take(rest, PARENTS[1:])], 1)
        rows = torch.cat([rotations, offsets[..., None]], -1)  # a rigid motion each, [3, 4]
        last = rows.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(batch, NUM_JOINTS, 1, 4)
        motions = take(torch.cat([rows, last], 2), BY_DEPTH).split([len(level) for level in LEVELS], 1)
        chain = [motions[0]]
        for above, level, motion in zip(LEVELS, LEVELS[1:], motions[1:], strict=False):
            chain.append(take(chain[-1], [above.index(PARENTS[joint]) for joint in level]) @ motion)
        world = take(torch.cat(chain, 1), BY_NUMBER)
        return world[..., :3, :3], world[..., :3, 3], rest

    def skin(self, rotations: Tensor, betas: Tensor, turns: Tensor, places: Tensor, rest: Tensor) -> Tensor:
        """Moves the vertices with the joints that `kinematics` placed: [B, V, 3] in metres."""
        batch = rotations.shape[0]
        shaped = self.v_template + (betas @ self.shape_dirs).reshape(batch, -1, 3)
        if self.pose_dirs is not None:
            away = rotations[:, 1:] - torch.eye(3, dtype=rotations.dtype, device=rotations.device)
            shaped = shaped + (away.reshape(batch, -1) @ self.pose_dirs).reshape(batch, -1, 3)
        # A vertex moves by the weighted mean of the joints' rigid motions.
        shifts = places - (turns * rest[..., None, :]).sum(-1)
        blended = (self.weights @ turns.reshape(batch, NUM_JOINTS, 9)).reshape(batch, -1, 3, 3)
        turned = (blended * shaped[..., None, :]).sum(-1)  # one matrix product per vertex would be slow
        return turned + self.weights @ shifts

    def forward(self, rotations: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
        """Poses the body.

        rotations: [B, 52, 3, 3] rotation matrices, each relative to its parent; betas: [B, num_betas].
        Returns vertices [B, V, 3] and joints [B, 62, 3] (52 joints, then the 10 finger tips), both in metres,
        x to the body's left, y up, z forward.
        """
        turns, places, rest = self.kinematics(rotations, betas)
        vertices = self.skin(rotations, betas, turns, places, rest)
        return vertices, torch.cat([places, take(vertices, TIP_VERTICES)], 1)


def take(x: Tensor, which: Sequence[int]) -> Tensor:
    """x[:, which] as one step of a graph; indexing with a list becomes three."""
    return x.index_select(1, torch.tensor(which, device=x.device))


def rotation_6d_to_matrix(x: Tensor) -> Tensor:
    """[..., 6] -> [..., 3, 3]: the first two *columns*, orthonormalised (Zhou et al. 2019, eq. 15)."""
    a, b = x[..., :3], x[..., 3:]
    a = a / a.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    b = b - (a * b).sum(-1, keepdim=True) * a
    b = b / b.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    return torch.stack([a, b, torch.linalg.cross(a, b)], -1)


def matrix_to_rotation_6d(matrix: Tensor) -> Tensor:
    """[..., 3, 3] -> [..., 6]: the first two columns one after the other."""
    return torch.cat([matrix[..., 0], matrix[..., 1]], -1)
