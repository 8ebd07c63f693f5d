"""Pictures of any size: what a request may ask for, and that requests of other sizes change nothing."""

import commands
import numpy as np
import pytest
from handiffuser.errors import RequestError
from handiffuser.runtime import room
from handiffuser.runtime.host import Kind
from handiffuser.runtime.pipeline import HanDiffuser
from handiffuser.runtime.requests import Request
from handiffuser.runtime.room import Room
from PIL import Image

SIZES = (None, "40x24", "24x40", "64x32", "40x24", None, "16x16")


@pytest.fixture(scope="module")
def pipeline(sized_bundle):
    with HanDiffuser.load(sized_bundle, device="cpu", threads=1, batch_size=3) as loaded:
        yield loaded


def test_alone_or_in_company(pipeline):
    """Requests of all sizes at once, more of them than slots, with other steps and solvers."""
    requests = [
        Request("a fist", seed=i, size=size, steps=2 + i, solver=("ddim", "ddpm", "plms")[i % 3])
        for i, size in enumerate(SIZES)
    ]
    together = pipeline.generate(requests)
    for request, picture in zip(requests, together, strict=True):
        width, height = map(int, (request.size or "32x32").split("x"))
        assert picture.image.shape == (height, width, 3)
        assert np.array_equal(pipeline.generate(request)[0].image, picture.image)


def test_several_of_a_size_may_end_in_one_step(pipeline):
    made = pipeline.generate([Request("a fist", seed=i, size="40x24") for i in range(3)])
    assert [picture.image.shape for picture in made] == [(24, 40, 3)] * 3


def test_the_own_size_named_is_the_own_size(pipeline, toy_bundle):
    """With fixed graphs, with free ones, and with the size left out."""
    named, left_out = (pipeline.generate("a fist", seed=3, size=size)[0] for size in ("32x32", None))
    with HanDiffuser.load(toy_bundle, device="cpu", threads=1) as fixed:
        before = fixed.generate("a fist", seed=3, size="32x32")[0]
    assert np.array_equal(named.image, left_out.image) and np.array_equal(named.image, before.image)


def test_the_oldest_request_decides_and_none_starves(pipeline):
    """A request of a rare size among ever new ones of the usual size is done soon after its turn."""
    done = []

    def endless():
        for i in range(40):
            size = "40x24" if i == 3 else None
            yield Request("a fist", id=f"r{i}", seed=i, steps=4, size=size)

    resolver = pipeline.resolver()
    for result in pipeline.run(filled for request in endless() for filled in resolver.each(request)):
        done.append(result.id)
    assert done.index("r3") < 8 and len(done) == 40


def test_a_picture_comes_to_the_size_of_the_request(pipeline):
    image = np.full((40, 24, 3), 90, np.uint8)
    made = pipeline.generate("a fist", image=image, size="24x40", strength=0.3, seed=1)[0]
    assert made.image.shape == (40, 24, 3) and not made.warnings
    stretched = pipeline.generate("a fist", image=image, size="40x24", strength=0.3, seed=1)[0]
    assert stretched.image.shape == (24, 40, 3) and "stretched to 40x24" in stretched.warnings[0]


def test_a_very_wide_picture_is_warned_of(pipeline):
    assert "more than 2 times as wide as 32x32" in pipeline.generate("a fist", size="64x32", seed=1)[0].warnings[0]


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("40x30", r"size must be multiples of 8 up to 4096 pixels, got 40x30. The nearest is 40x32"),
        ("9999x40", r"The nearest is 4096x40"),
        ("40", r"size must be WIDTHxHEIGHT with sides from 10 to 4096 pixels, such as 512x768, got '40'"),
        ("8x8", r"size must be WIDTHxHEIGHT with sides from 10"),
    ],
)
def test_refused_sizes(pipeline, size, said):
    with pytest.raises(RequestError, match=said):
        pipeline.generate("a fist", size=size)


def test_an_older_bundle_has_one_size(toy_bundle):
    done = commands.invoke("runtime.cli", str(toy_bundle), "a fist", "--size", "40x24")
    assert done.returncode and "size must be 32x32 for this bundle, got 40x24" in done.stderr
    assert "hd-export CHECKPOINT OUT" in done.stderr and "See them all" not in done.stderr


def test_a_size_that_memory_lacks_is_refused_before_it_runs(pipeline, monkeypatch, tmp_path):
    manifest = pipeline.manifest
    monkeypatch.setattr(manifest.graphs["unet"], "memory", 11_000_000)
    monkeypatch.setattr(room, "available", lambda: 100_000_000)
    fresh = Room(manifest)
    fresh.check((32, 32))
    fresh.check((64, 64))  # 55 MB
    with pytest.raises(RequestError, match=r"size must fit into memory: 128x64 takes about 0.1 GB"):
        fresh.check((64, 128))
    # As many pixels as in 8 of the own size.
    assert [fresh.rows(size, 1, 8) for size in ((64, 64), (32, 48), (32, 32))] == [2, 5, 8]
    needed = fresh.needed((64, 128))
    fresh.ran((64, 128))
    fresh.check((64, 128))  # the memory is there already
    assert fresh.needed((64, 128)) == needed, "what a GPU gave back must be asked for again"


def test_memory_counts_the_chunks_of_a_prompt(pipeline, monkeypatch):
    manifest = pipeline.manifest
    unet = manifest.graphs["unet"]
    monkeypatch.setattr(unet, "memory", 11_000_000)
    monkeypatch.setattr(room, "available", lambda: 15_000_000)
    fresh = Room(manifest)
    fresh.check((32, 32), 1)
    told = [fresh.needed((32, 32), 1, chunks) for chunks in (1, 2, 3, 16)]
    assert told[0] == 13_750_000 and told[2] - told[1] == pytest.approx(told[1] - told[0], abs=1) and told[1] > told[0]
    widths = sum(np.prod([n for n in one.shape if isinstance(n, int)]) for one in unet.inputs if "L" in one.shape)
    assert told[1] - told[0] > 1.25 * 77 * 2 * 4 * widths, "keys and values of both branches, and products of them"
    with monkeypatch.context() as scarce:
        scarce.setattr(room, "available", lambda: told[3] - 1)
        with pytest.raises(RequestError, match=r"32x32 with 16 chunks of a prompt takes .* or a shorter prompt"):
            fresh.check((32, 32), 16)
        long = "a fist, " + "b " * 500
        with pytest.raises(RequestError, match="size must fit into memory"):
            monkeypatch.setattr(pipeline.bundle, "room", fresh)
            scarce.setattr(room, "available", lambda: 13_750_000)
            pipeline.generate(long, seed=1)
    fresh.ran((32, 32), 16)
    fresh.check((32, 32), 16)


def test_the_command_paints_a_size(sized_bundle, tmp_path):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a fist"}\n{"prompt": "an open hand", "size": "24x40"}\n')
    out = tmp_path / "out"
    options = ("--size", "40x24", "--output", str(out), "--device", "cpu")
    done = commands.invoke("runtime.cli", str(sized_bundle), "--prompts", str(lines), *options)
    assert not done.returncode, done.stderr
    pictures = [path for path in out.glob("*.png") if not path.name.endswith(".hands.png")]
    assert {Image.open(path).size for path in pictures} == {(40, 24), (24, 40)}


def test_each_batch_size_is_tried_for_one_kind_alone(sized_bundle):
    """Where a batch size must be compiled. The others take the best one, which their own engine must offer, too."""
    with HanDiffuser.load(sized_bundle, device="cpu", threads=1, batch_size=4) as loaded:
        loop = loaded.loop
        first, second, third = (Kind(size, 1, ()) for size in ((32, 32), (24, 40), (40, 24)))
        tried = loop._step_times_of(first, [1, 2, 4])
        assert loop._step_times_of(second, [1, 2, 4]).only == [1], "nothing was measured yet"
        for rows, seconds in ((1, 1.0), (2, 1.1), (4, 2.0)):
            tried.add(rows, seconds)
        assert loop._step_times_of(first, [1, 2, 4]) is tried and tried.only == [1, 2, 4]
        assert loop._step_times_of(second, [1, 2, 4]).only == [1, 4]
        assert loop._step_times_of(first._replace(adapters=(("a", 1.0),)), [1, 2]).only == [1]
        assert loop._step_times_of(third, None).only is None


def test_every_engine_of_a_kind_gives_its_own_batches(sized_bundle, monkeypatch):
    seen = []
    with HanDiffuser.load(sized_bundle, device="cpu", threads=1) as loaded:
        monkeypatch.setattr(loaded.loop.engines["unet"], "batches", [1, 8])
        wanted = loaded.loop._step_times_of
        monkeypatch.setattr(
            loaded.loop, "_step_times_of", lambda kind, batches: seen.append(batches) or wanted(kind, batches)
        )
        loaded.generate("a fist", steps=1)
    assert seen == [[1, 8]]
