"""The sample format: written and read back, read by WebDataset itself, what is wrong is named and the rest is read."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from commands import invoke
from datasets import made_hands, made_sample, same
from handiffuser.data.samples import (
    Bad,
    Sample,
    encode_png,
    members,
    picture,
    picture_size,
    read,
    scan,
    shards,
    write_shard,
    write_shards,
)
from handiffuser.errors import DatasetError
from handiffuser.hands import hand_params, load_hands
from handiffuser.schema import MisfitError
from PIL import Image


@pytest.fixture()
def folder(tmp_path) -> Path:
    return tmp_path / "set"


def tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_what_is_written_is_read_back(folder):
    samples = [
        made_sample(0),
        made_sample(1, image=None),
        made_sample(2, hands=None),
        made_sample(3, hands=made_hands(3, people=3), prompts=["three people"]),
        made_sample(4, meta={}),
    ]
    assert write_shards(samples, folder, per_shard=2) == []
    assert [path.name for path in shards(folder)] == ["00000.tar", "00001.tar", "00002.tar"]
    back = list(read(folder))
    assert all(isinstance(b, Sample) and same(a, b) for a, b in zip(samples, back, strict=True))
    assert [sample.people for sample in back] == [1, 1, 0, 3, 1]


def test_webdataset_reads_our_shards(folder):
    import webdataset

    samples = [made_sample(i) for i in range(5)]
    write_shards(samples, folder, per_shard=3)
    urls = [str(path) for path in shards(folder)]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [row["__key__"] for row in theirs] == [sample.key for sample in samples]
    for sample, row in zip(samples, theirs, strict=True):
        assert {name: row[name] for name in row if not name.startswith("__")} == members(sample)


def test_we_read_what_webdataset_writes(folder):
    import webdataset

    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=2, verbose=0) as writer:
        for i in range(3):
            writer.write(
                {"__key__": f"a/{i}", "json": {"prompt": f"hand {i}"}, "jpg": np.full((8, 8, 3), 90, np.uint8)}
            )
    found = list(read(folder))
    assert [(s.key, s.prompts) for s in found] == [(f"a/{i}", [f"hand {i}"]) for i in range(3)]
    assert picture(found[0]).shape == (8, 8, 3)


def test_the_output_of_hd_run_is_a_dataset(tmp_path):
    result = invoke("runtime.cli", "demo", "a left hand", "two open hands", "--steps", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = list(read(tmp_path / "out"))
    assert [sample.prompts for sample in found] == [["a left hand"], ["two open hands"]]
    for sample in found:
        assert sample.meta["steps"] == 2 and picture(sample).shape == (128, 128, 3)
        hands = load_hands(tmp_path / "out" / f"{sample.key}.hands.npz").params
        assert np.array_equal(hand_params(sample.hands), hands)


def test_pictures_stand_upright(folder):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    Image.new("RGB", (6, 4)).save(buffer, "JPEG", exif=exif)
    sample = made_sample(0, image=buffer.getvalue())
    assert picture(sample).shape == (6, 4, 3) and picture_size(sample) == (6, 4)


HANDS = made_hands(1)
WRONG = {
    "no json": ({"json": None}, "lacks its key-0001.json"),
    "no object": ({"json": b"[1]"}, "must be an object"),
    "no JSON": ({"json": b"{"}, "not JSON"),
    "no UTF-8": ({"json": b'{"prompt": "\xff"}'}, "UTF-8"),
    "no prompt": ({"json": b"{}"}, "neither a prompt nor prompts"),
    "blank prompt": ({"json": b'{"prompt": " "}'}, "neither a prompt nor prompts"),
    "number for a prompt": ({"json": b'{"prompt": 3}'}, "prompt must be text"),
    "labels of numbers": ({"json": b'{"prompt": "a", "labels": {"side": 1}}'}, "labels"),
    "no npz": ({"hands.npz": b"hello"}, "must hold plain arrays"),
    "one array": ({"hands.npz": (lambda b: (np.save(b, np.zeros(3)), b.getvalue())[1])(io.BytesIO())}, "single array"),
    "an array short": ({"hands.npz": npz(**{k: v for k, v in HANDS.items() if k != "betas"})}, "lack betas"),
    "no place": ({"hands.npz": npz(**{k: v for k, v in HANDS.items() if k != "placement"})}, "placement and camera"),
    "misshapen": (
        {"hands.npz": npz(**{**HANDS, "left_hand_pose": np.zeros(12)})},
        "left_hand_pose must be of shape [45], got [12]",
    ),
    "people differ": (
        {"hands.npz": npz(**{**HANDS, "betas": np.zeros((2, 10))})},
        "betas must be of shape [10], got [2, 10]",
    ),
    "empty": ({"hands.npz": npz(**{k: np.zeros((0, *v.shape)) for k, v in HANDS.items()})}, "[0, 3]"),
    "NaN": ({"hands.npz": npz(**{**HANDS, "betas": np.full(10, np.nan)})}, "betas must be finite"),
    "degrees": ({"hands.npz": npz(**{**HANDS, "body_pose": np.full(63, 90.0)})}, "body_pose must be at most"),
    "words": ({"hands.npz": npz(**{**HANDS, "betas": np.array(["a"] * 10)})}, "betas must hold numbers"),
    "objects": ({"hands.npz": npz(**{**HANDS, "betas": np.array([None] * 10)})}, "must hold plain arrays"),
    "camera": (
        {"hands.npz": npz(**{**made_hands(1, camera=True), "camera": np.zeros(3)})},
        "scale must be above 0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("plain", [False, True])
def test_a_wrong_sample_is_named_and_the_rest_is_read(folder, name, plain):
    change, words = WRONG[name]
    files = {}
    for i in range(3):
        sample = made_sample(i)
        content = {**members(sample), **(change if i == 1 else {})}
        files |= {f"{sample.key}.{suffix}": data for suffix, data in content.items() if data is not None}
    if plain:
        folder.mkdir()
        for file, data in files.items():
            (folder / file).write_bytes(data)
    else:
        tar(folder / "00000.tar", files)
    first, wrong, last = read(folder)
    assert same(first, made_sample(0)) and same(last, made_sample(2))
    assert isinstance(wrong, Bad) and wrong.key == "key-0001" and words in wrong.sentence, wrong
    assert wrong.shard == ("" if plain else "00000.tar")


def test_nothing_pickled_is_run(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    trap = npz(**{**HANDS, "betas": np.array([Trap()], object)})
    tar(folder / "00000.tar", {"a.json": b'{"prompt": "a"}', "a.hands.npz": trap})
    (bad,) = read(folder)
    assert isinstance(bad, Bad) and not (tmp_path / "sprung").exists()


def test_a_bomb_is_refused(folder):
    bomb = io.BytesIO()
    np.savez_compressed(bomb, **{**HANDS, "betas": np.zeros((1 << 22, 10), np.float32)})
    tar(folder / "00000.tar", {"a.json": b'{"prompt": "a"}', "a.hands.npz": bomb.getvalue()})
    (bad,) = read(folder)
    assert isinstance(bad, Bad) and "betas must be at most 16 MB, got 160 MB" in bad.sentence


def test_a_key_or_a_member_that_comes_twice_is_named(folder):
    tar(
        folder / "00000.tar", {"a.json": b'{"prompt": "a"}', "a.png": b"1", "a.jpg": b"2", "b.json": b'{"prompt": "b"}'}
    )
    good, bad = read(folder)
    assert good.key == "b" and "a picture twice" in bad.sentence


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
def test_a_shard_cut_anywhere_gives_what_is_whole_and_no_more(folder, share):
    samples = [made_sample(i) for i in range(6)]
    folder.mkdir()
    write_shard(folder / "00000.tar", samples)
    path = folder / "00000.tar"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    found = list(read(folder))
    whole = [sample for sample in found if isinstance(sample, Sample)]
    assert all(same(a, b) for a, b in zip(samples, whole, strict=False))
    assert len(whole) >= int(share * 6) - 1  # the last one may be cut
    assert len(whole) == 6 or any("The shard is damaged" in str(bad) for bad in found if isinstance(bad, Bad))


def test_a_cut_between_a_samples_members_does_not_lose_its_picture_in_silence(folder):
    folder.mkdir()
    write_shard(folder / "00000.tar", [made_sample(0), made_sample(1)])
    path = folder / "00000.tar"
    with tarfile.open(path) as archive:
        ends = [info.offset_data + -(-info.size // 512) * 512 for info in archive]
    content = path.read_bytes()
    for end in ends[3:5]:  # after each member of the second sample but the last
        path.write_bytes(content[:end])
        found = list(read(folder))
        assert [s.key for s in found if isinstance(s, Sample)] == ["key-0000"]
        assert "key-0001" in {bad.key for bad in found if isinstance(bad, Bad)}


def test_noise_in_a_shard_spoils_no_more_than_what_it_hits(folder):
    samples = [made_sample(i) for i in range(8)]
    folder.mkdir()
    write_shard(folder / "00000.tar", samples)
    path = folder / "00000.tar"
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    lost = []
    for _ in range(40):
        noisy = bytearray(content)
        at = int(rng.integers(len(content) - 64))
        noisy[at : at + 64] = rng.integers(0, 256, 64, dtype=np.uint8).tobytes()
        path.write_bytes(noisy)
        found = list(read(folder))
        equal = sum(isinstance(s, Sample) and any(same(s, t) for t in samples) for s in found)
        # A header that is hit ends the shard, which is said; anything else spoils the one sample.
        lost.append(8 - equal)
        assert equal >= 7 or any("damaged" in str(bad) for bad in found if isinstance(bad, Bad))
    assert max(lost) > 1 and lost.count(0) + lost.count(1) > 20


def test_a_picture_that_is_damaged_is_said_when_it_is_looked_at():
    sample = made_sample(0)
    for image in (b"", b"hello", sample.image[: len(sample.image) // 2]):
        with pytest.raises(MisfitError, match="cannot be decoded"):
            picture(Sample("a", ["a"], image=image))
    with pytest.raises(MisfitError, match="no picture"):
        picture(Sample("a", ["a"]))


def test_writing_goes_on_where_it_was_stopped(folder):
    samples = [made_sample(i) for i in range(10)]

    def some(stop: int):
        for i, sample in enumerate(samples):
            if i == stop:
                raise KeyboardInterrupt
            yield sample

    with pytest.raises(KeyboardInterrupt):
        write_shards(some(5), folder, per_shard=2)
    first = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert list(first) and set(first) == {"00000.tar", "00001.tar"}
    write_shards(samples, folder, per_shard=2)
    assert [s.key for s in read(folder)] == [s.key for s in samples]
    assert all((folder / name).stat().st_mtime_ns == at for name, at in first.items())
    write_shards(samples, folder, per_shard=2)
    assert len(shards(folder)) == 5


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shards([made_sample(i) for i in range(3)], tmp_path / name)
    assert (tmp_path / "a/00000.tar").read_bytes() == (tmp_path / "b/00000.tar").read_bytes()


def test_shards_have_the_bytes_that_webdataset_writes(tmp_path):
    import webdataset

    samples = [made_sample(i) for i in range(3)]
    write_shard(tmp_path / "ours.tar", samples)
    options = {"encoder": False, "mtime": 0, "user": "", "group": ""}
    with open(tmp_path / "theirs.tar", "wb") as file, webdataset.TarWriter(file, **options) as writer:
        for sample in samples:
            writer.write({"__key__": sample.key, **members(sample)})
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_a_full_disk_leaves_no_half_shard(folder, monkeypatch):
    def full(self, *_):
        raise OSError(28, "No space left on device")

    write_shards([made_sample(0)], folder)
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(DatasetError, match=r"00001.tar cannot be written: No space left"):
        write_shards([made_sample(0), made_sample(1)], folder)
    assert [path.name for path in folder.iterdir()] == ["00000.tar"]


@pytest.mark.parametrize("key", ["", "a.b", "x" * 91, "__a", "/a", "a/"])
def test_keys_that_no_shard_can_hold_are_named_and_the_rest_is_written(folder, key):
    (bad,) = write_shards([Sample(key, ["a"]), made_sample(0)], folder)
    assert bad.key == key and "The key must be" in bad.sentence
    assert [sample.key for sample in read(folder)] == ["key-0000"]


def test_two_samples_of_one_key_and_other_formats_are_named(folder):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "GIF")
    samples = [made_sample(0), made_sample(0), Sample("gif", ["a"], image=buffer.getvalue()), made_sample(1)]
    twice, gif = write_shards(samples, folder)
    assert "Another sample has this key" in twice.sentence and "must be PNG, JPEG or WebP" in gif.sentence
    assert [sample.key for sample in read(folder)] == ["key-0000", "key-0001"]


def test_a_folder_that_is_none_or_empty_is_a_sentence(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        list(read(tmp_path / "nothing"))
    with pytest.raises(DatasetError, match="holds no samples"):
        list(read(tmp_path))


def test_other_files_of_a_folder_are_passed_over(folder):
    folder.mkdir()
    for name, data in members(made_sample(0)).items():
        (folder / f"key-0000.{name}").write_bytes(data)
    for name in ("key-0000.hands.png", "index.html", ".hd-run.lock", ".hidden.json", "notes.txt"):
        (folder / name).write_bytes(encode_png(np.zeros((2, 2, 3), np.uint8)))
    (folder / "sub.json").mkdir()
    assert scan(folder)[1] == []
    (only,) = read(folder)
    assert same(only, made_sample(0))


def test_json_keeps_what_else_it_says(folder):
    record = {"prompt": "a", "source": "me", "licence": "CC0", "seed": 7, "nested": {"a": [1]}}
    tar(folder / "00000.tar", {"a.json": json.dumps(record).encode()})
    (sample,) = read(folder)
    assert sample.prompts == ["a"] and sample.meta == {k: v for k, v in record.items() if k != "prompt"}
