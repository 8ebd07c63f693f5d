"""Several people: their hands are those of one person each, in order, and a model of one person becomes one of two."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import made_hands, made_sample
from handiffuser.contract import NUM_PARAMS, PLACEMENT
from handiffuser.data.augment import flip_hands
from handiffuser.data.hands import hand_rows, most_visible, people_rows, plain_features
from handiffuser.data.latents import LatentCache, encode_prompts, make_latents
from handiffuser.data.samples import person, write_shards
from handiffuser.errors import CheckpointError, TrainingError
from handiffuser.models import lora
from handiffuser.models.checkpoint import Checkpoint, random_checkpoint
from handiffuser.models.configs import CONFIGS
from handiffuser.models.hand_features import HandFeatures, make_basis
from handiffuser.models.smplh import SMPLH
from handiffuser.training.grow import with_people
from handiffuser.training.stages import normalisation


@pytest.fixture(scope="module")
def features(body_path) -> HandFeatures:
    return plain_features(SMPLH.load(body_path), make_basis(), 1.5)


def twins(*places: float) -> dict[str, np.ndarray]:
    """One pose at several places of the picture, from left (-1) to right."""
    one = made_hands(4)
    hands = {name: np.stack([value] * len(places)) for name, value in one.items()}
    hands["placement"][..., 1] = np.float32(places)[:, None]
    return hands


@pytest.fixture(scope="module")
def pair(tiny_checkpoint) -> Checkpoint:
    return with_people(tiny_checkpoint, 2)


def test_an_adapter_has_what_tells_people_apart(tiny_checkpoint, pair, tmp_path):
    pytest.importorskip("peft")
    trained = copy.deepcopy(pair)
    lora.inject(trained, 2)
    tensors = lora.trained(trained)
    tensors["text_hand_encoder.person"] += 1
    lora.save(tensors, tmp_path / "pair.safetensors", 2)
    merged = copy.deepcopy(pair)
    lora.merge(merged, tmp_path / "pair.safetensors")
    assert torch.equal(merged.text_hand_encoder.person, pair.text_hand_encoder.person + 1)
    with pytest.raises(CheckpointError, match=r"does not fit this model: it lacks text_hand_encoder\.person"):
        lora.merge(copy.deepcopy(tiny_checkpoint), tmp_path / "pair.safetensors")


@torch.no_grad()
def test_growing_copies_all_weights(tiny_checkpoint, pair, tmp_path):
    """What one person's model has learned holds for each of two."""
    pair.check()
    for name in ("hand_prior", "text_hand_encoder"):
        one, two = (getattr(checkpoint, name).state_dict() for checkpoint in (tiny_checkpoint, pair))
        assert set(two) - set(one) == {"person"} and not two["person"][0].any() and two["person"][1].any()
        assert two["person"].abs().max() < 0.1
        assert all(torch.equal(two[key][:NUM_PARAMS] if key in ("mean", "std") else two[key], one[key]) for key in one)
    assert pair.hand_prior.mean.view(2, -1).diff(dim=0).abs().max() == 0
    assert torch.equal(with_people(tiny_checkpoint, 2).hand_prior.person, pair.hand_prior.person), "in every process"
    assert with_people(tiny_checkpoint, 1) is tiny_checkpoint
    assert torch.equal(with_people(pair, 3).hand_prior.person[:2], pair.hand_prior.person)
    with pytest.raises(TrainingError, match=r"num_people must be at least 2, as .*, got 1"):
        with_people(pair, 1)
    pair.save(tmp_path / "pair")
    back = Checkpoint.load(tmp_path / "pair")
    assert back.num_people == 2 and torch.equal(back.text_hand_encoder.person, pair.text_hand_encoder.person)
    with pytest.raises(CheckpointError, match="hand_prior's num_people is 2, text_hand_encoder's is 1"):
        replace(pair, text_hand_encoder=tiny_checkpoint.text_hand_encoder).check()


@torch.no_grad()
def test_only_their_vectors_tell_people_apart(pair):
    """Swapped people give swapped outputs where the vectors are equal, and other outputs where they are not."""
    prior, encoder = pair.hand_prior, pair.text_hand_encoder
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, NUM_PARAMS, generator=generator)
    text = torch.randn(2, 77, prior.config.text_width, generator=generator)
    hands = [torch.rand(2, 2, 2, *shape, generator=generator) for shape in ((21, 2), (16, 6), (512,))]
    cues = [*(value.flatten(1, 2) for value in hands), torch.ones(2, 4)]
    turned = [*(value.flip(1).flatten(1, 2) for value in hands), torch.ones(2, 4)]
    ids = encode_prompts(["a", "two hands"], pair.tokenizer, pair.special_tokens)

    def both() -> list[tuple[torch.Tensor, torch.Tensor]]:
        told = [prior(one.flatten(1), torch.tensor([500.0, 3.0]), text).view(2, 2, -1) for one in (x, x.flip(1))]
        seen = [encoder(ids, *given)[:, 77:].unflatten(1, (2, -1)) for given in (cues, turned)]
        return [tuple(told), tuple(seen)]

    assert encoder(ids, *cues).shape[1] == encoder.num_tokens == 77 + 2 * 44
    assert not any(torch.allclose(a, b.flip(1), atol=1e-5) for a, b in both())
    kept = prior.person.clone(), encoder.person.clone()
    prior.person.zero_(), encoder.person.zero_()
    for a, b in both():
        torch.testing.assert_close(a, b.flip(1), atol=1e-5, rtol=1e-4)
    prior.person.copy_(kept[0]), encoder.person.copy_(kept[1])


@torch.no_grad()
def test_features_of_two_are_those_of_each(features):
    bodies = hand_rows([made_hands(i, camera=i % 2 == 0) for i in range(6)], features)["params"]
    two = HandFeatures(features.body, torch.zeros(2 * NUM_PARAMS), torch.ones(2 * NUM_PARAMS), features.basis, 1.5)
    alone, found = features(bodies, torch.ones(6)), two(bodies.view(3, -1), torch.ones(3))
    for name, value in found.items():
        assert value.shape[1] == (4 if name in ("joints", "rotations", "bps", "visibility") else 2), name
        torch.testing.assert_close(value.flatten(0, 1), alone[name].reshape(-1, *value.shape[2:]))
    # A narrow picture moves both as one: what touched still touches.
    narrow = two(bodies.view(3, -1), torch.full((3,), 0.5))
    shown = found["visibility"] > 0.5
    moved, was = narrow["joints"][shown], found["joints"][shown]
    row = shown.nonzero()[:, 0]
    for i in range(3):
        a, b = was[row == i].flatten(0, 1), moved[row == i].flatten(0, 1)
        zoom = (b[:, 0].max() - b[:, 0].min()) / (a[:, 0].max() - a[:, 0].min())
        torch.testing.assert_close(b[:, 0] - b[0, 0], zoom * (a[:, 0] - a[0, 0]), atol=1e-4, rtol=1e-3)


def test_people_stand_from_left_to_right_and_the_absent_come_last(features):
    hands = twins(0.3, -0.3)
    left, right, gone = person(hands, 1), person(hands, 0), {**made_hands(1), "visibility": np.zeros(2, np.float32)}
    pictures = [[right, left], [left, right], [gone, left], [right], [None]]
    rows = people_rows(pictures, features, 2)
    ordered = hand_rows([left, right, None], features)
    for name, value in rows.items():
        each = value.unflatten(1, (2, -1))
        wanted = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 2], [2, 2]])
        torch.testing.assert_close(each, ordered[name][wanted].reshape(each.shape), atol=1e-3, rtol=1e-3)
    mirrored = flip_hands(hands)
    mirror = people_rows([[person(mirrored, 0), person(mirrored, 1)]], features, 2)
    torch.testing.assert_close(mirror["joints"].flip(1)[..., 0], 1 - rows["joints"][:1, ..., 0], atol=1e-4, rtol=0)
    assert mirrored["placement"][:, :, 1].argmax(0).tolist() == [0, 0], "a file's order stays: here from right to left"
    one = people_rows([[left], [None]], features, 1)
    assert all(torch.equal(value, hand_rows([left, None], features)[name]) for name, value in one.items())


def test_a_cache_takes_the_most_visible_people(tmp_path, pair, tiny_checkpoint):
    hands = twins(0.3, 0.0, -0.3)
    hands["placement"][:, :, 3] += np.float32([[0.02], [0.0], [0.01]])
    write_shards([made_sample(0, hands=hands), made_sample(1, hands=None)], tmp_path)
    assert most_visible(hands, SMPLH.load(pair.body), 2) == [0, 2]
    make_latents(pair, tmp_path)
    make_latents(tiny_checkpoint, tmp_path)  # another cache
    rows = LatentCache.open(pair, tmp_path).rows([0, 1])
    assert rows["visibility"].tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]] and rows["params"].shape == (2, 2 * NUM_PARAMS)
    place = rows["params"][0].view(2, NUM_PARAMS)[:, PLACEMENT]
    np.testing.assert_allclose(place[:, 1], [-0.3, 0.3], atol=1e-6)
    one = LatentCache.open(tiny_checkpoint, tmp_path).rows([0])
    assert torch.equal(one["params"][0], rows["params"][0, NUM_PARAMS:])
    mean, _ = normalisation(rows["params"])
    assert torch.equal(mean[:NUM_PARAMS], mean[NUM_PARAMS:])
    there = rows["params"].view(4, NUM_PARAMS)[:3]  # not the absent second person
    torch.testing.assert_close(mean[:NUM_PARAMS], there.mean(0))


def test_a_new_checkpoint_may_know_two(body_path):
    made = random_checkpoint(replace(CONFIGS["tiny"], num_people=2), seed=3, body=body_path)
    assert made.num_people == 2 and made.hand_prior.mean.shape == (2 * NUM_PARAMS,)
