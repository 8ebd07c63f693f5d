"""From sampled hand parameters to the Text+Hand encoder's inputs: forward kinematics, camera, hand cues.

The parameters give each hand's place and size in the image (see `PLACEMENT` in the contract), which decide the camera.
A camera that a network predicts beside the pose puts hands off the frame.

    features = HandFeatures(body, mean, std, basis)(x)
    features["joints"]  # [B, 2, 21, 2], in [0, 1] of the image's width and height

With several people (N), x is [B, N * 330] and there are 2 N hands; vertices, joints in metres and cameras get an axis
of people. Each body stands at its own origin, so each has a camera of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contract import BETAS, NUM_PARAMS, PLACEMENT, ROTATIONS
from .smplh import (
    HAND_JOINTS,
    LEFT_WRIST,
    NUM_JOINTS,
    RIGHT_WRIST,
    SMPLH,
    TIP_VERTICES,
    matrix_to_rotation_6d,
    rotation_6d_to_matrix,
    take,
)

# Each hand's rotations as MANO orders them: the wrist (in the camera's frame), then index, middle, little, ring
# finger and thumb, three joints each, relative to their parents.
HAND_ROTATIONS = ((LEFT_WRIST, *range(22, 37)), (RIGHT_WRIST, *range(37, 52)))
# The ball of basis points around the hand, in the wrist's frame of the left hand (the right is mirrored).
BASIS_CENTRE, BASIS_RADIUS = (0.09, 0.0, 0.0), 0.15  # metres
MIN_IN_FRAME = 0.5  # a hand counts as visible when at least this share of its joints is inside the image


def make_basis(num_points: int = 512, seed: int = 0) -> Tensor:
    """Basis points for both hands, [2, num_points, 3] metres in the wrists' frames, uniform in a ball."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(num_points, 3, generator=generator)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    radius = BASIS_RADIUS * torch.rand(num_points, 1, generator=generator) ** (1 / 3)
    left = direction * radius + torch.tensor(BASIS_CENTRE)
    return torch.stack([left, left * torch.tensor([-1.0, 1.0, 1.0])])


def pack(rotations: Tensor, betas: Tensor, placement: Tensor) -> Tensor:
    """Matrices [B, 52, 3, 3], betas [B, 10] and placement [B, 2, 4] -> parameters [B, P] (not normalised)."""
    return torch.cat([matrix_to_rotation_6d(rotations).flatten(1), betas, placement.flatten(1)], 1)


def placement_of(joints: Tensor, camera: Tensor, present: Tensor) -> Tensor:
    """The placement of hands that a camera sees: the inverse of `HandFeatures.camera`, to make training data.

    joints: [B, 62, 3]; camera: [B, 3] (s, tx, ty); present: [B, 2] in {0, 1}.
    Returns [B, 2, 4], see `placement`.
    """
    hands = joints[:, HAND_JOINTS, :2]  # [B, 2, 21, 2]
    view = camera[:, None, None, :1] * (hands + camera[:, None, None, 1:])
    centre = view.mean(2)
    size = (view - centre[:, :, None]).square().sum(-1).mean(-1).sqrt().log()
    return placement(torch.cat([centre, size[..., None]], -1), present > 0)


def placement(places: Tensor, shown: Tensor) -> Tensor:
    """Presence, centre x, y and log size [B, 2, 4] of hands at places [B, 2, 3]. shown: bool [B, 2], visible hands.

    An absent hand takes the other one's place, so that only the presences depend on a side that a prompt leaves open.
    Without hands both take the neutral place (0, 0, log 0.5).
    """
    neutral = torch.tensor([0.0, 0.0, -0.6931], dtype=places.dtype, device=places.device)
    shown = shown[..., None]
    others = torch.where(shown.flip(1), places.flip(1), neutral)
    return torch.cat([shown.to(places.dtype), torch.where(shown, places, others)], -1)


def presence(placement: Tensor) -> Tensor:
    """The hands [B, 2] (0 or 1) that a placement [B, 2, 4] shows: the rounded sum of its presences, likelier first.

    A prompt that leaves the side open may give half a presence to each hand: together they are one hand.
    """
    left, right = placement[..., 0].unbind(-1)
    one, two, first = left + right > 0.5, left + right > 1.5, left >= right
    return torch.stack([two | (one & first), two | (one & ~first)], -1).to(placement.dtype)


class HandFeatures(nn.Module):
    """Forward kinematics and the three hand cues; float32 always.

    mean, std: [P], the normalisation of the hand prior's parameters, 330 a person; basis: [2, N, 3] from `make_basis`;
    aspect: width / height of the model's own pictures.
    """

    mean: Tensor
    std: Tensor
    basis: Tensor

    def __init__(self, body: SMPLH, mean: Tensor, std: Tensor, basis: Tensor, aspect: float = 1.0) -> None:
        super().__init__()
        assert mean.shape == std.shape and len(mean) % NUM_PARAMS == 0, mean.shape
        self.body = body
        self.people = len(mean) // NUM_PARAMS
        self.aspect = aspect
        self.register_buffer("mean", mean.detach().float().clone())
        self.register_buffer("std", std.detach().float().clone())
        self.register_buffer("basis", basis.detach().float().clone())
        # A hand's vertices have their largest weight at one of its wrist or finger joints.
        strongest = body.weights.argmax(1)
        self.hand_vertices = [
            torch.isin(strongest, torch.tensor(joints)).nonzero()[:, 0].tolist() for joints in HAND_ROTATIONS
        ]

    def forward(self, x: Tensor, span: Tensor | None = None) -> dict[str, Tensor]:
        """x: [B, P] normalised parameters. span: [B], how many times as wide as the model's own the picture is at the
        same height; None: 1. Returns the outputs of the graph `hand_features` (see the contract)."""
        params = x * self.std + self.mean
        if self.people == 1:
            return self.of_bodies(params, span)
        if span is not None:
            span = span[:, None].expand(-1, self.people).flatten()
        out = self.of_bodies(params.reshape(-1, NUM_PARAMS), span)
        hands = ("joints", "rotations", "bps", "visibility")
        return {
            name: value.reshape(-1, 2 * self.people, *value.shape[2:])
            if name in hands
            else value.reshape(-1, self.people, *value.shape[1:])
            for name, value in out.items()
        }

    def of_bodies(self, params: Tensor, span: Tensor | None) -> dict[str, Tensor]:
        """The features of bodies [B, 330], not normalised; the people of a picture follow each other."""
        batch = params.shape[0]
        rotations = rotation_6d_to_matrix(params[:, ROTATIONS].reshape(batch, NUM_JOINTS, 6))
        betas = params[:, BETAS]
        placement = params[:, PLACEMENT].reshape(batch, 2, 4)
        turns, places, rest = self.body.kinematics(rotations, betas)
        vertices = self.body.skin(rotations, betas, turns, places, rest)
        joints = torch.cat([places, take(vertices, TIP_VERTICES)], 1)  # [B, 62, 3]

        present = presence(placement)  # [B, 2]
        hands = take(joints, [joint for hand in HAND_JOINTS for joint in hand]).unflatten(1, (2, -1))  # [B, 2, 21, 3]
        camera = self.camera(hands[..., :2], placement, present)
        if span is not None:
            camera = self.into_view(camera, hands[..., 0], present, span)
        view = camera[:, None, None, :1] * (hands[..., :2] + camera[:, None, None, 1:])  # y up, +-1 over the height
        image = torch.stack([0.5 + 0.5 * view[..., 0] / self.aspect, 0.5 - 0.5 * view[..., 1]], -1)
        half = 0.5 if span is None else 0.5 * span[:, None, None]
        across, down = (image[..., 0] - 0.5).abs() <= half, (image[..., 1] - 0.5).abs() <= 0.5
        inside = (across & down).to(params.dtype).mean(-1)  # [B, 2]

        wrists = take(turns, (LEFT_WRIST, RIGHT_WRIST))  # [B, 2, 3, 3]
        fingers = torch.stack([take(rotations, joints_of[1:]) for joints_of in HAND_ROTATIONS], 1)
        return {
            "joints": image,
            "rotations": matrix_to_rotation_6d(torch.cat([wrists[:, :, None], fingers], 2)),
            "bps": torch.stack([self.distances(vertices, places, turns, hand) for hand in range(2)], 1),
            "visibility": present * (inside >= MIN_IN_FRAME).to(params.dtype),
            "vertices": vertices,
            "joints_3d": joints,
            "camera": camera,
        }

    @staticmethod
    def camera(hands: Tensor, placement: Tensor, present: Tensor) -> Tensor:
        """The weak-perspective camera (s, tx, ty) [B, 3] that puts the hands at their `placement`.

        image = s * (metres + t), y up. It is exact for one hand, and least squares for two.
        hands: [B, 2, 21, 2] metres; placement: [B, 2, 4]; present: [B, 2].
        """
        share = present + 1e-4  # without hands both count alike, and both stay invisible
        share = share / share.sum(1, keepdim=True)
        centre = hands.mean(2)  # [B, 2, 2]
        radius = (hands - centre[:, :, None]).square().sum(-1).mean(-1).clamp_min(1e-8).sqrt()
        scale = (share * (placement[..., 3].clamp(-6.0, 3.0) - radius.log())).sum(1, keepdim=True).exp()  # [B, 1]
        shift = (share[..., None] * (placement[..., 1:3] / scale[..., None] - centre)).sum(1)
        return torch.cat([scale, shift], 1)

    def into_view(self, camera: Tensor, x: Tensor, present: Tensor, span: Tensor) -> Tensor:
        """The camera [B, 3], moved so that a picture narrower than the model's own shows all of its hands: it moves to
        the side, and away where they are too far apart. Other pictures keep their camera. People of one picture move
        together.

        x: [B, 2, 21] metres of the joints; present: [B, 2]; span: [B].
        """
        far = 1e6
        limit = torch.where(span < 1, span * self.aspect, far)  # half heights from the middle to the edge
        view = camera[:, :1, None] * (x + camera[:, 1:2, None])  # [B, 2, 21] half heights
        shown = present[:, :, None] > 0.5
        low = self.of_all(torch.where(shown, view, far).flatten(1)).amin(1)
        high = self.of_all(torch.where(shown, view, -far).flatten(1)).amax(1)
        zoom = (2 * limit / (high - low).clamp_min(1e-6)).clamp_max(1.0)
        shift = torch.maximum(-limit - zoom * low, torch.minimum(torch.zeros_like(low), limit - zoom * high))
        scale = camera[:, 0] * zoom
        return torch.stack([scale, camera[:, 1] + shift / scale, camera[:, 2]], 1)

    def of_all(self, values: Tensor) -> Tensor:
        """[B, V] of bodies -> [B, people * V]: each body gets the values of all people in its picture."""
        if self.people == 1:
            return values
        together = values.reshape(-1, 1, self.people * values.shape[1])
        return together.expand(-1, self.people, -1).flatten(0, 1)

    def distances(self, vertices: Tensor, places: Tensor, turns: Tensor, hand: int) -> Tensor:
        """Distances [B, N] in metres from each basis point to the nearest vertex of the hand, in the wrist's frame."""
        wrist = (LEFT_WRIST, RIGHT_WRIST)[hand]
        cloud = take(vertices, self.hand_vertices[hand]) - places[:, wrist, None]
        cloud = cloud @ turns[:, wrist]  # rows times R = R^T times columns: into the wrist's frame
        basis = self.basis[hand]
        # |p - v|^2 by its expansion: one matrix product instead of a [B, N, V, 3] difference.
        squared = basis.square().sum(-1)[:, None] + cloud.square().sum(-1)[:, None] - 2 * basis @ cloud.mT
        return squared.amin(-1).clamp_min(0.0).sqrt()
