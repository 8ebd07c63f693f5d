"""The demo's report: scenes that say what they are judged by, and every table from one command."""

from __future__ import annotations

import json

import pytest
import torch
from commands import run_study
from handiffuser.demo.dataset import LABELS, class_numbers, labels_of, make
from handiffuser.demo.gestures import NAMES
from handiffuser.demo.prompts import VIEWS, is_held_out, is_held_out_pair
from judge import Judge
from report import TWO_HANDS, agreement, held_out_scenes


def test_scenes_are_held_out_and_views_come_equally_often():
    scenes = held_out_scenes(144)
    assert all(is_held_out(scene.prompt) for scene in scenes)
    assert [scene.spec.view for scene in scenes] == list(VIEWS) * 48
    assert {scene.spec.gesture for scene in scenes} == set(NAMES)
    again = held_out_scenes(9)
    assert [scene.prompt for scene in again] == [scene.prompt for scene in scenes[:9]]  # however many there are


@pytest.mark.parametrize("kind", TWO_HANDS)
def test_two_hands_do_what_the_kind_says(kind):
    for scene in held_out_scenes(30, kind=kind):
        spec = scene.spec
        assert spec.side == "both" and scene.present.all() and is_held_out(scene.prompt)
        assert bool(spec.other) == (kind != "alike")
        assert is_held_out_pair(spec.gesture, spec.gesture_of(1)) == (kind == "new pairs")
        assert not spec.other or {"left", "right"} <= set(scene.prompt.lower().replace(",", " ").split())


def test_agreement_counts_only_what_was_said():
    scenes = [*held_out_scenes(2), *held_out_scenes(2, kind="pairs")]
    wanted = torch.tensor([class_numbers(labels_of(scene.spec)) for scene in scenes])
    seen = wanted.clone()
    seen[seen < 0] = 3
    assert set(agreement(seen, wanted).values()) == {1.0}
    seen[3, list(LABELS).index("other")] += 1
    assert agreement(seen, wanted)["other"] == 0.5  # two of the four have another hand
    assert "other" not in agreement(seen[:2], wanted[:2])


def test_the_judge_reads_every_label():
    logits = Judge()(torch.zeros(2, 3, 128, 128))
    assert {label: value.shape[1] for label, value in logits.items()} == {k: len(v) for k, v in LABELS.items()}


@pytest.mark.slow
def test_the_report_has_all_its_tables(tmp_path):
    make(tmp_path / "world", 40, processes=1)
    words = ["demo", "--world", tmp_path / "world", "--run", tmp_path / "run", "--judge-steps", 2, "--count", 12]
    done = run_study("report", *words)
    assert done.returncode == 0, done.stderr
    assert "its verdict does not count" in done.stderr.replace("\n", " ")  # it has hardly seen anything
    result = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = ["renders", "renders, through the VAE", "true hands", "generated hands, rendered", "full pipeline"]
    assert list(result["accuracy"]) == rows and not result["judge_counts"]
    assert set(result["accuracy_by_view"]) == set(VIEWS) and set(result["two_hands"]) == set(TWO_HANDS)
    assert set(result["two_hands"]["pairs"]["renders"]) >= {"gesture", "other", "side"}
    assert result["hands_where_asked"] > 0.9 and result["vae_psnr_db"] > 25
    assert (tmp_path / "run" / "report.png").stat().st_size > 10_000
