"""Tables and SVG plots for the pages of `hd-eval`, `hd-bench` and the studies."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """A table of escaped cells. classes: one CSS class for each row."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = ""
    for number, row in enumerate(rows):
        name = f' class="{classes[number]}"' if classes and classes[number] else ""
        body += f"<tr{name}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def plot(draw: Callable[[Any], None], height: float = 3.2) -> str:
    """A plot as SVG. Letters are outlines, so the page needs no font."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    return "<figure>" + svg[svg.index("<svg") :] + "</figure>"
