"""At the converters' doors: what others' loops leave behind, degenerate values, captions with times, layouts, names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from annotations import SIZE, UPRIGHT, amass_file, convert, estimate, hamer, standing, turn
from datasets import made_sample
from handiffuser.data.convert import FORMATS, Options
from handiffuser.data.hands import joints_at_rest
from handiffuser.data.samples import Sample, read, write_shards
from handiffuser.demo.render import demo_body
from handiffuser.detection.arms import LEFT, RIGHT
from handiffuser.detection.mano import in_picture, mano_estimates
from handiffuser.errors import DatasetError
from handiffuser.models.smplh import SMPLH
from handiffuser.rotations import matrix_to_axis_angle


@pytest.fixture(scope="module")
def body() -> SMPLH:
    return demo_body()


# --- what others' loops leave behind ---


def hamers(body: SMPLH, side: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """A hand in the middle of its crop, with the wrist where MANO has it; its pixels, its turn and its fingers."""
    rng = np.random.default_rng(seed)
    fingers = rng.normal(0, 0.4, (15, 3))
    orientation = UPRIGHT @ turn(*rng.normal(0, 1, 3))
    one = estimate(body, side, orientation, fingers, (200, 150), 120, (6.0, 0, 0))
    points = one["pred_keypoints_3d"] + (0.0957, 0.0064, 0.0062)
    shift = -(points[:, :2].min(0) + points[:, :2].max(0)) / 2 + rng.normal(0, 0.005, 2)
    one |= {"pred_keypoints_3d": points, "pred_cam": np.array([6.0, *shift]), "pred_cam_t": np.array([*shift, 30.0])}
    pixels = (200, 150) + 60 * 6.0 * (points[:, :2] + shift) * (1 if side else -1, 1)
    return one, pixels, orientation, fingers


def opposite(values: np.ndarray) -> np.ndarray:
    """With x negated, as a loop does in place."""
    return np.concatenate([-values[..., :1], values[..., 1:]], -1)


def left_behind(kind: str, one: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A left hand after the loop of HaMeR's demo, of WiLoR's on a CPU, or after WiLoR-mini."""
    camera = one["pred_cam"] * (1, -1, 1)
    bare = {name: value for name, value in one.items() if name != "pred_cam_t"}
    mirror = np.diag([-1.0, 1, 1])
    return {
        "the docs": one,
        "without pred_cam_t": bare,
        "HaMeR with pred_cam_t": {**one, "pred_cam": camera},
        "HaMeR": {**bare, "pred_cam": camera},
        "WiLoR on a CPU": {**bare, "pred_cam": camera, "pred_keypoints_3d": opposite(one["pred_keypoints_3d"])},
        "WiLoR-mini": {
            **bare,
            "pred_cam": camera,
            "pred_keypoints_3d": opposite(one["pred_keypoints_3d"]),
            "global_orient": matrix_to_axis_angle(mirror @ one["global_orient"] @ mirror),
            "hand_pose": matrix_to_axis_angle(mirror @ one["hand_pose"] @ mirror),
        },
    }[kind]


@pytest.mark.parametrize(
    "kind", ["the docs", "without pred_cam_t", "HaMeR with pred_cam_t", "WiLoR on a CPU", "WiLoR-mini"]
)
def test_left_hands_are_read_rightly_however_they_were_mirrored(tmp_path, body, kind):
    for seed in range(20):
        one, pixels, orientation, fingers = hamers(body, LEFT, seed)
        np.savez(tmp_path / "a.npz", **{name: value[None] for name, value in left_behind(kind, one).items()})
        (found,) = mano_estimates(tmp_path / "a.npz", (np.zeros(45), np.zeros(45)), joints_at_rest(body))
        assert np.allclose(found.turn, orientation, atol=1e-6) and np.allclose(found.fingers, fingers, atol=1e-6)
        assert np.allclose(in_picture(found, SIZE).joints_2d, pixels), seed


def test_a_tx_that_was_negated_in_place_is_named(tmp_path, body):
    """Where it moves the hand by more than a little: a tx near 0 is its own opposite."""
    for seed in range(20):
        one, pixels, *_ = hamers(body, LEFT, seed)
        np.savez(tmp_path / "a.npz", **{name: value[None] for name, value in left_behind("HaMeR", one).items()})
        try:
            (found,) = mano_estimates(tmp_path / "a.npz", (np.zeros(45), np.zeros(45)), joints_at_rest(body))
        except ValueError as error:
            assert 'out["pred_cam"].clone()' in str(error) and "hand 1 (left)" in str(error)
        else:
            assert np.abs(in_picture(found, SIZE).joints_2d - pixels).max() < 0.25 * 60, seed


DEGENERATE = {
    "zero orientation": ({"global_orient": np.zeros((1, 3, 3))}, "must hold rotations"),
    "zero fingers": ({"hand_pose": np.zeros((15, 3, 3))}, "hand_pose in b.npz must hold rotations"),
    "a reflection": ({"global_orient": np.diag([1.0, 1, -1])[None]}, "must hold rotations"),
    "a scaled matrix": ({"global_orient": 2 * np.eye(3)[None]}, "must hold rotations"),
    "quaternions": ({"hand_pose": np.zeros((15, 4))}, "of shape [1, 15, 3, 3], got [1, 15, 4]"),
    "negative scale": ({"pred_cam": np.array([-7.0, 0, 0])}, "above 0, got -7"),
    "scale 0": ({"pred_cam": np.zeros(3)}, "above 0, got 0"),
    "box 0": ({"box_size": np.float64(0)}, "above 0, got 0"),
    "NaN": ({"box_center": np.array([np.nan, 0])}, "box_center in b.npz must be finite"),
    "infinity": ({"pred_cam": np.array([np.inf, 0, 0])}, "pred_cam in b.npz must be finite"),
    "infinite angles": ({"hand_pose": np.full(45, np.inf)}, "hand_pose in b.npz must be finite"),
    "degrees": ({"hand_pose": np.full(45, 90.0)}, "hand_pose in b.npz must be in radians, got 90"),
    "one point": ({"pred_keypoints_3d": np.zeros((21, 3))}, "metres, got 0"),
    "millimetres": ({"pred_keypoints_3d": 90 * np.eye(21, 3)}, "must be of a hand of"),
    "no side": ({"is_right": np.float64(2)}, "must be 0 or 1"),
    "far away": ({"box_center": np.array([1e9, 0])}, "placement must be at most"),
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_estimates_are_named_when_they_come_in(tmp_path, body, kind):
    change, words = DEGENERATE[kind]
    good = estimate(body, RIGHT, UPRIGHT, np.zeros((15, 3)), (200, 150), 80, (7.0, 0, 0))
    hamer(tmp_path / "set/a", [good])
    hamer(tmp_path / "set/b", [{**good, **change}])
    (bad,) = write_shards(FORMATS["mano"](tmp_path / "set", Options(body)), tmp_path / "out")
    assert bad.key == "b" and words in bad.sentence, bad
    assert [sample.key for sample in read(tmp_path / "out")] == ["a"]


def test_an_is_right_that_the_loop_overwrote_is_named(tmp_path, body):
    hamer(
        tmp_path / "a",
        [estimate(body, RIGHT, UPRIGHT, np.zeros((15, 3)), (x, 150), 80, (7.0, 0, 0)) for x in (90, 300)],
    )
    with np.load(tmp_path / "a.npz") as archive:
        held = dict(archive)
    np.savez(tmp_path / "a.npz", **{**held, "is_right": np.float32(1)})
    (bad,) = convert("mano", tmp_path, body)
    assert "each of 2 hands, got 1" in bad.sentence and 'batch["right"]' in bad.sentence


def test_the_pages_snippet_is_safe_from_the_loop(tmp_path, body):
    """The code of docs/data.md around what the demo's loop does next, on two batches."""
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    before, after = re.search(
        r"```python\n(found = \[\].*?)    # \.\.\. the loop goes on\n(.*?)```", page, re.DOTALL
    ).groups()
    loop = (
        "    multiplier = 2 * batch['right'] - 1\n    pred_cam = out['pred_cam']\n"
        "    pred_cam[:, 1] = multiplier * pred_cam[:, 1]\n    is_right = batch['right'][0].cpu().numpy()\n"
    )
    hands = [hamers(body, side, seed) for seed, side in enumerate((LEFT, RIGHT, LEFT, LEFT))]

    def model(batch):
        some = [hands[i][0] for i in batch["numbers"]]
        out = {name: torch.from_numpy(np.stack([one[name] for one in some]))
               for name in ("pred_cam", "pred_cam_t", "pred_keypoints_3d")}  # fmt: skip
        poses = {
            name: torch.from_numpy(np.stack([one[name] for one in some])) for name in ("global_orient", "hand_pose")
        }
        return {**out, "pred_mano_params": poses}

    dataloader = [
        {"numbers": part, **{name: torch.tensor(np.stack([hands[i][0][key] for i in part]))
         for name, key in (("right", "is_right"), ("box_center", "box_center"), ("box_size", "box_size"))}}
        for part in ((0, 1), (2, 3))
    ]  # fmt: skip
    said = {"np": np, "torch": torch, "model": model, "dataloader": dataloader, "device": "cpu",
            "recursive_to": lambda batch, _: batch, "photo": tmp_path / "a.png"}  # fmt: skip
    exec(before + loop + after, said)
    found = mano_estimates(tmp_path / "a.npz", (np.zeros(45), np.zeros(45)), joints_at_rest(body))
    for one, (_, pixels, orientation, _) in zip(found, hands, strict=True):
        assert np.allclose(in_picture(one, SIZE).joints_2d, pixels) and np.allclose(one.turn, orientation)


# --- captions with times, layouts, pictures with captions alone ---


def test_captions_hold_for_their_seconds(tmp_path, body):
    """Of texts beside, as HumanML3D writes them: in amass and in motion-x."""
    text = "a man waves#a/DET#0.0#2.0\na man sits#a/DET#3.0#9.0\nsomeone\n"
    amass_file(tmp_path / "amass/a.npz", standing(300), 60.0)
    (tmp_path / "motion").mkdir()
    np.save(tmp_path / "motion/a.npy", np.zeros((150, 322)))
    for form, folder in (("amass", "amass"), ("motion-x", "motion")):
        (tmp_path / folder / "a.txt").write_text(text)
        prompts = [sample.prompts for sample in convert(form, tmp_path / folder, body)]
        waves, sits = ["a man waves", "someone"], ["a man sits", "someone"]
        assert prompts == [waves, waves, ["someone"], sits, sits]
        (tmp_path / folder / "a.txt").write_text("later#x#100#200")
        (bad,) = convert(form, tmp_path / folder, body)
        assert "No caption holds" in bad.sentence


@pytest.mark.parametrize("unpacked", ["texts", "HumanML3D/texts", "HumanML3D/texts/texts"])
@pytest.mark.parametrize("named", ["", "HumanML3D"])
def test_humanml3d_is_found_as_it_is_unpacked(tmp_path, body, unpacked, named):
    """At 150 frames a second every int(150 / 20) = 7th is kept, and the index counts those."""
    poses = standing(3000)
    poses[:, 66] = np.arange(3000) / 1e4
    amass_file(tmp_path / "amass/TCD/r.npz", poses, 150.0)
    root = tmp_path / "repo"
    (root / unpacked).mkdir(parents=True)
    (root / "HumanML3D").mkdir(exist_ok=True)
    line = "\ufeffsource_path,start_frame,end_frame,new_name\n./pose_data/TCD/r.npy,200,300,000000.npy\n"
    (root / "index.csv").write_text(line, encoding="utf-8")
    with pytest.raises(DatasetError, match=r"Unpack HumanML3D/texts\.zip"):
        convert("amass", tmp_path / "amass", body, texts=root)
    (root / unpacked / "000000.txt").write_text("a man walks#x#0.0#0.0\nturns#x#1.0#2.0\n")
    samples = convert("amass", tmp_path / "amass", body, texts=root / named)
    frames = [round(float(sample.hands["left_hand_pose"][0]) * 1e4) for sample in samples]
    assert frames == [7 * (200 + 21 * i) for i in range(5)]  # a second is 150 / 7 = 21 kept frames
    assert [len(sample.prompts) for sample in samples] == [1, 2, 1, 1, 1]  # 20 kept frames are HumanML3D's second


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"poses": np.zeros((3, 165))}, "SMPL-X's. Download AMASS's SMPL+H G."),
        ({"poses": np.zeros((3, 72))}, "SMPL's, without fingers"),
        ({"poses": np.full((2, 156), 90.0)}, "must be in radians, got 90"),
        ({"mocap_framerate": None}, "but lacks mocap_framerate."),
        ({"poses": None, "betas": None}, "but lacks poses, betas."),
    ],
)
def test_other_bodies_and_what_is_missing_are_named(tmp_path, body, change, words):
    held = {"poses": standing(), "betas": np.zeros(16), "mocap_framerate": 60.0, **change}
    np.savez(tmp_path / "a.npz", **{name: value for name, value in held.items() if value is not None})
    (tmp_path / "a.txt").write_text("someone")
    (bad,) = convert("amass", tmp_path, body)
    assert words in bad.sentence and "StopIteration" not in bad.sentence


def test_pictures_with_captions_are_samples_whose_hands_are_unknown(tmp_path, body):
    """kohya's layout: folders named after repeats and concept, a .txt or .caption beside each picture."""
    folder = tmp_path / "img/10_style"
    folder.mkdir(parents=True)
    for name in ("a.jpg", "b.PNG", "c.png", "d.bmp"):
        (folder / name).write_bytes(made_sample(0).image)
    (folder / "a.txt").write_text("a hand, ink drawing")
    (folder / "b.caption").write_text("two hands\n")
    a, b, c, d = convert("captions", tmp_path / "img", body)
    assert (a.key, a.prompts, a.hands, a.annotated) == ("10_style/a", ["a hand, ink drawing"], None, False)
    assert b.prompts == ["two hands"] and "into c.txt" in c.sentence and "d.bmp must be" in d.sentence
    assert write_shards([a, b], tmp_path / "out") == []
    assert [sample.annotated for sample in read(tmp_path / "out")] == [False, False]


def test_files_and_samples_add_up(tmp_path, body):
    good = estimate(body, RIGHT, UPRIGHT, np.zeros((15, 3)), (200, 150), 80, (7.0, 0, 0))
    for name in "abc":
        hamer(tmp_path / name, [good])
    (tmp_path / "b.png").rename(tmp_path / "b.PNG")
    (tmp_path / "c.png").rename(tmp_path / "c.heic")
    np.savez(tmp_path / "d.npz")
    a, b, c, d = convert("mano", tmp_path, body)
    assert isinstance(a, Sample) and isinstance(b, Sample)
    assert "c.heic must be" in c.sentence and "lacks a picture" in d.sentence
