"""The document's figures as rows of text for terminal and page."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from .measure import GROUPED, NAMES, SHARES
from .reference import change

GROUP_COLUMNS = ("by", "group", "hands", "metric", "in the group (95 %)", "minus that of all others (95 %)")


WIDTH = 160  # columns of a table outside a terminal


def console() -> Console:
    """A console on stdout for tables."""
    out = Console(highlight=False, soft_wrap=True)
    return out if out.is_terminal else Console(highlight=False, soft_wrap=True, width=WIDTH)


def title(metric: str) -> str:
    if metric.startswith("judge_"):
        return f"the judge reads: {metric.removeprefix('judge_')}"
    return NAMES[metric][0]


def number(metric: str, value: float) -> str:
    """A share in per cent, a distance with 3 or 5 digits."""
    if metric in SHARES or metric.startswith("judge_"):
        return f"{100 * value:.1f} %" if metric != "hand_confidence" else f"{value:.3f}"
    digits = 5 if metric.startswith("kid") else 3
    return f"{round(value, digits) + 0.0:.{digits}f}"  # no -0


def spread(metric: str, entry: dict[str, Any]) -> str:
    """A value with its interval: "93.8 % (91.0 to 96.1)"."""
    low, high = (number(metric, entry[key]).removesuffix(" %") for key in ("low", "high"))
    return f"{number(metric, entry['value'])} ({low} to {high})"


def metric_rows(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table of metrics. With a reference they show its figure and the difference, too."""
    if "differences" not in document:
        rows = [[title(m), spread(m, e), str(e["n"])] for m, e in document["metrics"].items()]
        return ["", "value (95 %)", "N"], rows
    rows = []
    for metric, entry in document["differences"].items():
        sides = [number(metric, entry[name]) for name in ("reference", "candidate")]
        rows.append([title(metric), *sides, change(metric, entry), str(entry["n"])])
    if document["psnr"].get("n"):
        entry = document["psnr"]
        rows.append(
            ["PSNR, dB", "", f"{entry['value']:.1f}", f"({entry['low']:.1f} to {entry['high']:.1f})", str(entry["n"])]
        )
    return ["", "reference", "candidate", "difference (95 %)", "N"], rows


def group_rows(document: dict[str, Any], beyond_chance: bool = False) -> list[list[str]]:
    """Rows of GROUP_COLUMNS. beyond_chance: only gaps whose interval leaves 0 out."""
    rows = []
    for entry in document["groups"]:
        for metric in GROUPED:
            if metric not in entry:
                continue
            gap = entry[metric].get("gap")
            if beyond_chance and (gap is None or gap["low"] <= 0 <= gap["high"]):
                continue
            found = [entry["by"], entry["group"], str(entry[metric]["n"]), title(metric).split(" (")[0]]
            rows.append([*found, spread(metric, entry[metric]), change(metric, gap) if gap else ""])
    return rows


def gaps(document: dict[str, Any]) -> tuple[int, int]:
    """The number of gaps, and how many of them leave 0 out."""
    return sum(bool(row[-1]) for row in group_rows(document)), len(group_rows(document, beyond_chance=True))
