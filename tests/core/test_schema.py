"""Reading JSON, and `fit` from many threads at once. What `fit` says of bad values is tested where they come from."""

from __future__ import annotations

import subprocess
import sys

import pytest
from handiffuser.schema import MisfitError, read_python_json

THREADS = """
import sys, threading
from dataclasses import make_dataclass
from typing import Annotated
from msgspec import Meta
from handiffuser.schema import fit

sys.setswitchinterval(1e-6)  # threads take turns as often as they can
names = [f"field_{number}" for number in range(30)]
for _ in range(50):
    kind = make_dataclass("Kind", [(name, Annotated[int, Meta(ge=0, description="a number")]) for name in names])
    start, found = threading.Barrier(8), []

    def first():
        start.wait()
        found.append(fit(dict.fromkeys(names, 1), kind))

    threads = [threading.Thread(target=first) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [kind(**dict.fromkeys(names, 1))] * 8
"""


def test_threads_may_fit_the_same_for_the_first_time():
    """In a process of its own: where they may not, it is gone."""
    result = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("content", [b'{"\\ud800": null}', b'{"prompt": ["a \\udc00 hand"]}'])
def test_half_of_a_surrogate_pair_is_refused(tmp_path, content):
    """Python's json reads it, and whatever encodes the text later fails."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(MisfitError, match="half of a surrogate pair"):
        read_python_json(tmp_path / "config.json")
