"""The demo world: a symmetric body whose finger tips are finger tips, hands inside the frame, prompts that
say what is drawn, and a renderer that puts the near before the far."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from handiffuser.demo.body import OTHER, build_body, make_body, vertex_colours
from handiffuser.demo.gestures import GESTURES, NAMES, pose
from handiffuser.demo.prompts import (
    BACKGROUNDS,
    EITHER,
    NOUNS,
    SIDES,
    SKINS,
    VIEWS,
    Spec,
    allowed_views,
    is_held_out,
    is_held_out_pair,
    sample_spec,
    write_prompt,
)
from handiffuser.demo.render import demo_body, hand_faces, render, render_scenes
from handiffuser.demo.scenes import MARGIN, forward_joints, sample_scene, sample_scenes
from handiffuser.grammar import words_of
from handiffuser.models.smplh import HAND_JOINTS, PARENTS, SMPLH, TIP_VERTICES

LEFT, RIGHT = 0, 1


@pytest.fixture(scope="module")
def body() -> SMPLH:
    return demo_body()


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(120, seed=3, both=0.3)


def in_picture(joints: np.ndarray, camera: np.ndarray) -> np.ndarray:
    s, tx, ty = camera
    return np.stack([0.5 + 0.5 * s * (joints[:, 0] + tx), 0.5 - 0.5 * s * (joints[:, 1] + ty)], 1)


# --- body ---


def test_body_is_symmetric():
    body = build_body()
    joints = body["J_regressor"] @ body["v_template"]
    assert np.allclose(joints[OTHER] * (-1, 1, 1), joints, atol=1e-5)
    weights = body["weights"]
    assert np.allclose(weights.sum(1), 1, atol=1e-5) and weights.min() >= -1e-6
    owner = weights.argmax(1)
    left = body["v_template"][np.isin(owner, [20, *range(22, 37)])]
    right = body["v_template"][np.isin(owner, [21, *range(37, 52)])] * np.float32([-1, 1, 1])
    assert len(left) == len(right) > 700
    order = [np.lexsort(np.round(side.T.astype(float), 5)) for side in (left, right)]
    assert np.allclose(left[order[0]], right[order[1]], atol=1e-5)


def test_hands_are_closed_and_wind_outwards():
    body = build_body()
    used = set(np.unique(body["f"]).tolist())
    assert set(TIP_VERTICES) <= used
    edges = {(int(f[i]), int(f[(i + 1) % 3])) for f in body["f"] for i in range(3)}
    assert len(edges) == 3 * len(body["f"])
    assert all((b, a) in edges for a, b in edges)
    a, b, c = (body["v_template"][body["f"][:, i]].astype(float) for i in range(3))
    assert 0.05 < (np.cross(a, b) * c).sum() / 6 < 0.15  # cubic metres


def test_finger_tips_are_the_ends_of_fingers():
    body = build_body()
    v, owner = body["v_template"], body["weights"].argmax(1)
    joints = body["J_regressor"] @ v
    for side in range(2):
        for finger in range(5):
            last = HAND_JOINTS[side][4 * finger + 3]
            tip = TIP_VERTICES[5 * side + finger]
            assert owner[tip] == last
            bone = joints[last] - joints[PARENTS[last]]
            mine = v[owner == last]
            assert ((v[tip] - mine) @ bone / np.linalg.norm(bone)).min() > -1e-4  # nothing reaches farther


def test_written_body_agrees_with_smplx(tmp_path):
    smplx = pytest.importorskip("smplx")
    path = make_body(tmp_path / "smplh_demo.npz")
    assert path.stat().st_size < 1_000_000
    flat = {"use_pca": False, "flat_hand_mean": True}
    theirs = smplx.create(str(path), model_type="smplh", ext="npz", num_betas=10, batch_size=3, **flat)
    generator = torch.Generator().manual_seed(0)
    angles = 0.5 * torch.randn(3, 52, 3, generator=generator)
    betas = torch.randn(3, 10, generator=generator)
    angle = angles.norm(dim=-1)[..., None, None]
    x, y, z = (angles / angle[..., 0]).unbind(-1)
    o = torch.zeros_like(x)
    k = torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).view(3, 52, 3, 3)
    rotations = torch.eye(3) + angle.sin() * k + (1 - angle.cos()) * k @ k
    out = theirs(
        betas=betas,
        global_orient=angles[:, 0],
        body_pose=angles[:, 1:22].flatten(1),
        left_hand_pose=angles[:, 22:37].flatten(1),
        right_hand_pose=angles[:, 37:].flatten(1),
    )
    vertices, joints = SMPLH.load(path)(rotations, betas)
    assert (vertices - out.vertices).abs().max() < 1e-5
    assert (joints[:, :52] - out.joints[:, :52]).abs().max() < 1e-5


def test_scene_kinematics_agree_with_the_model(body, scenes):
    for scene in scenes[:5]:
        _, joints = body(torch.from_numpy(scene.rotations)[None], torch.from_numpy(scene.betas)[None])
        assert np.abs(joints[0].numpy() - forward_joints(scene.rotations, scene.betas)).max() < 1e-4


def test_palms_and_nails_are_painted():
    body = build_body()
    colours = vertex_colours(np.array([[0.4, 0.27, 0.19], [0.9, 0.75, 0.66]]))
    assert colours.shape == (2, 6890, 3) and colours.min() >= 0 and colours.max() <= 1
    hand = np.isin(body["weights"].argmax(1), range(20, 52))
    palm, back = hand & (body["palm"] > 0.9), hand & (body["palm"] < 0.1) & (body["nail"] == 0)
    dark, pale = colours[:, palm].mean(1) - colours[:, back].mean(1)
    assert dark.min() > 0.1  # a dark hand's palm is lighter
    assert pale[0] > pale[1:].max() + 0.01  # a pale hand's palm is pinker
    assert (body["nail"] > 0.5).sum() >= 2 * 5 * 2
    assert body["palm"][body["nail"] > 0.5].max() < 0.6


# --- gestures ---


def test_gestures_are_rotations_and_mirror():
    assert len(NAMES) == 24
    mask = np.array([[1, -1, -1], [-1, 1, 1], [-1, 1, 1]])
    for name in NAMES:
        left, right = pose(name, LEFT), pose(name, RIGHT)
        assert left.shape == (15, 3, 3) and left.dtype == np.float32
        assert np.allclose(left @ left.transpose(0, 2, 1), np.eye(3), atol=1e-5)
        assert np.allclose(np.linalg.det(left), 1, atol=1e-5)
        assert np.allclose(right, left * mask, atol=1e-6)


def test_gestures_differ_more_than_they_vary():
    def shape(name: str, rng=None) -> np.ndarray:
        rotations = np.tile(np.eye(3), (52, 1, 1))
        rotations[22:37] = pose(name, LEFT, rng)
        joints = forward_joints(rotations, np.zeros(10))[list(HAND_JOINTS[LEFT])]
        return joints - joints[0]

    mean = {name: shape(name) for name in NAMES}
    rng = np.random.default_rng(0)
    same_hand = {
        "thumbs_up",
        "thumbs_down",
    }  # only the direction of the thumb in the picture tells them apart
    for name in NAMES:
        for _ in range(5):
            varied = shape(name, rng)
            error = {other: np.abs(varied - mean[other]).mean() for other in NAMES}
            best = min(error, key=error.get)
            assert best == name or {best, name} == same_hand


# --- prompts ---


def test_prompts_say_the_gesture_and_mostly_the_side():
    """One hand without a stated side is still one: "a fist". Only "thumbs up" may be one or two."""
    unsaid = Counter()
    rng = np.random.default_rng(0)
    adjectives = {"open_hand": "open", "fist": "fist", "cupped_hand": "cupped"}
    seen = set()
    for _ in range(2000):
        spec = sample_spec(rng, both=0.3)
        text = write_prompt(spec, rng).lower()
        seen.add(text)
        gestures = {spec.gesture_of(0), spec.gesture_of(1)}
        if spec.other:
            assert ("left" in text) == ("right" in text) and ("left" in text or "one" in text), text
        elif spec.side == "both":
            several = "hands" in text.replace("back of the hands", "") or "fists" in text
            unsaid["both"] += not several
            assert several or spec.gesture in EITHER
            assert "left" not in text and "right" not in text
        else:
            other = {"left": "right", "right": "left"}[spec.side]
            unsaid["one"] += spec.side not in text
            assert other not in text
            assert spec.side in text or not {"two", "both", "pair", "hands", "fists"} & set(words_of(text)), text
        for gesture in gestures:
            phrases = GESTURES[gesture].phrases
            said = [
                *phrases,
                *(p.split(" ", 1)[1] for p in phrases if " " in p),
                adjectives.get(gesture, "?"),
                *NOUNS.get(gesture, ()),
            ]
            assert any(p.lower() in text for p in said), (spec, text)
        assert "  " not in text and " ," not in text
    assert len(seen) > 1900 and 150 < unsaid["one"] < 400 and 0 < unsaid["both"] < 30
    spec = Spec("right", "fist", "palm", "tan", "blue")
    assert all("right" in write_prompt(spec, rng, leave_out=0).lower() for _ in range(200)), (
        "what is held out says everything"
    )


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (Spec("right", "fist", "palm", "tan", "blue"), "a right hand making a fist, blue background"),
        (Spec("both", "open_hand", "palm", "tan", "blue"), "two open hands"),
        (Spec("left", "fist", "palm", "tan", "blue"), "a fist"),
        (Spec("both", "thumbs_up", "palm", "tan", "blue"), "thumbs up"),
        (Spec("left", "thumbs_up", "back", "tan", "blue"), "thumbs up"),
        (Spec("both", "fist", "palm", "tan", "blue", "victory"), "a left fist and a right peace sign"),
        (
            Spec("both", "pointing", "palm", "tan", "blue", "open_hand"),
            "two hands, one held flat, the other pointing up",
        ),
    ],
)
def test_plain_prompts_are_among_the_wordings(spec, wanted):
    rng = np.random.default_rng(1)
    assert any(write_prompt(spec, rng, leave_out=0.6) == wanted for _ in range(50_000))


def test_two_hands_may_differ_and_some_pairs_are_held_out():
    rng = np.random.default_rng(3)
    specs = [sample_spec(rng, both=1.0, differ=1.0) for _ in range(3000)]
    assert all(spec.other and spec.other != spec.gesture for spec in specs)
    assert not any(is_held_out_pair(spec.gesture, spec.other) for spec in specs)
    pairs = [(a, b) for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]]
    held = [pair for pair in pairs if is_held_out_pair(*pair)]
    assert 0.05 < len(held) / len(pairs) < 0.15 and all(is_held_out_pair(b, a) for a, b in held)
    assert not any(is_held_out_pair(name, name) for name in NAMES)
    scene = sample_scene(np.random.default_rng(0), Spec("both", "fist", "palm", "tan", "blue", "spread_fingers"))
    flexion = [np.arccos((np.trace(scene.rotations[first + 1]) - 1) / 2) for first in (22, 37)]
    assert flexion[0] > 1.5 and flexion[1] < 0.4  # the left index finger is bent, the right one straight


def test_an_arm_that_is_not_seen_mirrors_the_other():
    """So that nothing but its place depends on a side that the prompt leaves open."""
    for side, name in enumerate(("left", "right")):
        scene = sample_scene(np.random.default_rng(side), Spec(name, "ok_sign", "palm", "tan", "blue"))
        joints = forward_joints(scene.rotations, np.zeros(10))
        ends = [joints[[18 + side, *HAND_JOINTS[side]]] - joints[16 + side] for side in range(2)]
        assert scene.present.tolist() == [name == "left", name == "right"]
        assert np.abs(ends[0] * [-1, 1, 1] - ends[1]).max() < 0.01  # the trunk wobbles a little


def test_what_is_hard_to_draw_comes_more_often_unless_all_shall_come_alike():
    rng = np.random.default_rng(0)
    count = {even: Counter(sample_spec(rng, 0, even=even).gesture for _ in range(6000)) for even in (False, True)}
    assert count[False]["thumbs_up"] > 1.5 * count[False]["vulcan"]
    assert count[True]["thumbs_up"] < 1.35 * count[True]["vulcan"]


def test_held_out_split_is_stable_and_a_tenth():
    assert is_held_out("a left hand making a fist") == is_held_out("A left hand making a fist.")
    assert [p for p in (f"a left hand, {i}" for i in range(40)) if is_held_out(p)] == [
        f"a left hand, {i}" for i in [8, 18, 20, 39]
    ]
    rng = np.random.default_rng(1)
    share = np.mean([is_held_out(write_prompt(sample_spec(rng), rng)) for _ in range(4000)])
    assert 0.08 < share < 0.12
    assert not any(is_held_out(s.prompt) for s in sample_scenes(60, seed=1, held_out=False))
    assert all(is_held_out(s.prompt) for s in sample_scenes(10, seed=1, held_out=True))


# --- scenes ---


def test_hands_are_in_the_frame_and_large_enough(scenes):
    for scene in scenes:
        joints = forward_joints(scene.rotations, scene.betas)
        for side in range(2):
            if scene.present[side]:
                p = in_picture(joints[list(HAND_JOINTS[side])], scene.camera)
                assert p.min() >= MARGIN - 0.01 and p.max() <= 1 - MARGIN + 0.01, scene.prompt
                assert np.ptp(p, axis=0).max() > (0.2 if scene.spec.side == "both" else 0.38)


def test_scenes_are_repeatable_and_well_formed(scenes):
    again = sample_scenes(10, seed=3, both=0.3)
    for a, b in zip(scenes[:10], again, strict=True):
        assert a.prompt == b.prompt and (a.rotations == b.rotations).all() and (a.camera == b.camera).all()
    for s in scenes:
        assert s.rotations.shape == (52, 3, 3) and s.rotations.dtype == np.float32
        assert np.allclose(s.rotations @ s.rotations.transpose(0, 2, 1), np.eye(3), atol=1e-4)
        assert s.betas.shape == (10,) and np.abs(s.betas).max() <= 2
        assert s.present.tolist() == [s.spec.side in ("left", "both"), s.spec.side in ("right", "both")]
        assert abs(np.linalg.norm(s.light) - 1) < 1e-5


@pytest.mark.parametrize("view", ["palm", "back"])
def test_thumb_is_on_the_right_side(view):
    for side, sign in (("left", -1), ("right", 1)):
        for seed in range(5):
            scene = sample_scene(np.random.default_rng(seed), Spec(side, "spread_fingers", view, "tan", "blue"))
            joints = forward_joints(scene.rotations, scene.betas)
            hand = joints[list(HAND_JOINTS[side == "right"])]
            thumb_minus_pinky = hand[4, 0] - hand[20, 0]
            # A left palm shows its thumb on the picture's left; its back on the right. The right hand mirrors
            # that.
            assert np.sign(thumb_minus_pinky) == (sign if view == "palm" else -sign)


def test_two_hands_stand_apart_in_the_right_order(scenes):
    pairs = [s for s in scenes if s.spec.side == "both"]
    assert len(pairs) > 15
    for scene in pairs:
        joints = forward_joints(scene.rotations, scene.betas)
        left, right = (joints[list(HAND_JOINTS[side]), 0] for side in range(2))
        assert right.max() < left.min()  # the subject's right hand is on the picture's left


def test_every_gesture_view_and_side_can_be_framed():
    for gesture in NAMES:
        for side in SIDES:
            for view in allowed_views(gesture, side):
                assert view in VIEWS
                scene = sample_scene(np.random.default_rng(1), Spec(side, gesture, view, "tan", "blue"))
                assert scene.spec.view == view
    assert len(SKINS) >= 5 and len(BACKGROUNDS) >= 8


# --- renderer ---


def squares(*depths: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares of half the frame's width facing the camera, one per depth."""
    corner = torch.tensor([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    vertices = torch.cat([torch.cat([corner, torch.full((4, 1), z)], 1) for z in depths])
    faces = torch.cat([torch.tensor([[0, 1, 2], [0, 2, 3]]) + 4 * i for i in range(len(depths))])
    return vertices[None], faces


def draw(vertices, faces, colours, **more) -> torch.Tensor:
    camera, grey = torch.tensor([[1.0, 0, 0]]), torch.full((1, 3), 0.5)
    return render(vertices, faces, colours, camera, grey, torch.tensor([[0.0, 0, 1]]), 32, **more)[0]


def test_renderer_covers_exactly_the_square():
    vertices, faces = squares(0.0)
    picture = draw(vertices, faces, torch.tensor([0.9, 0.1, 0.1]).expand(1, 4, 3))
    red = picture[..., 0].int() - picture[..., 1].int() > 60
    assert red.sum() == 16 * 16 and red[8:24, 8:24].all()
    assert picture.dtype == torch.uint8 and picture.shape == (32, 32, 3)


@pytest.mark.parametrize("order", [(0.0, 0.1), (0.1, 0.0)])
def test_near_hides_far(order):
    vertices, faces = squares(*order)
    red, green = torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.9, 0.1])
    near_first = order[0] > order[1]
    colours = torch.stack([red if (i < 4) == near_first else green for i in range(8)])[None]
    picture = draw(vertices, faces, colours)
    assert picture[16, 16, 0] > picture[16, 16, 1]  # larger z is nearer, whatever the order of the faces


def test_back_faces_and_invisible_faces_are_not_drawn():
    vertices, faces = squares(0.0)
    colours = torch.tensor([0.9, 0.1, 0.1]).expand(1, 4, 3)
    empty = draw(vertices, faces, colours, visible=torch.zeros(1, 2, dtype=torch.bool))
    assert (draw(vertices, faces.flip(1), colours) == empty).all()
    assert (empty[..., 0] == empty[..., 1]).all()


def test_pictures_are_repeatable_alone_and_in_a_batch(body, scenes):
    few = scenes[:4]
    together = render_scenes(few, body, size=48)
    assert together.shape == (4, 48, 48, 3)
    assert (together == render_scenes(few, body, size=48)).all()
    alone = torch.cat([render_scenes([s], body, size=48) for s in few])
    assert (together.int() - alone.int()).abs().max() <= 2


def test_hands_are_drawn_where_their_joints_are(body, scenes):
    faces, side = hand_faces(body)
    assert faces.shape[1] == 3 and set(side.tolist()) == {0, 1}
    hits = []
    for scene, picture in zip(scenes[:24], render_scenes(scenes[:24], body, size=64), strict=True):
        colour = picture.float() / 255
        joints = forward_joints(scene.rotations, scene.betas)
        bare = np.abs(colour.numpy() - scene.background).max(-1)
        for s in range(2):
            if scene.present[s]:
                p = in_picture(joints[list(HAND_JOINTS[s])], scene.camera)
                x, y = (p * 64).astype(int).T
                hits.append((bare[y, x] > 0.12).mean())
    assert np.mean(hits) > 0.85
