"""The demo's people: a symmetric, licence-free body in SMPL-H's format, hands whose contacts touch and pass through
nothing, poses that reach what they name, and a renderer that dresses whole persons."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from handiffuser.demo import human_skin
from handiffuser.demo.backdrops import KINDS, backdrop
from handiffuser.demo.contacts import gap, left_hand, measure, penetration
from handiffuser.demo.hand_mesh import CHAINS, FRAMES
from handiffuser.demo.human import CLOTHES, FILE, OTHER, SKIN, human_body, load_human, make_body
from handiffuser.demo.human_clothes import (
    CUFFS,
    HAIRCUTS,
    NECKS,
    PATTERNS,
    SLEEVES,
    Look,
    cuts,
    mesh_of,
    sample_look,
    sleeve_end,
    surface,
)
from handiffuser.demo.human_gestures import CONTACTS, HANDS, hand_pose, solved
from handiffuser.demo.human_poses import (
    BODY_POSES,
    FRAMINGS,
    LEFT,
    RIGHT,
    Figure,
    frame,
    hand_ids,
    sample_pose,
    vertex_normals,
)
from handiffuser.demo.human_render import Camera, Lamp, Person, _occlusion, render
from handiffuser.demo.human_skin import ITA_CLASSES, ita_of, skin_tone
from handiffuser.demo.human_touch import PALM, gaps, plane
from handiffuser.models.body import commands
from handiffuser.models.smplh import HAND_JOINTS, PARENTS, SMPLH, TIP_VERTICES

GREY = torch.full((2, 2, 3), 0.5)


@pytest.fixture(scope="module", autouse=True)
def small_textures():
    """Textures of a few texels: nothing here depends on their detail."""
    sizes = human_skin.HAND_SIZE, human_skin.HEAD_SIZE
    human_skin.textures.cache_clear()
    human_skin.HAND_SIZE, human_skin.HEAD_SIZE = 128, 64
    yield
    human_skin.HAND_SIZE, human_skin.HEAD_SIZE = sizes
    human_skin.textures.cache_clear()


# --- body ---


def test_the_body_is_its_own_mirror_image():
    human = load_human()
    arrays, flip = human.arrays, np.float32([-1, 1, 1])
    assert FILE.stat().st_size <= 1_200_000
    assert (human.template[human.mirror] * flip == human.template).all()
    assert np.abs(arrays["shapedirs"][human.mirror] * flip[:, None] - arrays["shapedirs"]).max() == 0
    assert np.abs(human.joints[OTHER] * flip - human.joints).max() < 1e-9
    assert np.abs(arrays["weights"][human.mirror][:, OTHER] - arrays["weights"]).max() < 1e-6
    assert np.allclose(arrays["weights"].sum(1), 1) and (arrays["weights"] * 2048 % 1 == 0).all()
    faces = {tuple(sorted(f)) for f in arrays["f"].tolist()}
    mirrored = {tuple(sorted(f)) for f in human.mirror[arrays["f"]].tolist()}
    assert faces == mirrored


def test_finger_bones_at_rest_are_the_frames():
    joints, tips = load_human().joints, load_human().template[list(TIP_VERTICES[:5])]
    for finger, block in enumerate((4, 0, 1, 3, 2)):
        points = np.array([*joints[22 + 3 * block : 25 + 3 * block], tips[finger]])
        bones = np.diff(points, axis=0)
        bones /= np.linalg.norm(bones, axis=1, keepdims=True)
        wanted = np.diff(CHAINS[finger], axis=0)
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        angle = np.degrees(np.arccos((bones * wanted).sum(1).clip(-1, 1)))
        assert angle[:2].max() < 1.5 and angle[2] < 12, finger  # a tip is a vertex of the skin, beside the bone
    arm = joints[[16, 18, 20]]
    assert np.ptp(arm[:, 1:], axis=0).max() < 0.002  # a T pose
    assert FRAMES[2, 1, 1] > 0.99


def test_nothing_lies_under_clothes():
    human = load_human()
    skin, cloth = human.template[human.kind == SKIN], human.template[human.kind == CLOTHES]
    assert skin[:, 1].min() > human.joints[12, 1] - 0.25  # no legs, no hips
    assert cloth[:, 1].min() < -1.05 and np.abs(cloth[:, 0]).max() > 0.63  # shoes, sleeves down to the wrist


@pytest.mark.slow
def test_the_components_are_adults_and_hands_differ():
    arrays = load_human().arrays
    rng = np.random.default_rng(0)
    betas = np.concatenate([rng.normal(size=(300, 10)).clip(-2, 2), 2 * np.eye(10), -2 * np.eye(10)])
    bodies = arrays["v_template"] + np.einsum("vck,nk->nvc", arrays["shapedirs"].astype(float), betas)
    joints = np.einsum("jv,nvc->njc", arrays["J_regressor"].astype(float), bodies)
    stature = np.ptp(bodies[..., 1], axis=1)
    hand = np.linalg.norm(bodies[:, TIP_VERTICES[2]] - joints[:, 20], axis=1)
    palm = np.linalg.norm(joints[:, 22] - joints[:, 28], axis=1)
    assert stature.min() > 1.4 and stature.max() < 2.1
    assert hand.min() > 0.14 and hand.max() < 0.25
    assert np.std(hand / stature) > 0.002 and np.std(palm / hand) > 0.008  # large hands, broad hands
    assert palm.min() > 0.04 and palm.max() < 0.09


def test_the_written_body_agrees_with_smplx_and_can_be_shown(tmp_path):
    smplx = pytest.importorskip("smplx")
    path = make_body(tmp_path / "smplh_human.npz")
    shown = CliRunner().invoke(commands, ["show", str(path)])
    assert shown.exit_code == 0 and "SMPL-H" in shown.output and "52 joints" in shown.output
    assert "free (Apache-2.0)" in shown.output and "licensed by their makers" not in shown.output
    flat = {"use_pca": False, "flat_hand_mean": True}
    theirs = smplx.create(str(path), model_type="smplh", ext="npz", num_betas=10, batch_size=2, **flat)
    generator = torch.Generator().manual_seed(0)
    angles = 0.4 * torch.randn(2, 52, 3, generator=generator)
    betas = torch.randn(2, 10, generator=generator)
    skew = torch.zeros(2, 52, 3, 3)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        skew[..., i, j], skew[..., j, i] = -angles[..., k], angles[..., k]
    out = theirs(
        betas=betas,
        global_orient=angles[:, 0],
        body_pose=angles[:, 1:22].flatten(1),
        left_hand_pose=angles[:, 22:37].flatten(1),
        right_hand_pose=angles[:, 37:].flatten(1),
    )
    vertices, joints = SMPLH.load(path)(torch.linalg.matrix_exp(skew), betas)
    assert (vertices - out.vertices).abs().max() < 1e-5
    assert (joints[:, :52] - out.joints[:, :52]).abs().max() < 1e-5


# --- hands ---


def test_hand_poses_are_rotations_and_mirror():
    assert set(solved()) == set(HANDS) and len(HANDS) >= 30
    mask = np.array([[1, -1, -1], [-1, 1, 1], [-1, 1, 1]])
    for name in HANDS:
        left, right = (hand_pose(name, side, np.random.default_rng(1)) for side in (LEFT, RIGHT))
        assert left.shape == (15, 3, 3) and left.dtype == np.float32
        assert np.allclose(left @ left.transpose(0, 2, 1), np.eye(3), atol=1e-5)
        assert np.allclose(right, left * mask, atol=1e-6)
    with pytest.raises(KeyError):
        hand_pose("no such gesture")


def check_contacts(name: str, number: int) -> None:
    row = solved()[name][number]
    wide, deep, parts = measure(name, {"fingers": row.fingers, "thumb": row.thumb, "roll": row.roll})
    assert wide <= 2 and deep <= 2, (name, number, wide, deep, parts)


@pytest.mark.parametrize("name", ["fist", "ok_sign", "pinch", "pinched_fingers", "pointing", "crossed_fingers"])
def test_what_shall_touch_touches_and_nothing_passes_through(name):
    check_contacts(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(HANDS))
def test_every_solution_touches_and_passes_through_nothing(name):
    for number in range(len(solved()[name])):
        check_contacts(name, number)


def test_penetration_and_gaps_are_measured():
    hand = left_hand()
    assert penetration(hand.vertices)[0] == 0
    pair = ((1, 2, 0), (2, 2, 0))  # the ends of index and middle finger
    apart = gap(hand.vertices, pair)
    assert 0.005 < apart < 0.03
    moved, index = hand.vertices.copy(), (hand.part >= 4) & (hand.part < 7)
    moved[index] += (0.008, 0, -apart - 0.004)
    deep, parts = penetration(moved)
    assert 0.002 < deep < 0.008 and set(np.array(parts) // 3) <= {1, 2, 3}


def test_all_contacts_name_parts_of_the_hand():
    for name, pairs in CONTACTS.items():
        assert name in HANDS
        for pair in pairs:
            assert all(-1 <= finger <= 4 and 0 <= bone <= 2 and side in (-1, 0, 1) for finger, bone, side in pair)


# --- poses ---


@pytest.mark.parametrize("name", [*BODY_POSES, "thumbs_up", "victory"])
def test_poses_are_well_formed_and_repeatable(name):
    betas = np.random.default_rng(0).normal(0, 0.8, 10)
    first, again = (sample_pose(name, betas, np.random.default_rng(4), "right") for _ in range(2))
    assert (first.rotations == again.rotations).all() and first.rotations.dtype == np.float32
    assert np.allclose(first.rotations @ first.rotations.transpose(0, 2, 1), np.eye(3), atol=1e-4)
    assert first.vertices.shape == load_human().template.shape and first.joints.shape == (62, 3)
    assert np.isfinite(first.vertices).all()


def test_arms_reach_what_they_are_told():
    figure = Figure(np.zeros(10), np.random.default_rng(0))
    wanted, hand = np.array([-0.1, 0.2, 0.4]), np.stack([[0, 1.0, 0], [0, 0, 1.0], [1.0, 0, 0]], 1)
    figure.reach(RIGHT, wanted, hand, np.array([-0.5, -1, 0]))
    turns, places = figure.kinematics()
    assert np.abs(places[21] - wanted).max() < 5e-4 and np.abs(turns[21] - hand).max() < 1e-6
    figure.reach(LEFT, np.array([3.0, 0, 0]), hand, np.array([0, -1.0, 0]))  # too far: the arm is straight
    turns, places = figure.kinematics()
    assert PARENTS[20] == 18 and np.linalg.norm(places[20] - places[16]) < 0.6


@pytest.mark.parametrize("name", ["praying", "heart"])
@pytest.mark.parametrize("seed", [0, 1])
def test_two_hands_meet_in_the_middle(name, seed):
    rng = np.random.default_rng(seed)
    pose = sample_pose(name, rng.normal(0, 0.8, 10), rng, "both", yaw=0.0)
    left, right = (pose.vertices[hand_ids(side), 0] for side in (LEFT, RIGHT))
    assert abs(left.min()) < 0.002 and abs(right.max()) < 0.002
    if name == "heart":
        thumb, finger = pose.joints[52, 0], pose.vertices[hand_ids(LEFT)][:, 0]
        assert thumb < 0.02 and finger.min() > -0.002


@pytest.mark.parametrize("seed", range(4))
def test_praying_palms_lie_flat_on_each_other(seed):
    """The hands are mirror images, so a part's gap is twice its height above the plane between them."""
    rng = np.random.default_rng(seed)
    figure = Figure(rng.normal(0, 0.8, 10).clip(-2, 2), rng)
    figure.stand(0)
    BODY_POSES["praying"](figure, (LEFT, RIGHT))
    middle = plane(figure.rest[0], figure.rotations[0] @ np.array([1.0, 0, 0]))
    gap_mm = {part: 2000 * height for part, height in gaps(figure, LEFT, middle).items()}
    assert min(gap_mm.values()) >= -2, gap_mm  # nothing passes through
    for part in (*PALM, *((finger, bone) for finger in range(1, 5) for bone in (1, 2))):
        assert gap_mm[part] <= 2, (part, gap_mm)
    assert all(gap_mm[finger, 0] <= 3 for finger in range(1, 5)), gap_mm
    other = {
        part: 2000 * height for part, height in gaps(figure, RIGHT, lambda v: tuple(-x for x in middle(v))).items()
    }
    assert max(abs(other[part] - gap_mm[part]) for part in gap_mm) < 0.3


def test_hands_lie_on_hips_and_cheeks():
    for name, joints in (("hands_on_hips", (0, 1, 2, 3, 6)), ("hand_on_cheek", (15,))):
        pose = sample_pose(name, np.zeros(10), np.random.default_rng(2), "left")
        body = pose.vertices[np.isin(load_human().owner, joints)]
        near = torch.cdist(torch.from_numpy(pose.vertices[hand_ids(LEFT)]), torch.from_numpy(body)).min()
        assert near < 0.012, name  # vertices of cheek and hips lie a centimetre apart


@pytest.mark.parametrize("framing", FRAMINGS)
def test_cameras_show_what_the_framing_promises(framing):
    rng = np.random.default_rng(0)
    for seed in range(4):
        pose = sample_pose("waving", np.zeros(10), np.random.default_rng(seed), "left")
        camera = frame(pose.joints, framing, rng, (LEFT,))
        seen = 0.5 * camera.s * (pose.joints[list(HAND_JOINTS[LEFT]), :2] + (camera.tx, camera.ty))
        assert np.abs(seen).max() < 0.5
        if framing != "close-up":
            top = 0.5 * camera.s * (pose.joints[15, 1] + 0.17 + camera.ty)
            assert top < 0.5


# --- wide sleeves ---


def test_wide_sleeves_hang_from_the_arm(standing):
    normals = torch.from_numpy(vertex_normals(standing.astype(float))).float()
    plain = Look(sleeve=0.85)

    def shell(look: Look) -> np.ndarray:
        return mesh_of(torch.from_numpy(standing), normals, look, torch.zeros(1)).numpy()

    mesh = surface()
    cloth = load_human().kind[mesh.source] == CLOTHES
    side = np.abs(mesh.rest[:, 0])
    end = cloth & (np.abs(side - sleeve_end(plain)) < 0.03)
    for name, cuff in CUFFS.items():
        wide, before = shell(replace(plain, cuff=cuff)), shell(plain)
        for sign in (1, -1):
            mine = end & (mesh.rest[:, 0] * sign > 0)
            drop, rise = before[mine, 1].min() - wide[mine, 1].min(), wide[mine, 1].max() - before[mine, 1].max()
            assert 0.6 * cuff < drop < 1.3 * cuff and abs(rise) < 0.25 * cuff, name
        assert (wide[~cloth] == before[~cloth]).all() and (wide[side < 0.2] == before[side < 0.2]).all()
    shown, _ = cuts(replace(plain, cuff=0.06))
    assert shown.sum() > cuts(plain)[0].sum()  # the arm within the sleeve


def test_some_people_wear_wide_sleeves():
    looks = [sample_look(np.random.default_rng(i)) for i in range(600)]
    wide = [look for look in looks if look.cuff]
    assert 0.02 < len(wide) / len(looks) < 0.12 and all(look.sleeve > 0.7 for look in wide)
    kinds = {min(CUFFS, key=lambda name: abs(CUFFS[name] - look.cuff)) for look in wide}
    assert kinds == set(CUFFS)


# --- pictures ---


@pytest.fixture(scope="module")
def standing() -> np.ndarray:
    return human_body().v_template.numpy()


def draw(vertices: np.ndarray, look: Look = Look(), camera: Camera = Camera(1.0, 0, 0.25), **more) -> np.ndarray:  # noqa: B008
    return render([Person(vertices, look)], camera, Lamp(), GREY, size=64, **more).numpy().astype(int)


def test_a_sleeve_covers_what_it_says(standing):
    look = Look(skin=(0.9, 0.7, 0.6), shirt=(0.1, 0.1, 0.9))
    blue = []
    for sleeve in SLEEVES.values():
        picture = draw(standing, replace(look, sleeve=sleeve))
        blue.append(((picture[..., 2] - picture[..., 0]) > 40).sum())
    assert all(b > a + 8 for a, b in pairwise(blue)), blue


def test_every_look_is_drawn_and_repeats(standing):
    seen = set()
    for i in range(7):
        look = Look(
            haircut=HAIRCUTS[i], pattern=PATTERNS[i], neck=NECKS[i % 6], smile=0.5, beard=0.5, varnish=(1, 0, 0)
        )
        first, again = draw(standing, look, seed=1), draw(standing, look, seed=1)
        assert (first == again).all() and first.shape == (64, 64, 3)
        seen.add(first.tobytes())
    assert len(seen) == 7
    empty = render([Person(standing)], Camera(1, 9, 9), Lamp(), GREY, size=64)
    assert empty.float().std() < 4  # nothing but the background


def test_the_nearer_of_two_people_hides_the_other(standing):
    red, green = Look(shirt=(0.9, 0.1, 0.1), sleeve=0.95), Look(shirt=(0.1, 0.8, 0.1), sleeve=0.95)
    near = standing + np.float32([0, 0, 0.5])
    for front, back, channel in ((red, green, 0), (green, red, 1)):
        people = [Person(standing, back), Person(near, front)]
        for order in (people, people[::-1]):
            picture = render(order, Camera(1.6, 0, 0), Lamp(), GREY, size=48).numpy()
            chest = picture[16:28, 21:27].reshape(-1, 3).mean(0)
            assert chest.argmax() == channel
    apart = render([Person(standing + np.float32([1, 0, 0]), red), Person(standing - np.float32([1, 0, 0]), green)],
                   Camera(0.5, 0, 0.3), Lamp(), GREY, size=64).numpy().astype(int)  # fmt: skip
    assert ((apart[:, 32:, 0] - apart[:, 32:, 1]) > 30).sum() > 40 < ((apart[:, :32, 1] - apart[:, :32, 0]) > 30).sum()


def test_creases_are_dark_and_far_edges_have_no_halo():
    side, pixel = 128, 0.0005  # metres of a sample
    row = torch.arange(side).repeat(side, 1)
    covered = torch.arange(side * side)
    crease = torch.where((row - 64).abs() < 6, -0.006, 0.0)  # between two fingers
    dark = _occlusion(covered, crease.flatten(), side, pixel).view(side, side)
    assert dark[64, 64] < 0.9 and dark[64, 20] > 0.97
    step = torch.where(row < 64, 0.2, 0.0)  # a hand, and a chest 20 cm behind
    assert _occlusion(covered, step.flatten(), side, pixel).min() > 0.95


def test_mirrored_people_give_mirrored_pictures(standing):
    human = load_human()
    look, lamp = Look(pattern="stripes"), Lamp((0.0, 0.4, 1.0))
    moved = standing.copy()
    moved[human.template[:, 0] > 0.1, 1] += 0.05
    other = moved[human.mirror] * np.float32([-1, 1, 1])
    pictures = [render([Person(v, look)], Camera(1.0, 0, 0.25), lamp, GREY, size=64).numpy() for v in (moved, other)]
    assert np.abs(pictures[0].astype(int) - pictures[1][:, ::-1].astype(int)).mean() < 4


def test_skin_tones_have_their_angle_and_are_spread_evenly():
    for low, high in ITA_CLASSES:
        for angle in np.linspace(low, high, 5):
            tone = skin_tone(angle)
            assert abs(ita_of(tone) - angle) < 3 and tone.min() > 0.05 and tone.max() < 1
            assert tone[0] > tone[1] > tone[2]
    rng = np.random.default_rng(0)
    angles = np.array([ita_of(np.array(sample_look(rng).skin)) for _ in range(900)])
    share = Counter(next(i for i, (low, _) in enumerate(ITA_CLASSES) if a > low - 1 or i == 5) for a in angles)
    assert len(share) == 6 and min(share.values()) > 100 and max(share.values()) < 220


def test_hands_are_lighter_inside_on_dark_skin(standing):
    look = Look(skin=tuple(skin_tone(-50)))
    turned = {}
    for name, angle in (("palm", -90), ("back", 90)):
        rotations = torch.eye(3).repeat(1, 52, 1, 1)
        c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        rotations[0, 0] = torch.tensor([[1, 0, 0], [0, c, -s], [0, s, c]])
        with torch.no_grad():
            v, j = human_body()(rotations, torch.zeros(1, 10))
        x, y = j[0, 25, :2].tolist()
        picture = draw(v[0].numpy(), look, Camera(2 / 0.08, 0.04 - x, -y))
        turned[name] = picture[28:36, 28:36].mean()
    assert turned["palm"] > turned["back"] + 12


@pytest.mark.parametrize("kind", KINDS)
def test_backgrounds_differ_and_repeat(kind):
    pictures = [backdrop(kind, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert torch.equal(pictures[0][0], pictures[1][0]) and pictures[0][1] == pictures[1][1]
    assert (pictures[0][0] - pictures[2][0]).abs().mean() > 0.01
    assert pictures[0][0].min() >= 0 and pictures[0][0].max() <= 1
