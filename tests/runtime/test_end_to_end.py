"""Real exported graphs (tiny, untrained) through the runtime and the command."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from handiffuser import HanDiffuser, Request
from handiffuser.hands import save_hands


@pytest.fixture(scope="module")
def pipeline(tiny_bundle) -> HanDiffuser:
    return HanDiffuser.load(tiny_bundle, device="cpu", threads=1)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def test_alone_first_and_last_in_a_batch(pipeline):
    ours = Request("a right hand making a fist", seed=7, solver="ddpm", steps=5)
    others = [Request(f"hand {n}", seed=n, steps=3 + n, guidance=float(n)) for n in range(7)]
    alone = pipeline.generate(ours)[0]
    first = pipeline.generate([ours, *others])[0]
    last = pipeline.generate([*others, ours])[-1]
    assert alone.id == first.id == last.id
    for one in (first, last):
        np.testing.assert_allclose(one.hands["params"], alone.hands["params"], atol=1e-4)
        assert difference(one.image, alone.image) <= 1


def test_sizes_share_the_loop(pipeline):
    """The own size is 48x32. The hands are those of the own size, in proportion to the height."""
    asked = [Request("a right hand making a fist", seed=7, steps=3, size=size) for size in (None, "72x32", "32x64")]
    together = pipeline.generate(asked)
    for request, picture in zip(asked, together, strict=True):
        assert difference(pipeline.generate(request)[0].image, picture.image) <= 1
    assert [picture.image.shape for picture in together] == [(32, 48, 3), (32, 72, 3), (64, 32, 3)]
    own, wide, tall = (picture.hands["joints_2d"] for picture in together)
    np.testing.assert_allclose((wide[..., 0] - 0.5) * 1.5, own[..., 0] - 0.5, atol=1e-4)
    np.testing.assert_allclose(wide[..., 1], own[..., 1], atol=1e-4)
    shown = tall[together[2].hands["visibility"] > 0]
    assert shown.size == 0 or (shown[..., 0].min() > -1e-3 and shown[..., 0].max() < 1 + 1e-3)


def test_saved_hands_make_the_same_picture(pipeline, tmp_path):
    (first,) = pipeline.generate("two open hands", seed=3)
    path = tmp_path / "a.hands.npz"
    save_hands(path, first.hands)
    (again,) = pipeline.generate("two open hands", seed=3, hands=str(path))
    np.testing.assert_allclose(again.hands["vertices"], first.hands["vertices"], atol=1e-4)
    np.testing.assert_allclose(again.hands["joints_2d"], first.hands["joints_2d"], atol=1e-4)
    assert difference(again.image, first.image) <= 1


def test_the_command_without_a_framework(tiny_bundle, tmp_path):
    code = (
        "import sys\nfrom handiffuser.runtime.cli import main\ntry: main()\n"
        "finally: print([n for n in ('torch', 'diffusers', 'transformers') if n in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tiny_bundle), "a fist", "two hands ✌️", "-o", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]" and len(list((tmp_path / "out").glob("*.json"))) == 2


def test_without_guidance_the_prompt_alone_is_encoded(pipeline, monkeypatch):
    """Half of the work of context, keys and values; in company that needs both branches it is the same picture."""
    timed, seen = pipeline.loop.engines["text_hand_encoder"], []
    run = timed.engine
    monkeypatch.setattr(timed, "engine", lambda feeds: seen.append(feeds["input_ids"].shape[1]) or run(feeds))
    both = [Request("a fist", seed=3, guidance=1.0), Request("a palm", seed=4, guidance=3.0)]
    (alone,) = pipeline.run(pipeline.prepare(both[:1])[0])
    pictures = {picture.request.prompt: picture for picture in pipeline.run(pipeline.prepare(both)[0])}
    assert seen == [1, 2]
    assert np.abs(alone.image.astype(int) - pictures["a fist"].image.astype(int)).max() <= 1
