"""The order of training is exact to the sample on any number of processes; the index finds every sample and is kept."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from datasets import made_sample, same
from handiffuser.data import dataset
from handiffuser.data.dataset import INDEX, Index, Samples, batches, permutation
from handiffuser.data.samples import Bad, members, read, write_shards
from handiffuser.errors import DatasetError
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader


def first(steps: int, *args, **more) -> list[list[int]]:
    stream = batches(*args, **more)
    return [rows for _, rows in (next(stream) for _ in range(steps))]


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.integers(0, 2**40))
def test_processes_share_one_order_and_each_sample_comes_once_an_epoch(count, batch, world, seed):
    batch = max(batch, world)
    steps = 3 * count // batch + 2
    whole = first(steps, range(count), seed, batch)
    parts = [first(steps, range(count), seed, batch, rank=rank, world=world) for rank in range(world)]
    for step, rows in enumerate(whole):
        shared = [parts[rank][step] for rank in range(world)]
        assert all(shared[rank] == rows[rank::world] for rank in range(world))
    stream = [row for rows in whole for row in rows]
    for epoch in range(len(stream) // count):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(st.integers(1, 40), st.integers(4, 12), st.integers(0, 30), st.integers(1, 4))
def test_a_run_goes_on_at_any_step_on_another_number_of_processes(count, batch, start, world):
    whole = first(start + 5, range(count), 3, batch)
    streams = [batches(range(count), 3, batch, rank=rank, world=world, start=start) for rank in range(world)]
    for step in range(start, start + 5):
        found = [next(stream) for stream in streams]
        assert {number for number, _ in found} == {step}
        rows = [0] * batch
        for rank, (_, part) in enumerate(found):
            rows[rank::world] = part
        assert rows == whole[step]


def test_the_order_is_for_ever():
    """Written down: a run that goes on after an update must see the same samples."""
    assert permutation(10, 0, 0).tolist() == [0, 7, 8, 2, 5, 9, 4, 6, 3, 1]
    assert permutation(10, 1, 2).tolist() == [2, 9, 8, 7, 3, 1, 5, 6, 0, 4]


def test_orders_of_epochs_and_seeds_differ_and_are_even():
    places = np.array([np.argsort(permutation(50, seed, epoch)) for seed in range(40) for epoch in range(40)])
    assert len({tuple(row) for row in places.tolist()}) == 1600
    mean = places.mean(0)  # each sample's place is uniform in 0 ... 49: mean 24.5, spread 14.4 / sqrt(1600)
    assert np.abs(mean - 24.5).max() < 5 * 14.43 / 40
    assert abs(np.corrcoef(places[0], places[1])[0, 1]) < 0.5


def test_among_draws_from_those_alone():
    rows = first(8, range(100), 0, 5, among=[3, 50, 99, 7])
    assert {row for batch in rows for row in batch} == {3, 50, 99, 7}


def test_nothing_to_draw_from_is_a_sentence():
    with pytest.raises(DatasetError, match="one sample to train on, got 0"):
        next(batches(range(10), 0, 4, among=[]))
    with pytest.raises(DatasetError, match="batch must be at least 3"):
        next(batches(range(10), 0, 2, world=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("set")
    write_shards([made_sample(i, hands=None) if i == 3 else made_sample(i) for i in range(11)], path, per_shard=4)
    return path


def test_the_index_finds_every_sample(folder):
    index = Index.open(folder)
    assert len(index) == 11 and [name for name, *_ in index.groups] == ["00000.tar", "00001.tar", "00002.tar"]
    assert all(same(index.sample(i), sample) for i, sample in enumerate(read(folder)))
    assert index.has_hands.tolist() == [i != 3 for i in range(11)] and index.has_picture.all()
    assert same(pickle.loads(pickle.dumps(index)).sample(10), made_sample(10))
    with pytest.raises(IndexError):
        index.sample(11)


def test_the_index_is_kept_and_only_what_changed_is_looked_at_again(tmp_path, monkeypatch):
    write_shards([made_sample(i) for i in range(6)], tmp_path, per_shard=2)
    Index.open(tmp_path)
    looked = []
    scan = dataset.scan
    monkeypatch.setattr(dataset, "scan", lambda path: looked.append(path.name) or scan(path))
    assert len(Index.open(tmp_path)) == 6 and looked == []
    (tmp_path / "00001.tar").unlink()
    write_shards([made_sample(i) for i in range(8)], tmp_path, per_shard=2)
    index = Index.open(tmp_path)
    assert set(looked) == {"00003.tar", "00004.tar"} and len(index) == 8
    assert {index.sample(i).key for i in range(8)} == {made_sample(i).key for i in range(8)}


@pytest.mark.parametrize("content", [b"", b"hello", None])
def test_a_damaged_index_is_made_again(tmp_path, content):
    write_shards([made_sample(i) for i in range(3)], tmp_path)
    Index.open(tmp_path)
    path = tmp_path / INDEX
    path.write_bytes(path.read_bytes()[:-300] if content is None else content)
    assert len(Index.open(tmp_path)) == 3
    assert len(dataset._read(path)) == 1


def test_what_is_wrong_with_a_shard_is_known_from_the_kept_index_too(tmp_path):
    write_shards([made_sample(i) for i in range(6)], tmp_path)
    path = tmp_path / "00000.tar"
    path.write_bytes(path.read_bytes()[:-30000])
    one, two = Index.open(tmp_path), Index.open(tmp_path)
    assert one.problems == two.problems and "The shard is damaged" in one.problems[0].sentence
    assert 0 < len(one) == len(two) < 6


def test_a_folder_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    write_shards([made_sample(i) for i in range(3)], tmp_path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(np, "savez", refuse)
    assert len(Index.open(tmp_path)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]


def test_plain_files_are_indexed_too(tmp_path):
    for i in range(3):
        for name, data in members(made_sample(i)).items():
            (tmp_path / f"key-{i:04d}.{name}").write_bytes(data)
    index = Index.open(tmp_path)
    assert [same(index.sample(i), made_sample(i)) for i in range(3)] == [True] * 3
    before = index.digests()
    os.utime(tmp_path / "key-0001.json", (1, 1))
    assert Index.open(tmp_path).digests() != before
    assert not (tmp_path / INDEX).exists()


def test_a_shard_that_is_gone_while_training_is_a_sentence(tmp_path):
    write_shards([made_sample(0)], tmp_path)
    index = Index.open(tmp_path)
    (tmp_path / "00000.tar").unlink()
    assert isinstance(index.sample(0), Bad) and "cannot be read: No such file" in index.sample(0).sentence


def keys(samples: list) -> list[str]:
    return [sample.key for sample in samples]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_of_a_loader_keep_the_order(folder, workers):
    index = Index.open(folder)
    stream = Samples(index, 5, 4, prepare=keys, rank=1, world=2, start=2)
    loader = iter(DataLoader(stream, batch_size=None, num_workers=workers))
    wanted = batches(index, 5, 4, rank=1, world=2, start=2)
    for _ in range(7):
        (step, rows), (came, names) = next(wanted), next(loader)
        assert came == step and names == [index.entry(row).key for row in rows]
