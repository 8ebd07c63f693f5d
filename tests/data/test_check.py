"""`hd-data check` finds each kind of mistake, names nothing that is right, and moves what fails aside without loss."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from datasets import made_hands, same
from handiffuser.data.check import ASIDE, check, check_samples, set_aside
from handiffuser.data.hands import joints_in_picture
from handiffuser.data.samples import Sample, members, read, scan, write_shard
from handiffuser.demo.dataset import samples_of, scene_of
from handiffuser.demo.render import demo_body
from handiffuser.errors import DatasetError


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
    result = run_command("data.cli", "check", tmp_path / "set")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    assert result.stdout.splitlines()[0].startswith("00000.tar: broken: Its picture cannot be decoded")
    assert len(result.stdout.splitlines()) == 3 and "no picture 2, twice 1" in result.stderr
    fixed = run_command("data.cli", "check", tmp_path / "set", "--fix")
    assert fixed.returncode == 0 and "7 files moved" in fixed.stderr, fixed.stderr
    nothing = run_command("data.cli", "check", tmp_path / "nothing")
    assert nothing.returncode == 1 and "There is no dataset folder" in nothing.stderr
