"""Prompts with weights and of several chunks: embeddings and pictures are those of compel with diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionPipeline
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.prompts import parse
from handiffuser.runtime.reading import PROMPTS
from handiffuser.runtime.requests import Request
from handiffuser.runtime.results import Work
from handiffuser.runtime.words import Wanted
from handiffuser.tokens import PromptTokenizer
from handiffuser.training import init
from handiffuser.training.cli import commands
from stable_diffusion import our_picture, stable_diffusion, their_picture

SENTENCE = "two hands on a table, a photo of a cat; a cat on a photo of two hands. "
PHRASES = "a photo of two hands, (a table:1.3), [a cat on a table], a photo of (two cats:0.2), "
CASES = [
    "a (photo:1.4) of a ((cat)) on [two (hands:1.1)]",
    "(a photo:0) of a cat",
    "a photo of a (cat:-2)",
    "a photo (of a cat:0.5) on (two:0.999) (hands:10)",
    SENTENCE * 6,
    "a photo of a cat on a table " * 30,
    "catphoto" * 60,
    "(catphoto:0.4)" + "handstable" * 60,
    PHRASES * 6,
    "a photo of (a cat BREAK two hands:0.6) on a table BREAK [a cat] " + SENTENCE * 3,
    "a table " * 40 + "(a photo of a cat " + "on a table " * 40 + ":0.7)",
]


pytestmark = pytest.mark.slow  # hd-train init of a small Stable Diffusion


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """diffusers' pipeline of a small Stable Diffusion, and the checkpoint that `hd-train init` makes of it."""
    folder = stable_diffusion(tmp_path_factory.mktemp("words"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(init, "PRIOR", (32, 2, 2))
        done = CliRunner().invoke(commands, ["init", str(folder), str(folder.parent / "start")], catch_exceptions=False)
    assert done.exit_code == 0
    start = folder.parent / "start"
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    return folder, pipeline, Checkpoint.load(start), start


@torch.no_grad()
def context_of(checkpoint, start, prompt, negative=""):
    """What the loops make of a request's prompts, [2, L, W], with the encoder in PyTorch; and the readings."""
    words = PromptTokenizer(start / "tokenizer" / "tokenizer.json", checkpoint.special_tokens)
    request = Request(prompt, negative_prompt=negative, guidance=5.0)
    readings = tuple(words.read(getattr(request, name), name) for name in PROMPTS)
    work, encoder = Work(request, 0.0, readings, []), checkpoint.text_hand_encoder
    wanted = Wanted([work], words.encode("")[0])
    states = {
        key: encoder(torch.from_numpy(ids)[None], attention_mask=torch.from_numpy(mask)[None])[0, :77].numpy()
        for key, (ids, mask) in wanted.rows.items()
    }
    own = encoder(torch.from_numpy(work.ids)).numpy()
    return wanted.context(work, own, states) if wanted.works else own, readings


def compels(pipeline, prompt):
    """compel's embeddings [L, D] of the same texts and weights; parts are joined as its `.and()` joins them."""
    from compel import Compel

    compel = Compel(pipeline.tokenizer, pipeline.text_encoder, truncate_long_prompts=False)
    provide = compel.conditioning_provider.get_embeddings_for_weighted_prompt_fragments
    parts = [zip(*(pair for pair in part if pair[0].strip()), strict=True) for part in parse(prompt)]
    with torch.no_grad():
        return torch.cat([provide([list(texts)], [list(weights)]) for texts, weights in parts], 1)[0].numpy()


def text_states(context, width):
    """The states of words [chunks * 77, D]: without hand tokens and position codes."""
    hands = context.shape[0] % 77
    return np.concatenate([context[:77], context[77 + hands :]])[:, :width]


@pytest.mark.parametrize("prompt", CASES, ids=range(len(CASES)))
def test_embeddings_are_compels(both, prompt):
    _, pipeline, checkpoint, start = both
    context, (_, reading) = context_of(checkpoint, start, prompt)
    wanted = compels(pipeline, prompt)
    assert wanted.shape[0] == 77 * len(reading.ids)
    np.testing.assert_allclose(text_states(context[1], wanted.shape[1]), wanted, rtol=0, atol=1e-4)
    empty = np.tile(empty_states(pipeline), (len(reading.ids), 1))
    np.testing.assert_allclose(text_states(context[0], wanted.shape[1]), empty, rtol=0, atol=1e-4)


def test_compels_own_syntax_means_the_same(both):
    from compel import Compel

    _, pipeline, checkpoint, start = both
    for theirs, ours in (
        ("a (photo)1.3 of two (hands)0.4", "a (photo:1.3) of two (hands:0.4)"),
        ('("a photo of a cat", "(two)1.2 hands").and()', "a photo of a cat BREAK (two:1.2) hands"),
    ):
        wanted = Compel(pipeline.tokenizer, pipeline.text_encoder)(theirs)[0].numpy()
        context, _ = context_of(checkpoint, start, ours)
        np.testing.assert_allclose(text_states(context[1], wanted.shape[1]), wanted, rtol=0, atol=1e-4)


def test_pictures_are_those_of_diffusers_with_compel(both):
    """A prompt of 200 tokens beside a negative prompt of one chunk, both weighted."""
    folder, pipeline, checkpoint, start = both
    prompt, negative = PHRASES * 9, "(a table:1.5) on a [cat]"
    context, readings = context_of(checkpoint, start, prompt, negative)
    assert readings[1].tokens >= 200 and len(readings[0].ids) == 1
    length = len(context[0]) // 77
    negatives = np.concatenate([compels(pipeline, negative), *[empty_states(pipeline)] * (length - 1)])
    embeds = {"prompt_embeds": compels(pipeline, prompt), "negative_prompt_embeds": negatives}
    theirs = their_picture(folder, None, embeds={name: torch.from_numpy(value)[None] for name, value in embeds.items()})
    ours = our_picture(checkpoint, start, None, "plms", context=torch.from_numpy(context))
    assert np.abs(theirs.astype(int) - ours).max() <= 1
    plain = our_picture(checkpoint, start, "a photo of two hands", "plms")
    assert theirs.std() > 10 and np.abs(theirs.astype(int) - plain).max() > 10


def empty_states(pipeline):
    ids = pipeline.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return pipeline.text_encoder(ids).last_hidden_state[0].numpy()
