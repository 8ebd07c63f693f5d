"""A server announces many pictures, so that `auto` may choose the backend that pays in the long run."""

from __future__ import annotations

from typing import Any

import pytest
from handiffuser import EngineError
from handiffuser.engines.openvino import MIN_PICTURES_BATCHED
from handiffuser.runtime.loading import SERVER_PICTURES
from handiffuser.serving import ray, worker

ASKED: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def no_engines(monkeypatch):
    ASKED.clear()

    def load(*arguments: Any, **options: Any) -> None:
        ASKED.append(options)
        raise EngineError("There are no engines in this test.")

    monkeypatch.setattr(worker.HanDiffuser, "load", load)


class Pipe:
    def send_bytes(self, message: bytes) -> None:
        assert b"Refused" in message and b"There are no engines in this test." in message

    def close(self) -> None:
        pass


def test_a_server_announces_many():
    worker.work(Pipe(), worker.Options("demo"))  # type: ignore[arg-type]
    assert [options["pictures"] for options in ASKED] == [SERVER_PICTURES]
    assert MIN_PICTURES_BATCHED < SERVER_PICTURES < 1 << 60  # the number that pays for a slow start (`Admission.pays`)


def test_an_actor_announces_its_share(tmp_path):
    assert ray.Painter(worker.Options("demo", pictures=25), str(tmp_path)).broken.endswith("in this test.")
    assert [options["pictures"] for options in ASKED] == [25]
