"""Over HTTP: every way is measured, each in turn, and a server that does not start is a sentence."""

from __future__ import annotations

import pytest

for _name in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(_name)

from handiffuser import EngineError, HanDiffuser  # noqa: E402
from handiffuser.benchmarks.load import mixed_requests  # noqa: E402
from handiffuser.benchmarks.serve import compare, server  # noqa: E402
from handiffuser.benchmarks.tables import Tables  # noqa: E402
from plain_servers import SERVERS  # noqa: E402

HOW = {"device": "cpu", "threads": 1, "backend": "auto", "batch_size": 4}


@pytest.mark.slow
def test_every_way_in_turn(toy_bundle, capsys):
    pipeline = HanDiffuser.load(toy_bundle, device="cpu", threads=1)
    requests = mixed_requests(pipeline, 6, steps=(3, 6))
    rows = list(compare(str(toy_bundle), requests, (0.5,), 1, HOW, servers=SERVERS))
    assert [row["name"] for row in rows] == ["bare loop", *SERVERS, *SERVERS]
    assert all(row["pictures_per_second"] > 0 for row in rows)
    assert all(row["cpu_seconds_per_picture"] >= 0 for row in rows[:4])
    assert all(len(row["samples"]) == 6 and row["share"] == 0.5 for row in rows[4:])
    Tables().serve({"requests": 6, "steps": [3, 6], "rows": rows})
    said = capsys.readouterr().out
    assert said.count("hd-serve") == 3 and "bare loop" in said and "50%" in said


@pytest.mark.slow
def test_a_server_that_does_not_start_is_a_sentence(tmp_path):
    with pytest.raises(EngineError, match="did not become ready"), server("lock", SERVERS["lock"], str(tmp_path), HOW):
        pass
