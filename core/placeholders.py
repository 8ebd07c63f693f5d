"""Textual inversion with several vectors (Gal et al., arXiv 2208.01618): one placeholder in a prompt, several tokens.

    table = runs(tokenizer)            # {49408: [49408, 49409]} for <cat> and <cat>_1
    spread([320, 49408], table)        # [320, 49408, 49409]

diffusers' `load_textual_inversion` names the further vectors `<cat>_1`, `<cat>_2`, and replaces `<cat>` in a prompt by
all of them. `hd-run` and training do the same. Here `<Cat>` means `<cat>`; diffusers takes its first vector alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def runs(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Id of a placeholder with several vectors -> the ids of all its vectors, its own first."""
    added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    found: dict[int, list[int]] = {}
    for content, number in added.items():
        run = [number]
        while (following := added.get(f"{content}_{len(run)}")) is not None:
            run.append(following)
        if len(run) > 1:
            found[number] = run
    return found


def spread(ids: Iterable[int], table: Mapping[int, list[int]]) -> list[int]:
    """The ids of a prompt, each placeholder as all its tokens."""
    return [part for number in ids for part in table.get(number, (number,))]
