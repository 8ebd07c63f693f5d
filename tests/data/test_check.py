"""`hd-data check` finds each kind of mistake, names nothing that is right, and moves what fails aside without loss."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from commands import invoke
from datasets import made_hands, same
from handiffuser.data.check import ASIDE, check, check_samples, set_aside
from handiffuser.data.cli import commands
from handiffuser.data.hands import joints_in_picture, rest
from handiffuser.data.samples import Bad, Sample, members, read, scan, write_shard
from handiffuser.demo.dataset import samples_of, scene_of
from handiffuser.demo.gestures import NAMES, pose
from handiffuser.demo.render import demo_body
from handiffuser.errors import DatasetError
from handiffuser.rotations import axis_angle_to_matrix, matrix_to_axis_angle


@pytest.fixture(scope="module")
def body():
    return demo_body()


@pytest.fixture(scope="module")
def good(body) -> list[Sample]:
    """Scenes of the demo world, which are right in everything."""
    scenes, prompts = zip(*(scene_of(2, i) for i in range(12)), strict=True)
    return samples_of(scenes, prompts, [f"good-{i}" for i in range(12)], body, 64)


def kinds(sample, body, **more) -> list[str]:
    return [kind for kind, _ in check_samples([sample], body, **more)[0]]


def test_what_is_right_is_not_named(good, body):
    assert [found for found in check_samples(good, body) if found] == []
    assert kinds(Sample("a", ["a left hand, not annotated"]), body) == []


def one_hand(good: list[Sample], side: str) -> Sample:
    return next(sample for sample in good if sample.meta["labels"]["side"] == side)


def changed(sample: Sample, **arrays) -> Sample:
    return Sample(sample.key, sample.prompts, {**sample.hands, **arrays}, sample.image, sample.meta)


def test_hands_off_the_picture_are_found(good, body):
    sample = one_hand(good, "left")
    place = sample.hands["placement"].copy()
    place[0, 1] = 1.4
    assert kinds(changed(sample, placement=place), body) == ["outside", "apart"]
    place[0, 3] += 3  # twenty times as large, and in the middle
    place[0, 1] = 0
    assert kinds(changed(sample, placement=place), body)[0] == "outside"


def test_a_wrong_convention_is_found(good, body):
    """Joints as annotated by someone else, y upside down."""
    sample = one_hand(good, "right")
    joints = sample.hands["joints_2d"]
    assert kinds(changed(sample, joints_2d=joints + np.float32([0.02, 0])), body) == []
    assert kinds(changed(sample, joints_2d=joints * np.float32([1, -1]) + np.float32([0, 1])), body) == ["apart"]


@pytest.mark.parametrize(
    ("side", "prompt", "wrong"),
    [
        ("right", "a left hand making a fist", True),
        ("right", "a tan Left cupped hand", True),
        ("left", "the right fist", True),
        ("right", "a right hand", False),
        ("right", "a left and a right hand", False),
        ("right", "left hand over right hand", False),
        ("right", "a hand, on the left hand lotion", False),
        ("right", "a left-handed player waves", False),
        ("right", "the man left his hand open", True),  # words are all it knows
        ("both", "a left hand", False),
        ("left", "an upright hand", False),
    ],
)
def test_captions_that_name_the_other_hand_are_found(good, body, side, prompt, wrong):
    sample = one_hand(good, side)
    found = kinds(Sample("a", ["a hand", prompt], sample.hands, sample.image), body)
    assert found == (["words"] if wrong else [])


def test_pictures_are_decoded_and_measured(good, body):
    sample = good[0]
    assert kinds(Sample("a", ["a"], image=sample.image), body, min_size=65) == ["small"]
    assert kinds(Sample("a", ["a"], image=sample.image), body, min_size=64) == []
    assert kinds(Sample("a", ["a"], image=sample.image[:500]), body) == ["no picture"]


def test_people_are_counted_and_each_is_checked(good, body):
    one, other = one_hand(good, "left"), one_hand(good, "right")
    both = {name: np.stack([one.hands[name], other.hands[name]]) for name in one.hands}
    counts: Counter[str] = Counter()
    samples = [Sample("a", ["a"], both, one.image), Sample("b", ["b"]), one]
    assert check_samples(samples, body, counts=counts) == [[], [], []]
    assert counts == {"pictures": 2, "hands 2": 1, "hands 0": 1, "hands 1": 1, "people": 3, "dropped": 1}
    both["placement"][1, 1, 1] = 5
    assert kinds(samples[0], body) == ["outside", "apart"]


def test_joints_are_those_of_the_features(body):
    """The quick way to the joints is the way of the pipeline."""
    import torch
    from handiffuser.data.hands import params_of, plain_features
    from handiffuser.models.hand_features import make_basis

    hands = [made_hands(i, camera=i % 3 == 0) for i in range(4)]
    joints, shown = joints_in_picture(hands, [1.5] * 4, body)
    found = plain_features(body, make_basis(), 1.5)(params_of(hands, body))
    seen = shown & np.ones((4, 2), bool)
    assert np.allclose(joints[seen], found["joints"].numpy()[seen], atol=1e-5)
    assert torch.equal(torch.from_numpy(shown).float() * found["visibility"], found["visibility"])


BROKEN = Sample("broken", ["a"], image=b"\x89PNG and no more")


def spoilt(folder: Path, good: list[Sample]) -> None:
    """Three shards: one with a wrong and a repeated sample, one that is right, one that is all wrong."""
    folder.mkdir()
    write_shard(folder / "00000.tar", [*good[:3], BROKEN, good[3]])
    write_shard(folder / "00001.tar", good[4:6])
    write_shard(folder / "00002.tar", [good[0], Sample("also", ["a"], image=b"\x89PNG")])


def test_all_that_is_wrong_is_listed(tmp_path, good, body):
    spoilt(tmp_path / "set", good)
    report = check(tmp_path / "set", body)
    assert [(p.key, p.shard, p.kind) for p in report.problems] == [
        ("broken", "00000.tar", "no picture"),
        ("also", "00002.tar", "no picture"),
        ("good-0", "00002.tar", "twice"),
    ]
    assert report.counts["samples"] == 9 and report.counts["pictures"] == 7
    two = check(tmp_path / "set", body, processes=2)
    assert (two.problems, two.counts) == (report.problems, report.counts)


def test_what_fails_is_moved_aside_and_nothing_is_lost(tmp_path, good, body):
    folder = tmp_path / "set"
    spoilt(folder, good)
    untouched = (folder / "00001.tar").read_bytes()
    assert set_aside(folder, check(folder, body).problems) == 2 + 2 + 3  # members: broken, also, good-0 again
    again = check(folder, body)
    assert again.problems == [] and again.counts["samples"] == 6
    assert [path.name for path in sorted(folder.iterdir())] == ["00000.tar", "00001.tar", ASIDE]
    assert all(same(a, b) for a, b in zip(read(folder), good[:6], strict=True))
    assert (folder / "00001.tar").read_bytes() == untouched
    assert [sample.key for sample in read(folder / ASIDE)] == ["broken", "good-0", "also"]
    assert set_aside(folder, check(folder, body).problems) == 0


def test_what_no_sample_owns_stays_in_its_shard(tmp_path, good, body):
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "notes.txt").write_text("a note")
    write_shard(folder / "00000.tar", [good[0], BROKEN])
    with tarfile.open(folder / "00000.tar", "a") as archive:
        archive.add(tmp_path / "notes.txt", "good-0.notes.txt")
    set_aside(folder, check(folder, body).problems)
    with tarfile.open(folder / "00000.tar") as archive:
        assert archive.extractfile("good-0.notes.txt").read() == b"a note"


def test_a_damaged_shard_is_kept_whole_aside_and_what_can_be_read_stays(tmp_path, good, body):
    folder = tmp_path / "set"
    folder.mkdir()
    path = folder / "00000.tar"
    write_shard(path, good[:6])
    cut = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(cut)
    whole = len(scan(path)[0])
    problems = check(folder, body).problems
    assert any("The shard is damaged" in str(problem) for problem in problems) and 0 < whole < 6
    set_aside(folder, problems)
    assert (folder / ASIDE / "00000.tar").read_bytes() == cut
    assert check(folder, body).problems == []
    assert all(same(a, b) for a, b in zip(read(folder), good[:whole], strict=True))


def test_a_second_fix_overwrites_nothing(tmp_path, good, body):
    folder = tmp_path / "set"
    for _ in range(2):
        folder.mkdir(exist_ok=True)
        write_shard(folder / "00000.tar", [good[0], BROKEN])
        set_aside(folder, check(folder, body).problems)
    assert sorted(path.name for path in (folder / ASIDE).iterdir()) == ["00000-2.tar", "00000.tar"]


def test_plain_files_are_moved_with_all_that_is_theirs(tmp_path, good, body):
    for sample in (good[0], BROKEN):
        for name, data in members(sample).items():
            (tmp_path / f"{sample.key}.{name}").write_bytes(data)
    (tmp_path / "broken.hands.png").write_bytes(b"a skeleton")
    (tmp_path / "index.html").write_text("<p>")
    assert set_aside(tmp_path, check(tmp_path, body).problems) == 3
    assert {p.name for p in (tmp_path / ASIDE).iterdir()} == {"broken.json", "broken.png", "broken.hands.png"}
    assert [sample.key for sample in read(tmp_path)] == ["good-0"] and (tmp_path / "index.html").exists()


def test_an_empty_folder_is_a_sentence(tmp_path, body):
    with pytest.raises(DatasetError, match="holds no samples"):
        check(tmp_path, body)


def test_the_command_says_it_and_mends_it(tmp_path, good):
    spoilt(tmp_path / "set", good)
    result = invoke("data.cli", "check", tmp_path / "set")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert result.stdout.splitlines()[0].startswith("00000.tar: broken: Its picture cannot be decoded")
    assert len(result.stdout.splitlines()) == 3 and "no picture 2, twice 1" in result.stderr
    fixed = invoke("data.cli", "check", tmp_path / "set", "--fix")
    assert fixed.returncode == 0 and "7 files moved" in fixed.stderr, fixed.stderr
    nothing = invoke("data.cli", "check", tmp_path / "nothing")
    assert nothing.returncode == 1 and "does not exist" in nothing.stderr


# --- conventions, in sizes of the hand ---

MANO_JOINTS = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)  # ours, by MANO's numbers


def annotated(body, rng, sizes: list[float]) -> list[tuple[Sample, int, np.ndarray]]:
    """Hands as others annotate them, each with its side and its fingers [15, 3]. sizes: radii, of the picture's height.

    joints_2d is that of another person, whose bones are 8 % longer or shorter each, and of an annotator, whose clicks
    miss by 8 % of the hand's size each, 5 % more a finger and 8 % for all together, and one in twenty by 30 %."""
    out, people = [], []
    for size in sizes:
        side = int(rng.integers(2))
        fingers = matrix_to_axis_angle(pose(NAMES[rng.integers(len(NAMES))], side, rng)).astype(np.float64)
        palm = [rng.choice([-1, 1]) * np.pi / 2, 0, 0]
        tilt = [*rng.normal(0, 0.35, 2), 0]
        spin, tilt, palm = axis_angle_to_matrix(np.array([[0, 0, rng.uniform(-np.pi, np.pi)], tilt, palm]))
        hands = rest()
        hands[f"{('left', 'right')[side]}_hand_pose"] = fingers.reshape(-1).astype(np.float32)
        arms = hands["body_pose"].reshape(21, 3).copy()
        arms[15 + side] = matrix_to_axis_angle((spin @ tilt @ palm)[None])[0]
        place = np.zeros((2, 4), np.float32)
        place[side] = [1, *rng.uniform(-0.3, 0.3, 2), np.log(2 * size)]
        hands |= {"body_pose": arms.reshape(-1), "placement": place, "visibility": np.float32([1 - side, side])}
        people.append(hands)
        out.append((Sample("a", ["a"], hands), side, fingers))
    joints, _ = joints_in_picture(people, [1.0] * len(people), body)
    for (_, side, _), hands, both, size in zip(out, people, joints.astype(np.float64), sizes, strict=True):
        true = both[side]
        chains = np.concatenate([np.broadcast_to(true[0], (5, 1, 2)), true[1:].reshape(5, 4, 2)], 1)
        bones = np.diff(chains, axis=1) * (1 + rng.normal(0, 0.08, (5, 4, 1)))
        true[1:] = (true[0] + np.cumsum(bones, 1)).reshape(20, 2)
        miss = rng.normal(0, 0.08, (21, 2)) + rng.normal(0, 0.08, 2)
        miss[1:] += rng.normal(0, 0.05, (5, 2)).repeat(4, 0)
        miss += rng.normal(0, 0.3, (21, 2)) * (rng.random((21, 1)) < 0.05)
        both[side] = true + size * miss
        hands["joints_2d"] = both.astype(np.float32)
    return out


def mistaken(kind: str, sample: Sample, side: int, fingers: np.ndarray) -> Sample:
    joints = sample.hands["joints_2d"].copy()
    middle = joints[side].mean(0)
    if kind in ("inverted", "mirrored", "order", "flat"):
        other = {
            "inverted": -fingers,
            "mirrored": fingers * (1, -1, -1),
            "order": fingers.reshape(5, 3, 3)[[4, 0, 1, 3, 2]],
            "flat": 0 * fingers,
        }[kind]
        name = f"{('left', 'right')[side]}_hand_pose"
        return changed(sample, **{name: other.reshape(-1).astype(np.float32)})
    if kind == "mirrored picture":
        joints[side] = middle + (joints[side] - middle) * (-1, 1)
    else:
        joints[side, MANO_JOINTS] = joints[side].copy()
    return changed(sample, joints_2d=joints)


@pytest.mark.parametrize("size", [0.03, 0.08, 0.3])
@pytest.mark.parametrize("kind", ["inverted", "mirrored", "mirrored picture", "MANO's joints", "order", "flat"])
def test_mistakes_of_hands_of_any_size_are_found(body, kind, size):
    rng = np.random.default_rng(1)
    hands = annotated(body, rng, [size] * 60)
    if kind == "flat":
        hands = [one for one in hands if np.linalg.norm(one[2][:12], axis=1).mean() > np.radians(30)]
    found = check_samples([mistaken(kind, *one) for one in hands[:30]], body)
    assert len(found) == 30
    assert sum(any(problem == "apart" for problem, _ in one) for one in found) >= 27


@pytest.mark.slow
def test_noise_of_annotators_is_no_mistake(body):
    right = [sample for sample, *_ in annotated(body, np.random.default_rng(2), [0.03, 0.05, 0.08, 0.15, 0.3] * 60)]
    assert [found for found in check_samples(right, body) if any(kind == "apart" for kind, _ in found)] == []


def test_the_mistake_is_named(body):
    bent = (one for one in annotated(body, np.random.default_rng(3), [0.08] * 20) if np.abs(one[2]).mean() > 0.4)
    sample, side, fingers = next(bent)
    words = {"inverted": "bend", "MANO's joints": "MANO's order", "mirrored picture": "mirrored", "flat": "nearly flat"}
    for kind, word in words.items():
        ((_, sentence),) = check_samples([mistaken(kind, sample, side, fingers)], body)[0]
        assert word in sentence and f"Its {('left', 'right')[side]} hand" in sentence, sentence
    name = f"{('left', 'right')[side]}_hand_pose"
    bare = {array: value for array, value in sample.hands.items() if array != "joints_2d"}
    inverted = Sample("a", ["a"], {**bare, name: -bare[name]})
    assert "bend backwards by" in check_samples([inverted], body)[0][0][1]  # without a picture, too
    assert check_samples([Sample("a", ["a"], bare)], body) == [[]]


def test_hands_elsewhere_or_of_another_size_are_found(body):
    ((sample, side, _),) = annotated(body, np.random.default_rng(4), [0.05])
    joints = sample.hands["joints_2d"]
    for other, word in ((joints + np.float32([0.05, 0]), "away"), (joints * 2 - joints[side].mean(0), "as large")):
        ((kind, sentence),) = check_samples([changed(sample, joints_2d=other)], body)[0]
        assert kind == "apart" and word in sentence


# --- shards that are packed otherwise ---


def packed_as(path: Path, names: list[str], files: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            archive.addfile(info, io.BytesIO(files[name]))


def files_of(samples: list[Sample]) -> dict[str, bytes]:
    return {f"{sample.key}.{name}": data for sample in samples for name, data in members(sample).items()}


def test_members_that_are_scattered_are_read_named_and_not_moved(tmp_path, good, body):
    files = files_of(good[:3])
    packed_as(tmp_path / "00000.tar", sorted(files, key=lambda name: name.partition(".")[2]), files)
    assert all(same(a, b) for a, b in zip(read(tmp_path), good[:3], strict=True))
    (problem,) = check(tmp_path, body).problems
    assert problem.kind == "scattered" and "tar --sort=name" in problem.sentence
    assert set_aside(tmp_path, [problem]) == 0 and (tmp_path / "00000.tar").exists()


def test_a_scattered_shard_that_is_cut_gives_no_half_samples(tmp_path, good):
    files = files_of(good[:4])
    packed_as(tmp_path / "00000.tar", sorted(files, key=lambda name: name.partition(".")[2]), files)
    content = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(content[: content.rindex(good[2].image)])
    found = list(read(tmp_path))
    assert all(same(a, b) for a, b in zip((s for s in found if isinstance(s, Sample)), good, strict=False))
    assert {bad.key for bad in found if isinstance(bad, Bad)} == {"", "good-2", "good-3"}


@pytest.mark.parametrize(("mode", "name"), [("w:gz", "00000.tar.gz"), ("w:gz", "00000.tgz"), ("w:gz", "00000.tar"),
                                            ("w:bz2", "00000.tar.bz2"), ("w:xz", "00000.tar.xz")])  # fmt: skip
def test_compressed_shards_are_named_and_not_moved(tmp_path, good, body, mode, name):
    files = files_of(good[:2])
    packed_as(tmp_path / name, list(files), files, mode)
    write_shard(tmp_path / "00001.tar", good[2:3])
    report = check(tmp_path, body)
    ((problem),) = report.problems
    assert problem.kind == "packed" and "Unpack it" in problem.sentence and report.counts["samples"] == 1
    assert set_aside(tmp_path, report.problems) == 0 and (tmp_path / name).exists()


def test_people_who_are_dropped_are_counted(tmp_path, good):
    one = one_hand(good, "left")
    three = Sample("three", ["a"], {name: np.stack([value] * 3) for name, value in one.hands.items()}, one.image)
    write_shard(tmp_path / "00000.tar", [three])
    result = CliRunner().invoke(commands, ["check", str(tmp_path)], standalone_mode=False)
    assert "with more 1; 3 people." in result.stderr and "2 of 3 people are dropped" in result.stderr
