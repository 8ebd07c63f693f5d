"""Writes the document as one page: tables, plots as inline SVG, hands with skeletons. The page loads nothing else.

Path("page.html").write_text(page(document, best, worst))
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..skeleton import draw_skeleton
from .measure import GROUPED, GROUPS, SHARES, Kept
from .page import plot, table
from .tables import GROUP_COLUMNS, gaps, group_rows, metric_rows, title

THUMBNAIL = 256  # pixels of a picture's longer side
BLUE, RED, GREY = "#2f6690", "#d1495b", "#999"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, .words td, .words th { text-align: left; }
svg { max-width: 100%; height: auto; } figure { margin: 0; } .beyond td { font-weight: 600; }
.note { color: #666; } .verdict { font-size: 1.1rem; border-left: 4px solid #2f6690; padding-left: 1rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 1.2rem; }
main img { width: 100%; display: block; border-radius: 4px; } figcaption { font-size: 13px; }
details summary { cursor: pointer; }
"""


def page(document: dict[str, Any], best: Sequence[Kept], worst: Sequence[Kept]) -> str:
    """The whole page."""
    beside = f" beside {document['reference']}" if "reference" in document else ""
    name = html.escape(f"hd-eval: {document['what']}{beside}")
    count, hands = document["pictures"], document["hands_asked_for"]
    parts = [f"<h1>{name}</h1><p>{count} pictures, {hands} hands asked for.</p>"]
    if "verdict" in document:
        parts.append(f"<p class=verdict>{html.escape(document['verdict'])}</p>")
    columns, rows = metric_rows(document)
    parts += ["<h2>Figures</h2>", table(columns, rows)]
    parts += [f"<p class=note>{html.escape(note)}</p>" for note in document["notes"] if note != document.get("verdict")]
    if document.get("differences"):
        parts.append(_differences(document["differences"]))
    if document["curve"]:
        parts += ["<h2>How near the joints are</h2>", _curve(document)]
    if document["hands"]:
        parts.append(_scores(document))
    if document["groups"]:
        parts.append(_groups(document))
    for heading, kept in (("Best hands", best), ("Worst hands", worst)):
        if kept:
            figures = "".join(_figure(one) for one in kept)
            parts.append(f"<h2>{heading}</h2><p class=note>Left: the requested hand. Right: the hand that the "
                         f"detector found.</p><main>{figures}</main>")  # fmt: skip
    parts += ["<h2>How it was measured</h2>", _settings(document)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{name}</title><style>{STYLE}</style>{''.join(parts)}</html>\n"
    )


def _differences(differences: dict[str, Any]) -> str:
    """A plot of the shares, which have one scale."""
    shown = [name for name in differences if name in SHARES or name.startswith("judge_")]

    def draw(axes: Any) -> None:
        for i, name in enumerate(shown):
            _bar(axes, i, differences[name])
        _rows(axes, [title(name) for name in shown])
        axes.set(xlabel="candidate minus reference, percentage points, 95 %")

    return plot(draw, 1.2 + 0.35 * len(shown)) if shown else ""


def _curve(document: dict[str, Any]) -> str:
    def draw(axes: Any) -> None:
        limits, shares = np.array(document["curve"]).T
        axes.plot(100 * limits, 100 * shares, color=BLUE)
        axes.set_xlim(0, 40)
        axes.set_ylim(0, 100)
        axes.set(xlabel="distance, % of the hand's size", ylabel="% of joints within it (misses never)")

    return plot(draw)


def _scores(document: dict[str, Any]) -> str:
    def draw(axes: Any) -> None:
        scores = [hand["score"] for hand in document["hands"]]
        axes.hist(scores, bins=np.linspace(0, 1, 21), color=BLUE)
        axes.set(xlabel="confidence (misses 0)", ylabel="hands", title="The detector's confidence in each hand")

    return plot(draw)


def _groups(document: dict[str, Any]) -> str:
    """Each group beside all others."""
    every, beyond = gaps(document)
    parts = [
        "<h2>Groups of hands</h2>",
        f"<p>Each group's figure minus that of all other hands. {beyond} of {every} intervals leave 0 out; chance "
        f"alone gives about {0.05 * every:.0f}.</p>",
    ]
    for by in GROUPS:
        entries = [entry for entry in document["groups"] if entry["by"] == by]
        metrics = [metric for metric in GROUPED if any(metric in entry for entry in entries)]
        if not entries:
            continue

        def draw(axes: Any, entries: Any = entries) -> None:
            for i, entry in enumerate(entries):
                if "gap" in entry.get("hand_confidence", {}):
                    _bar(axes, i, entry["hand_confidence"]["gap"])
            _rows(axes, [f"{entry['group'].replace('_', ' ')} ({entry['n']})" for entry in entries])
            axes.set(xlabel="hand confidence minus that of all others, hundredths, 95 %")

        rows = [row[1:] for row in group_rows({"groups": entries})]
        bold = {tuple(row[1:]) for row in group_rows({"groups": entries}, beyond_chance=True)}
        marked = ["beyond" if tuple(row) in bold else "" for row in rows]
        parts.append(f"<h3>By {by}</h3>{plot(draw, 1.0 + 0.28 * len(entries))}")
        rows_of = table(GROUP_COLUMNS[1:], [[row[0].replace("_", " "), *row[1:]] for row in rows], marked)
        parts.append(
            f"<details><summary>{len(entries)} groups, {len(metrics)} figures each</summary>{rows_of}</details>"
        )
    return "".join(parts)


def _bar(axes: Any, row: int, entry: dict[str, Any]) -> None:
    """A dot with its interval. Red or blue means beyond chance."""
    beyond = entry.get("beyond_chance", not entry["low"] <= 0 <= entry["high"])
    colour = GREY if not beyond else BLUE if entry["value"] > 0 else RED
    axes.plot([100 * entry["low"], 100 * entry["high"]], [row, row], color=colour)
    axes.plot(100 * entry["value"], row, "o", color=colour, markersize=5)


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.axvline(0, color="#222", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _figure(kept: Kept) -> str:
    image = Image.fromarray(kept.image)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    small, hand = np.asarray(image), kept.hand
    left = _drawn(small, hand.asked.side, hand.asked.joints) if hand.asked else _drawn(small, "", None)
    right = _drawn(small, hand.found.side, hand.found.joints) if hand.found else _drawn(small, "", None)
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([left, np.full((len(left), 6, 3), 255, np.uint8), right], 1)).save(
        buffer, "JPEG", quality=85
    )
    said = [f"asked: {hand.asked.side}"] if hand.asked else []
    said.append(f"found: {hand.found.side}, {hand.found.score:.2f}" if hand.found else "found: none")
    if hand.distances is not None:
        said.append(f"{100 * hand.distances.mean():.1f} % of its size apart")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{html.escape(kept.prompt[:200])}" loading="lazy">'
        f"<figcaption>{html.escape(kept.prompt[:200])}<br><span class=note>{html.escape(', '.join(said))} · "
        f"{html.escape(kept.key)}</span></figcaption></figure>\n"
    )


def _drawn(image: np.ndarray, side: str, joints: np.ndarray | None) -> np.ndarray:
    both, shown = np.zeros((2, 21, 2)), np.zeros(2)
    if joints is not None:
        number = 0 if side == "left" else 1
        both[number], shown[number] = joints, 1
    return draw_skeleton(image, both, shown)


def _settings(document: dict[str, Any]) -> str:
    rows = []
    for name, value in document["settings"].items():
        words = ", ".join(f"{key}: {entry}" for key, entry in value.items()) if isinstance(value, dict) else str(value)
        rows.append([name, words])
    rows.append(["pictures", document["folder"]])
    rows.append(["CPU seconds", str(document["cpu_seconds"])])
    return f"<div class=words>{table(['', ''], rows)}</div>"
