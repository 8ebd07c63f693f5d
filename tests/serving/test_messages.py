"""The messages between the front and a worker: they arrive as they were sent, and wrong ones are refused."""

from __future__ import annotations

import multiprocessing
import queue

import msgspec
import numpy as np
import pytest
from handiffuser import Request
from handiffuser.serving import dispatch, messages
from handiffuser.serving.messages import (
    Broken,
    Cancel,
    Failed,
    HandsMade,
    MakeHands,
    Measured,
    PictureMade,
    Preview,
    Ready,
    Refused,
    Run,
    Stop,
    Takes,
    for_front,
    for_worker,
    send,
    sentence,
)

REQUEST = Request("a café, 手", id="one", seed=2**63 - 1, steps=3, guidance=2.5, guidance_interval=(0.0, 0.5))
PAINTED = Request("a", id="two", image=np.zeros((4, 4, 3), np.uint8), mask="mask.png", strength=0.5)
WHOLE = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
HANDS = {"camera": np.float32([0.1, 1e-30, np.inf]), "joints": np.zeros((0, 3)), "scalar": np.array(3.0)}


@pytest.fixture
def pipe():
    ours, theirs = multiprocessing.Pipe()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    "message",
    [Run(REQUEST), Run(PAINTED), Run(REQUEST, frozenset({2, 1}), True), MakeHands(REQUEST), Cancel("one"), Stop()],
)
def test_a_worker_receives_what_the_front_sends(pipe, message):
    send(pipe[0], message)
    assert for_worker(pipe[1]) == message


@pytest.mark.parametrize(
    "message",
    [
        Ready(4, 1, ["a warning"], 2.5, 0.5),
        Ready(4, 1, takes=Takes([(32, 64)], "build it", 1, False, True)),
        Refused("no"),
        Broken("no"),
        Failed("one", "no", 503),
        Measured({1: 2}, {"unet": 0.5}, {"unet": [0.25, 0.25]}, (1, 2)),
    ],
)
def test_the_front_receives_what_a_worker_sends(pipe, message):
    send(pipe[0], message)
    assert for_front(pipe[1]) == message


def test_arrays_keep_every_bit(pipe):
    for message in (
        HandsMade("one", HANDS),
        Preview("one", 1, 2, WHOLE[:, ::2]),  # not contiguous
        PictureMade("one", WHOLE.transpose(1, 0, 2), HANDS, ["a warning"]),
    ):
        send(pipe[0], message)
        received = for_front(pipe[1])
        assert type(received) is type(message)
        for name in message.__struct_fields__:
            sent, got = getattr(message, name), getattr(received, name)
            for a, b in ((sent[key], got[key]) for key in sent) if isinstance(sent, dict) else ((sent, got),):
                if isinstance(a, np.ndarray):
                    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
                else:
                    assert a == b


def test_an_error_with_broken_unicode_can_be_sent(pipe):
    send(pipe[0], Refused(sentence(OSError("/engines/\udcff cannot be read"))))
    assert for_front(pipe[1]).sentence == r"/engines/\udcff cannot be read"


@pytest.mark.parametrize("content", [b"", b"\xff", msgspec.msgpack.encode({"type": "Launch"}), messages._ENCODER.encode(
    {"type": "Failed", "id": 1, "sentence": "no"})])  # fmt: skip
def test_a_wrong_message_ends_the_worker(pipe, content):
    """The front does not guess: the worker counts as ended, and starts again."""
    heard, outbox = [], queue.SimpleQueue()
    pipe[1].send_bytes(content)
    dispatch._read(pipe[0], outbox, heard.append)
    assert heard == [None] and outbox.get() is None and pipe[0].closed
