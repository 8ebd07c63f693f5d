"""Recipes: ours are right, wrong ones are a sentence, what was used is kept."""

from __future__ import annotations

import pytest
from handiffuser.errors import TrainingError
from handiffuser.training.recipe import PLANS, RECIPES, Recipe


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_ours_are_read_and_kept_whole(name, tmp_path):
    recipe = Recipe.load(name)
    recipe.save(tmp_path / "recipe.toml")
    assert Recipe.load(tmp_path / "recipe.toml") == recipe
    text = (tmp_path / "recipe.toml").read_text()
    assert all(f"[{stage}]" in text for stage in PLANS) and "timestep_shift" in text


def test_flags_override(tmp_path):
    recipe = Recipe.load("demo").changed("pictures", {"steps": 7, "lora": 4})
    assert (recipe.pictures.steps, recipe.pictures.lora) == (7, 4)
    assert recipe.vae == Recipe.load("demo").vae


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[pictures]\nsteps = 0", r"steps must be a whole number from 1"),
        ("[pictures]\nstepps = 5", "stepps"),
        ("[pictures]\nschedule = 'linear'", "schedule must be cosine or constant, got 'linear'"),
        ("new = 'huge'", "must be one of tiny, demo, human, sd15, got 'huge'"),
        ("stages = ['hands']", "vae or hand-prior"),
        ("steps = ", "is wrong"),
        ("[pictures]\nlearning_rate = nan", "learning_rate"),
        ("\x00", "is wrong"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, words):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(TrainingError, match=words):
        Recipe.load(path)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(TrainingError, match=r"must be a \.toml file or one of demo, demo-gpu, human, human-gpu, sd15"):
        Recipe.load("dmeo")
    with pytest.raises(TrainingError, match=r"hand-prior: .*lora"):
        Recipe.load("demo").changed("hand-prior", {"lora": 4})
