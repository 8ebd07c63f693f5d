"""The cache of latents says what the modules say, is made once, goes on where it stopped, and stays out of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import made_hands, made_sample
from handiffuser.contract import PLACEMENT
from handiffuser.data.augment import flip, flip_words
from handiffuser.data.hands import hand_rows, plain_features
from handiffuser.data.latents import LatentCache, encode_prompts, make_latents
from handiffuser.data.samples import Sample, picture, write_shards
from handiffuser.errors import CheckpointError, DatasetError
from handiffuser.hands import hand_params
from handiffuser.models.hand_features import make_basis
from handiffuser.models.smplh import HAND_JOINTS, SMPLH, rotation_6d_to_matrix

SIZE = (32, 48)  # of the tiny checkpoint's pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("set")
    samples = [made_sample(i, SIZE) for i in range(7)]
    samples[2] = made_sample(2, hands=None)
    samples[4] = made_sample(4, image=None, prompts=["one wording"])
    samples[5] = made_sample(5, image=b"\x89PNG, and then nothing")
    samples[6] = made_sample(6, SIZE, meta={})
    write_shards(samples, path, per_shard=3)
    return path


@pytest.fixture(scope="module")
def cache(folder, tiny_checkpoint) -> LatentCache:
    make_latents(tiny_checkpoint, folder)
    return LatentCache.open(tiny_checkpoint, folder)


def test_latents_are_the_vaes_posterior(cache, tiny_checkpoint):
    assert cache.usable.tolist() == [0, 1, 2, 3, 5]  # row 4 has no picture; sample 5's is damaged and has no row
    assert cache.samples.tolist() == [0, 1, 2, 3, 4, 6]
    rows = cache.rows([5, 0])
    for row, i in enumerate((6, 0)):
        image = torch.from_numpy(picture(made_sample(i, SIZE)).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            posterior = tiny_checkpoint.vae.encode(image).latent_dist
        assert torch.allclose(rows["mean"][row].float(), posterior.mean[0], atol=2e-3)
        assert torch.allclose(rows["std"][row].float(), posterior.std[0], rtol=2e-3)
    assert rows["mean"].dtype == rows["std"].dtype == torch.float16


def test_what_is_left_out_is_named(cache):
    found = {bad.key: bad for bad in cache.left_out}
    assert sorted(found) == ["key-0004", "key-0005"] and "no picture" in found["key-0004"].sentence
    assert found["key-0005"].shard == "00001.tar" and "cannot be decoded" in found["key-0005"].sentence
    assert len(cache.usable) + len(found) == 7  # rows and what is left out add up


def test_ids_are_all_wordings_and_fewer_are_repeated(cache, tiny_checkpoint):
    ids = cache.rows([1, 4], ["ids"])["ids"]
    assert ids.shape == (2, 2, 77) and ids.dtype == torch.int64
    prompts = [*made_sample(1).prompts, "one wording", "one wording"]
    wanted = encode_prompts(prompts, tiny_checkpoint.tokenizer, tiny_checkpoint.special_tokens)
    assert torch.equal(ids, wanted.view(2, 2, 77))


def test_features_are_the_pipelines_own(cache, tiny_checkpoint):
    """As stage 2 gets them from the hand prior's normalised samples."""
    from handiffuser.models.hand_features import HandFeatures

    prior = tiny_checkpoint.hand_prior
    body = SMPLH.load(tiny_checkpoint.body)
    features = HandFeatures(body, prior.mean, prior.std, tiny_checkpoint.text_hand_encoder.basis, SIZE[1] / SIZE[0])
    rows = cache.rows(cache.usable)
    found = features((rows["params"] - prior.mean) / prior.std)
    for name in ("joints", "rotations", "bps", "visibility"):
        assert torch.allclose(rows[name], found[name], atol=1e-3), name
    assert (
        rows["visibility"][:2].tolist() == [[1, 1], [0, 1]] and rows["visibility"][2].sum() == 0
    )  # sample 2 has no hands


def test_params_are_the_arrays(cache):
    rows = cache.rows([1])["params"][0].numpy()
    assert np.allclose(rows, hand_params(made_sample(1).hands), atol=1e-6)


def test_labels_are_numbered_alike_in_all_shards(cache):
    assert cache.labels == {"side": ["left", "right"]}
    assert cache.rows(range(6))["labels"][:, 0].tolist() == [0, 1, 0, 1, 0, -1]


def test_rows_come_in_any_order_and_twice(cache):
    order = [4, 0, 5, 0, 2]
    rows, alone = cache.rows(order), [cache.rows([i]) for i in order]
    for name, value in rows.items():
        assert torch.equal(value, torch.cat([one[name] for one in alone])), name


def test_a_camera_gives_the_placement_that_draws_the_same_joints(body_path):
    body = SMPLH.load(body_path)
    hands = made_hands(0, camera=True)
    (params,) = hand_rows([hands], plain_features(body, make_basis()))["params"]
    joints = hand_rows([hands], plain_features(body, make_basis()))["joints"][0]
    rotations = rotation_6d_to_matrix(params[None, :312].unflatten(1, (52, 6)))
    places = body(rotations, params[None, 312:322])[1][0, HAND_JOINTS]  # [2, 21, 3]
    s, tx, ty = hands["camera"]
    seen = np.stack([0.5 + 0.5 * s * (places[..., 0] + tx), 0.5 - 0.5 * s * (places[..., 1] + ty)], -1)
    assert params[PLACEMENT][[0, 4]].tolist() == [1, 1]
    assert np.abs(joints.numpy() - seen).max() < 1e-5


def test_a_hand_off_the_picture_is_none_and_leaves_the_camera_to_the_other(body_path):
    features = plain_features(SMPLH.load(body_path), make_basis())
    hands = {**made_hands(0, camera=True), "camera": np.float32([1.2, -0.7, -0.1])}  # the left hand in the middle
    alone = {**hands, "visibility": np.float32([1, 0])}
    off, only = hand_rows([hands], features), hand_rows([alone], features)
    assert off["visibility"].tolist() == [[1, 0]]
    for name in off:
        assert torch.equal(off[name], only[name]), name
    left, right = off["params"][0, PLACEMENT].view(2, 4).tolist()
    assert right == [0, *left[1:]]


def test_several_people_are_one_row_each_or_the_most_visible(tmp_path, tiny_checkpoint):
    hands = made_hands(4, people=3)
    hands["placement"][:, 0, 3] = np.log([0.1, 0.2, 0.4])
    hands["visibility"][2] = 0  # the largest are not to be seen
    write_shards([made_sample(0, SIZE), made_sample(1, SIZE, hands=hands)], tmp_path)
    caches = {}
    for people in ("most-visible", "each"):
        make_latents(tiny_checkpoint, tmp_path, people=people)
        caches[people] = LatentCache.open(tiny_checkpoint, tmp_path, people=people)
    each = caches["each"].rows(range(4))
    assert caches["each"].samples.tolist() == [0, 1, 1, 1] and len(caches["each"]) == 4
    assert torch.equal(each["mean"][1], each["mean"][3])
    most = caches["most-visible"].rows([0, 1])
    for name in most:
        assert torch.equal(most[name], each[name][[0, 2]]), name
    assert each["visibility"][3].tolist() == [0, 0]


def test_pictures_of_other_shapes_are_cropped_with_their_hands(tmp_path, tiny_checkpoint):
    """A square picture twice as high as wanted: the middle 2 : 3 of it."""
    write_shards([made_sample(0, (96, 96)), made_sample(1, (96, 96))], tmp_path)
    make_latents(tiny_checkpoint, tmp_path)
    params = LatentCache.open(tiny_checkpoint, tmp_path).rows([1])["params"][0, PLACEMENT].view(2, 4).numpy()
    wanted = made_sample(1).hands["placement"] * [1, 1.5, 1.5, 1] + [0, 0, 0, np.log(1.5)]
    assert np.allclose(params, wanted, atol=1e-5)


def test_flipped_is_another_cache(tmp_path, tiny_checkpoint):
    write_shards([made_sample(0, SIZE), made_sample(1, SIZE)], tmp_path)
    make_latents(tiny_checkpoint, tmp_path)
    make_latents(tiny_checkpoint, tmp_path, flipped=True)
    plain, mirror = (LatentCache.open(tiny_checkpoint, tmp_path, flipped=flipped) for flipped in (False, True))
    a, b = plain.rows([0, 1]), mirror.rows([0, 1])
    assert torch.allclose(b["joints"].flip(1)[..., 0], 1 - a["joints"][..., 0], atol=2e-3)
    assert torch.allclose(b["joints"].flip(1)[..., 1], a["joints"][..., 1], atol=2e-3)
    words = [flip_words(text) for text in made_sample(0).prompts]
    ids = encode_prompts(words, tiny_checkpoint.tokenizer, tiny_checkpoint.special_tokens)
    assert torch.equal(b["ids"][0], ids)
    assert plain.labels["side"][a["labels"][0, 0]] != mirror.labels["side"][b["labels"][0, 0]]
    assert picture(flip(made_sample(0)))[:, 0].tolist() == picture(made_sample(0))[:, -1].tolist()


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}


def test_a_cache_is_made_once_and_goes_on_after_a_kill(tmp_path, tiny_checkpoint):
    write_shards([made_sample(i, SIZE) for i in range(9)], tmp_path, per_shard=3)
    with pytest.raises(DatasetError, match="lacks this checkpoint's latents for 3 of its 3 shards"):
        LatentCache.open(tiny_checkpoint, tmp_path)

    def stop(done: int, total: int) -> None:
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_latents(tiny_checkpoint, tmp_path, stop)
    some = files(tmp_path)
    assert 2 <= len(some) < 6
    with pytest.raises(DatasetError, match="lacks this checkpoint's latents"):
        LatentCache.open(tiny_checkpoint, tmp_path)
    shown = []
    make_latents(tiny_checkpoint, tmp_path, lambda done, total: shown.append((done, total)))
    assert shown[-1] == (6, 6)  # of what was left
    every = files(tmp_path)
    assert len(every) == 6 and some.items() <= every.items()
    make_latents(tiny_checkpoint, tmp_path)
    assert files(tmp_path) == every


def test_processes_share_the_shards(tmp_path, tiny_checkpoint):
    write_shards([made_sample(i, SIZE) for i in range(6)], tmp_path, per_shard=2)
    make_latents(tiny_checkpoint, tmp_path, rank=1, world=2)
    assert {Path(name).name for name in files(tmp_path)} == {"00001.safetensors"}
    make_latents(tiny_checkpoint, tmp_path, rank=0, world=2)  # of what is missing now: 00000 and 00002
    make_latents(tiny_checkpoint, tmp_path)
    assert len(LatentCache.open(tiny_checkpoint, tmp_path)) == 6


def changed(module: torch.nn.Module, part: str) -> torch.nn.Module:
    import copy

    other = copy.deepcopy(module)
    with torch.no_grad():
        next(other.get_submodule(part).parameters()).add_(0.1)
    return other


@pytest.mark.slow
def test_what_latents_depend_on_is_their_key(tmp_path, tiny_checkpoint, body_path):
    from tokenizers import Tokenizer

    write_shards([made_sample(0, SIZE)], tmp_path)
    make_latents(tiny_checkpoint, tmp_path)

    def stale(checkpoint, **more) -> bool:
        try:
            LatentCache.open(checkpoint, tmp_path, **more)
        except DatasetError:
            return True
        return False

    assert not stale(tiny_checkpoint) and not stale(tiny_checkpoint, pictures=False)
    assert stale(replace(tiny_checkpoint, vae=changed(tiny_checkpoint.vae, "encoder")))
    assert not stale(replace(tiny_checkpoint, vae=changed(tiny_checkpoint.vae, "decoder")))
    assert not stale(replace(tiny_checkpoint, vae=changed(tiny_checkpoint.vae, "encoder")), pictures=False)
    assert stale(replace(tiny_checkpoint, image_size=(32, 32)))
    assert stale(tiny_checkpoint, bf16=True) and stale(tiny_checkpoint, people="each")
    other = Tokenizer.from_str(tiny_checkpoint.tokenizer.to_str())
    assert not stale(replace(tiny_checkpoint, tokenizer=other))
    other.add_tokens(["pinkie"])
    assert stale(replace(tiny_checkpoint, tokenizer=other))
    with np.load(body_path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(tmp_path / "taller.npz", **{**arrays, "v_template": arrays["v_template"] * 1.1})
    assert stale(tiny_checkpoint, body=tmp_path / "taller.npz")


def test_a_copied_dataset_keeps_its_cache_and_a_changed_one_does_not(tmp_path, tiny_checkpoint):
    write_shards([made_sample(0, SIZE)], tmp_path)
    make_latents(tiny_checkpoint, tmp_path)
    os.utime(tmp_path / "00000.tar", (1, 1))  # as a copy has another time
    LatentCache.open(tiny_checkpoint, tmp_path)
    content = bytearray((tmp_path / "00000.tar").read_bytes())
    at = content.index(b"a left hand")
    content[at : at + 6] = b"a loft"
    (tmp_path / "00000.tar").write_bytes(content)  # the same size, the same places, another word
    with pytest.raises(DatasetError, match="lacks this checkpoint's latents"):
        LatentCache.open(tiny_checkpoint, tmp_path)


def test_a_damaged_file_is_made_again(tmp_path, tiny_checkpoint):
    write_shards([made_sample(0, SIZE)], tmp_path)
    make_latents(tiny_checkpoint, tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:200])
    make_latents(tiny_checkpoint, tmp_path)
    assert len(LatentCache.open(tiny_checkpoint, tmp_path)) == 1


def test_a_cache_may_lie_elsewhere(tmp_path, tiny_checkpoint):
    write_shards([made_sample(0, SIZE)], tmp_path / "set")
    make_latents(tiny_checkpoint, tmp_path / "set", cache=tmp_path / "cache")
    assert not files(tmp_path / "set") and len(files(tmp_path / "cache")) == 2
    assert len(LatentCache.open(tiny_checkpoint, tmp_path / "set", cache=tmp_path / "cache")) == 1


def test_without_a_body_the_file_is_asked_for(folder, tiny_checkpoint):
    with pytest.raises(CheckpointError, match="--body"):
        LatentCache.open(replace(tiny_checkpoint, body=None), folder)


def test_stage_1_needs_no_pictures(tmp_path, tiny_checkpoint):
    write_shards([Sample(f"a{i}", ["a"], made_hands(i)) for i in range(3)], tmp_path)
    make_latents(tiny_checkpoint, tmp_path, pictures=False)
    cache = LatentCache.open(tiny_checkpoint, tmp_path, pictures=False)
    assert cache.usable.tolist() == [0, 1, 2] and "mean" not in cache.rows([0])
    with pytest.raises(DatasetError, match="without pictures"):
        cache.rows([0], ["mean"])


MEASURE = """
import ctypes, gc, sys
from handiffuser.data.latents import LatentCache
from handiffuser.models.checkpoint import Checkpoint
from handiffuser.data.dataset import batches
checkpoint = Checkpoint.load(sys.argv[1])
for folder in sys.argv[2:]:
    cache = LatentCache.open(checkpoint, folder)
    stream = batches(cache, 0, 16)
    while next(stream)[0] * 16 < max(len(cache), 500):
        cache.rows(next(stream)[1])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory to the system, which varies by some MB
    held = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    print(len(cache), held.split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_stays_flat_as_the_dataset_grows(tmp_path, tiny_checkpoint, tiny_checkpoint_folder):
    """A dataset of 30 shards takes no more memory than one of a single shard, though its cache is 20 MB larger."""
    write_shards([made_sample(i, SIZE) for i in range(64)], tmp_path / "one")
    make_latents(tiny_checkpoint, tmp_path / "one")
    for path in (tmp_path / "one").rglob("*0*"):
        if path.is_file():
            for number in range(30):
                name = path.relative_to(tmp_path / "one").with_name(f"{number:05d}{path.suffix}")
                (tmp_path / "many" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "many" / name).symlink_to(path)
    command = [sys.executable, "-c", MEASURE, tiny_checkpoint_folder, tmp_path / "one", tmp_path / "many"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    few, before, many, after = map(int, result.stdout.split())
    size = sum(path.stat().st_size for path in (tmp_path / "many").rglob("*.safetensors")) >> 10
    assert (few, many) == (64, 64 * 30) and size > 20_000
    assert after - before < size / 10, (before, after, size)  # some 500 kB: the index, and where the files lie
