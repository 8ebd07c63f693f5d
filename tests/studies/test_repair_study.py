"""The study of repairs: spoiled pictures, the judge that counts fingers, seams, and the whole study on two pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from commands import run_study

cv2 = pytest.importorskip("cv2")
import counting  # noqa: E402 (it needs OpenCV)
import spoiled  # noqa: E402
from counting import FIELD, UNIT  # noqa: E402

MIDDLE, KNUCKLES, WRIST = FIELD / 2, 0.55 * FIELD - UNIT / 2, 0.55 * FIELD + UNIT / 2


def silhouette(angles: list[float], reach: float = 1.9) -> np.ndarray:
    """An upright palm with fingers at angles from upright, in degrees, as far from the wrist as `reach` palms."""
    drawn = np.zeros((FIELD, FIELD), np.uint8)
    wide = round(0.42 * UNIT)
    cv2.rectangle(drawn, (round(MIDDLE) - wide, round(KNUCKLES)), (round(MIDDLE) + wide, FIELD), 1, -1)
    for angle in np.radians(angles):
        tip = np.array([MIDDLE, WRIST]) + reach * UNIT * np.array([np.sin(angle), -np.cos(angle)])
        cv2.line(drawn, (round(MIDDLE), round(WRIST)), tip.round().astype(int).tolist(), 1, round(0.2 * UNIT))
    return drawn > 0


@pytest.mark.parametrize("fingers", range(7))
def test_fingers_that_stand_apart_are_counted(fingers):
    assert counting.count(silhouette([20 * k - 10 * (fingers - 1) for k in range(fingers)])) == fingers


def test_grown_together_fingers_are_one_and_a_loose_finger_is_another():
    shape = silhouette([-30, -10, 10, 30])
    web = shape.copy()
    web[round(KNUCKLES - 0.8 * UNIT) : round(KNUCKLES), round(MIDDLE - 15) : round(MIDDLE + 15)] = True
    assert counting.count(web) == 3
    shape[round(KNUCKLES) - 40 : round(KNUCKLES), 20:34] = True
    assert counting.count(shape) == 5


def test_a_peak_lasts_to_the_saddle_that_joins_a_higher_one():
    land = np.array([[-1, 3, 9, 5, 2, 4, 7, 1, -1, 6]])
    assert sorted(counting.peaks(land)) == [(6, 0), (7, 2), (9, 0)]


def test_a_silhouette_is_what_has_the_colour_of_skin_whatever_lies_behind():
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 120, (200, 200, 3), np.uint8)
    points = np.array([(100.0, 150), *[(100 + 8 * f, 150 - 15 * (j + 1)) for f in range(-2, 3) for j in range(4)]])
    cover = np.zeros((200, 200), np.float32)
    cover[80:160, 70:130] = 1
    truth = ground.copy()
    truth[cover > 0] = (230, 180, 150)
    skin = counting.palette(truth, cover, points)
    shape = counting.silhouette(truth, ground, skin, points)
    wanted = counting.warped(cover, counting.upright(points)) > 0.5
    assert (shape != wanted).mean() < 0.01


@pytest.fixture(scope="module")
def pictures():
    return [spoiled.make(number) for number in range(6)]


def test_each_kind_is_spoiled_in_its_own_way(pictures):
    assert tuple(case.kind for case in pictures) == spoiled.KINDS
    six, missing, melted, fused, gesture, whole = pictures
    assert six.shown == six.count + 1 and missing.shown == missing.count - 1 and fused.shown == fused.count - 1
    assert (whole.picture == whole.truth).all() and gesture.shown != gesture.count
    for case in (six, missing, melted, fused, gesture):
        assert (case.picture != case.truth).any()


def test_spoiled_pictures_differ_from_the_truth_at_the_hand_alone(pictures):
    for case in pictures:
        away = (case.picture != case.truth).any(-1)
        low, high = case.hand.joints_2d.min(0) - case.pixels, case.hand.joints_2d.max(0) + case.pixels
        x0, y0, x1, y1 = *low.clip(0).astype(int), *high.astype(int)
        away[y0:y1, x0:x1] = False
        assert not away.any()
        assert (case.truth == case.ground)[case.cover == 0].all()
        assert 28 <= case.pixels <= 205 and max(case.picture.shape) <= spoiled.WIDEST


def test_the_judge_tells_six_fingers_from_five(pictures):
    six = pictures[0]
    skin = counting.palette(six.truth, six.cover, six.hand.joints_2d)
    for picture, wanted in ((six.picture, 6), (six.truth, 5)):
        assert counting.count(counting.silhouette(picture, six.ground, skin, six.hand.joints_2d)) == wanted


def test_a_seam_is_the_step_over_the_border():
    study = pytest.importorskip("repair")
    picture = np.zeros((20, 20, 3), np.float32)
    picture[:, 10:] = 30
    mask = np.zeros((20, 20), bool)
    mask[:, 10:] = True
    assert study.jump(picture, mask) == 30
    assert study.jump(picture, np.roll(mask, 4, 1) & mask) == 0
    assert study.jump(picture, np.zeros_like(mask)) is None


def test_what_the_command_declines_counts_as_the_spoiled_picture():
    study = pytest.importorskip("repair")
    note = {"sure": 1.0, "moved": 0.0}
    before, after = {"joints": 0.5, "fingers": 1.0}, {"joints": 0.9, "fingers": 0.0, "worse": 1.0}
    row = {"ways": {"spoiled": before, "automatic": {**after, "notes": [note]}}}
    assert study.gated(row) == row
    for change in ({"sure": 0.0}, {"moved": 1.0}):
        row["ways"]["automatic"]["notes"] = [note | change]
        left = study.gated(row)["ways"]["automatic"]
        assert left["joints"] == 0.5 and left["painted"] == left["worse"] == 0


@pytest.mark.slow
def test_the_study_measures_and_goes_on(tmp_path):
    pytest.importorskip("mediapipe")
    words = [tmp_path / "out", "--count", 2, "-o", tmp_path / "found.json", "--sheet", tmp_path / "sheet.png"]
    done = run_study("repair", *words)
    assert done.returncode == 0, done.stderr
    ways = json.loads((tmp_path / "found.json").read_text())["groups"]["all spoiled"]["ways"]
    assert ways["truth"]["fingers"] == ways["truth"]["fingers"] | {"value": 1.0, "n": 2}
    assert ways["spoiled"]["fingers"]["value"] == 0.0
    assert ways["given"]["outside"]["value"] == 0.0 and ways["given"]["painted"]["value"] == 1.0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run_study("repair", *words).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
