"""How often two hands of stage 1 do not fit into one picture, with and without drawing them again.

    python studies/clashes.py

The demo runs 1,000 prompts of its own grammar that leave side and number open, 300 that ask for two hands, and
"thumbs up" with 200 seeds. It makes hands and no pictures.
"""

from __future__ import annotations

import json
import re

import numpy as np
from handiffuser import HanDiffuser, Request
from handiffuser.demo.prompts import sample_spec, write_prompt
from handiffuser.runtime.clash import clash

SIDE_OR_NUMBER = re.compile(r"\b(left|right|two|both|pair|hands)\b", re.IGNORECASE)
NUMBER = re.compile(r"\b(two|both|pair)\b", re.IGNORECASE)
BATCH = 32


def prompts() -> dict[str, list[str]]:
    """Kind -> its prompts, the same each time."""
    rng = np.random.default_rng(20260)
    found: dict[str, list[str]] = {"open": [], "two hands": [], "thumbs up": ["thumbs up"] * 200}
    while len(found["open"]) < 1000:
        prompt = write_prompt(sample_spec(rng), rng)
        if not SIDE_OR_NUMBER.search(prompt):
            found["open"].append(prompt)
    while len(found["two hands"]) < 300:
        prompt = write_prompt(sample_spec(rng, both=1.0), rng)
        if NUMBER.search(prompt):
            found["two hands"].append(prompt)
    return found


def clashes(pipeline: HanDiffuser, asked: list[str], redraws: int) -> int:
    """How many of these prompts end with two hands that clash. Prompt i has seed i."""
    count = 0
    for start in range(0, len(asked), BATCH):
        some = [
            Request(prompt, seed=start + i, hand_redraws=redraws)
            for i, prompt in enumerate(asked[start : start + BATCH])
        ]
        for hands in pipeline.hands(pipeline.prepare(some)[0]):
            assert isinstance(hands, dict), hands
            count += clash(hands["joints"], hands["visibility"], hands["params"])
    return count


def main() -> None:
    with HanDiffuser.load("demo", device="cpu", batch_size=BATCH) as pipeline:
        for kind, asked in prompts().items():
            found = {redraws: clashes(pipeline, asked, redraws) for redraws in (0, 1, 2)}
            print(json.dumps({"prompts": kind, "count": len(asked), "clashes by redraws": found}))


if __name__ == "__main__":
    main()
