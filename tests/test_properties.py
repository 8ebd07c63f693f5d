"""Whatever a file from outside says, it is taken or refused in one sentence, in bounded memory and time.

The searches are in properties.py. A short one runs with every test, a longer one with the slow ones, and the longest,
ten minutes, by `pytest -m nightly`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from properties import KINDS

CASES = {"short": 60, "slow": 2000, "nightly": 30_000}


@pytest.mark.skipif(sys.platform == "win32", reason="limits of memory")
@pytest.mark.parametrize(
    "length",
    ["short", pytest.param("slow", marks=pytest.mark.slow), pytest.param("nightly", marks=pytest.mark.nightly)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_anything_is_taken_or_refused(kind, length, tmp_path):
    # The short search is the same each time; the others look elsewhere every day.
    seed = 0 if length == "short" else int(time.time() // 86400)
    script = Path(__file__).parent / "properties.py"
    command = [sys.executable, str(script), kind, str(CASES[length]), str(seed), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=3600, errors="replace")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    counts = json.loads(result.stdout.strip().splitlines()[-1])
    assert counts["cases"] >= CASES[length] and counts["refused"] > 0.1 * counts["cases"]
    print(kind, counts)
