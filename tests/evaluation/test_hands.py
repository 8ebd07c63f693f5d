"""Hands that were asked for beside those that were found."""

from __future__ import annotations

import numpy as np
import pytest
from handiffuser.detection.detect import Found, padded
from handiffuser.evaluation.hands import Asked, crop, hand_size, match

RNG = np.random.default_rng(0)


def joints(x: float, y: float, size: float = 0.2) -> np.ndarray:
    points = np.random.default_rng(1).uniform(0, 1, (21, 2))
    return np.array([x, y]) + size * (points - 0.5)


def test_each_hand_gets_the_nearest_one_whatever_it_is_called():
    asked = [Asked("left", joints(0.7, 0.5)), Asked("right", joints(0.3, 0.5))]
    found = [Found("left", 0.9, joints(0.31, 0.5)), Found("left", 0.8, joints(0.7, 0.52))]
    left, right = match(asked, found, (100, 100))
    assert (left.found, right.found) == (found[1], found[0])
    assert left.asked.side == left.found.side and right.asked.side != right.found.side
    size = hand_size(asked[0].joints, (100, 100))
    assert left.distances == pytest.approx(np.full(21, 2 / size)), "2 pixels down, in sizes of the hand"


def test_a_hand_far_away_is_another_one_and_a_miss_counts_0():
    asked = [Asked("right", joints(0.2, 0.2, 0.1))]
    (hand,) = match(asked, [Found("right", 0.9, joints(0.8, 0.8, 0.1))], (100, 100))
    assert hand.found is None and hand.score == 0 and hand.distances is None
    assert match(asked, [], (100, 100))[0].found is None


def test_two_asked_and_one_found():
    asked = [Asked("left", joints(0.7, 0.5)), Asked("right", joints(0.3, 0.5))]
    one = Found("right", 0.9, joints(0.32, 0.5))
    assert [hand.found for hand in match(asked, [one], (64, 64))] == [None, one]


def test_a_crowd_is_matched_in_time():
    asked = [Asked("left", joints(i / 12, 0.5, 0.05)) for i in range(12)]
    found = [Found("left", 0.5, joints(i / 12, 0.5, 0.05)) for i in reversed(range(12))]
    assert all(hand.distances.max() < 1e-9 for hand in match(asked, found, (500, 500)))


def test_nothing_asked_for_takes_the_surest():
    found = [Found("left", 0.4, joints(0.5, 0.5)), Found("right", 0.9, joints(0.4, 0.5))]
    assert [hand.found for hand in match([], found, (64, 64))] == [found[1]]
    assert match([], [], (64, 64))[0].score == 0


def test_crops_are_squares_around_the_joints():
    image = RNG.integers(0, 255, (80, 120, 3), np.uint8)
    place = joints(0.5, 0.5, 0.5)
    cut = crop(image, place)
    assert cut.shape[0] == cut.shape[1] == round(1.2 * hand_size(place, image.shape))
    assert crop(image, joints(0.5, 0.5, 0.01), least=32).shape == (32, 32, 3)
    assert crop(image, np.full((21, 2), 0.5)).shape == (32, 32, 3)
    outside = crop(image, joints(1.0, 1.0, 0.3))
    assert (outside[-1, -1] == image[-1, -1]).all(), "the edge goes on"
    assert crop(image, joints(50.0, -50.0, 30.0)).shape[0] <= 4 * 120


def test_padding_says_where_it_put_things():
    image = np.zeros((64, 96, 3), np.uint8)
    image[20, 70] = 255
    shown, scale, shift = padded(image, 0.25, 768)
    assert max(shown.shape) == 768
    y, x = np.unravel_index(shown[..., 0].argmax(), shown.shape[:2])
    place = np.array([(x + 0.5) / shown.shape[1], (y + 0.5) / shown.shape[0]]) * scale + shift
    assert place == pytest.approx([70.5 / 96, 20.5 / 64], abs=0.01)
