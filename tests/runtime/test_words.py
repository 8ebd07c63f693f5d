"""Prompts with weights and of any length: what they change, and that other requests do not notice."""

from __future__ import annotations

import commands
import numpy as np
import pytest
from handiffuser.errors import RequestError
from handiffuser.runtime.pipeline import HanDiffuser
from handiffuser.runtime.requests import Request, picture_key

LONG = "two open hands on a table, " * 8  # a token a character: three chunks
PROMPTS = (
    "a fist", LONG, "a (fist:1.4)", "a [fist] BREAK (two:0.2) hands", LONG * 2, "(a:0) fist", "a fist BREAK b",
    "unbalanced ((( and ]]", "(一只手:1.3) ✌️ (кулак:-2)",
)  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(sized_bundle):
    with HanDiffuser.load(sized_bundle, device="cpu", threads=1, batch_size=3) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def older(toy_bundle):
    with HanDiffuser.load(toy_bundle, device="cpu", threads=1) as loaded:
        yield loaded


def image_of(pipeline, prompt, **settings):
    return pipeline.generate(prompt, **{"seed": 3, **settings})[0].image


def test_alone_or_in_company(pipeline):
    """Requests of all lengths, sizes and weights at once, with and without guidance, more of them than slots."""
    requests = [
        Request(
            prompt,
            seed=i,
            size=(None, "40x24")[i % 2],
            steps=2 + i % 4,
            guidance=(2.0, 1.0, 4.0)[i % 3],
            negative_prompt=("", LONG, "(b:1.5) [c]", "")[i % 4],
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    together = pipeline.generate(requests)
    assert len({picture.image.tobytes() for picture in together}) == len(requests)
    for request, picture in zip(requests, together, strict=True):
        alone = pipeline.generate(request)[0]
        assert np.array_equal(alone.image, picture.image), request.prompt
        assert alone.warnings == picture.warnings


def test_what_changes_a_picture_and_what_does_not(pipeline):
    plain = image_of(pipeline, "a fist")
    for same in ("(a fist:1)", "a ((fist:2):0.5)", "BREAK a fist BREAK"):
        assert np.array_equal(image_of(pipeline, same), plain), same
    for other in ("a (fist)", "a [fist]", "a (fist:0)", "a fist BREAK a fist"):
        assert not np.array_equal(image_of(pipeline, other), plain), other
    assert not np.array_equal(image_of(pipeline, LONG), image_of(pipeline, LONG[:-30])), "the last chunk is read"
    assert not np.array_equal(image_of(pipeline, LONG + "a"), image_of(pipeline, LONG[:75], plain_prompts=True))
    for name in ("(fist:1.4)", "[fist]"):  # without guidance the negative prompt and its length are unused
        alone = [image_of(pipeline, name, guidance=1, negative_prompt=text) for text in ("", LONG)]
        assert np.array_equal(*alone)


def test_stage_1_and_the_first_noise_read_the_plain_words(pipeline):
    """So another weight is not another picture altogether."""
    made = [pipeline.generate(p, seed=3, noise_offset=0.5)[0] for p in ("a fist", "a (fist:1.4)", "a fist BREAK b")]
    np.testing.assert_array_equal(made[0].hands["params"], made[1].hands["params"])
    noises = [picture.request.noise("latents", pipeline.bundle.table("latents", picture.request)) for picture in made]
    starts = [noise.start((4, 8, 8)) for noise in noises]
    assert np.array_equal(starts[0], starts[1]) and not np.array_equal(starts[0], starts[2])


def test_plain_prompts_are_text(pipeline):
    escaped = r"\(fist:1.4\) \[b\]"
    assert np.array_equal(image_of(pipeline, "(fist:1.4) [b]", plain_prompts=True), image_of(pipeline, escaped))
    (picture,) = pipeline.generate(LONG, plain_prompts=True)
    assert picture.warnings == [f"The prompt is longer than 75 tokens. This part was cut: {LONG[75:].strip()!r}"]


def test_an_older_bundle_reads_one_chunk_and_says_so(older, pipeline):
    assert np.array_equal(image_of(older, "a (fist:1.4)"), image_of(pipeline, "a (fist:1.4)"))
    assert np.array_equal(image_of(older, LONG), image_of(pipeline, LONG, plain_prompts=True))
    assert np.array_equal(image_of(older, "a [fist]"), image_of(pipeline, "a fist"))
    for prompt, said in (
        (LONG, "longer than 75 tokens. This part was cut: "),
        ("a [fist]", "weights below 1, which this bundle reads as 1"),
        ("a BREAK b", "BREAK, which this bundle reads as a space"),
    ):
        (sentence,) = older.generate(prompt)[0].warnings
        assert said in sentence and "hd-export CHECKPOINT OUT" in sentence
    assert not older.generate("a (fist:1.4)")[0].warnings


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("ten thousand words " * 3400, r"prompt must fit into 16 chunks of 75 tokens, got 64,600 tokens in 862 chunks"),
        ("(a:1e9)", r"prompt must have weights from -10 to 10, got 1e\+09 for 'a'"),
        ("[a] b " * 65, "prompt must have at most 64 texts with weights below 1, got 65"),
    ],
)
def test_refused(pipeline, prompt, said):
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(RequestError, match=said.replace("prompt", name, 1)) as caught:
            list(pipeline.resolver().each(Request(**{"prompt": "a fist", name: prompt})))
        assert caught.value.param == name


def test_marks_without_meaning_are_named(pipeline):
    assert "'[cat|dog]'. It changes nothing between steps" in pipeline.generate("a [cat|dog]")[0].warnings[0]


def test_keys_of_prompts_without_marks_stay(pipeline):
    """An older folder goes on; where marks have a meaning now, its picture is another one."""
    keys = [
        picture_key(Request(p, seed=1, plain_prompts=plain)) for p in ("a fist", "a (fist)") for plain in (False, True)
    ]
    assert len(set(keys)) == 4
    assert keys[0] == "c813f8bfa43ec9e058e2df4871155b95d00217a04cfdf5a7b87eca6095ee9869"


def test_the_command_and_its_files(sized_bundle, tmp_path):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(
        '{"prompt": "a (b:1.2)", "id": "own", "plain_prompts": false}\n{"prompt": "a (b:1.2)", "id": "shared"}\n'
    )
    options = ("--prompts", str(lines), "--plain-prompts", "--output", str(tmp_path / "out"), "--device", "cpu")
    done = commands.invoke("runtime.cli", str(sized_bundle), *options)
    assert not done.returncode, done.stderr
    records = [(tmp_path / f"out/{name}.json").read_text() for name in ("own", "shared")]
    assert '"plain_prompts": false' in records[0] and '"plain_prompts": true' in records[1]
    assert all('"prompt": "a (b:1.2)"' in record for record in records)


def test_a_bundle_of_today_reads_all_of_a_prompt(tiny_bundle, tiny_checkpoint):
    """The last of three chunks, and weights, change the picture of exported graphs; and `L` is what PyTorch says."""
    with HanDiffuser.load(tiny_bundle, device="cpu", threads=1) as real:
        long = "a left hand, " * 60
        chunks = len(real.bundle.reader.read(Request(long), "prompt").ids)
        images = [image_of(real, text, steps=2) for text in (long, long + " fist", f"(a left:0.3) {long}", "a hand")]
        assert chunks > 2 and len({image.tobytes() for image in images}) == 4
        seen = []
        timed = real.loop.engines["unet_context"]
        timed.engine = Watched(timed.engine, seen)
        real.generate([long, "a hand"], steps=2)
        encoder = tiny_checkpoint.text_hand_encoder
        assert sorted(seen) == [encoder.num_tokens, encoder.num_tokens + 77 * (chunks - 1)]


class Watched:
    """An engine that notes the length of its contexts."""

    def __init__(self, engine, seen):
        self.engine, self.seen = engine, seen

    def __call__(self, feeds):
        self.seen.append(feeds["context"].shape[2])
        return self.engine(feeds)
