"""Writes the document as one page: tables, plots as inline SVG, pictures as data. The page loads nothing else.

Path("bench.html").write_text(page(document))
"""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import numpy as np
from PIL import Image

from ..evaluation.page import plot, table
from .tables import CLOCKS, STAGES

INK, SERIES = (
    "#222",
    ("#2f6690", "#d1495b", "#66a182", "#edae49", "#8d6a9f", "#5c5c5c", "#a3c4bc", "#c08552", "#00798c"),
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, #card td { text-align: left; }
svg { max-width: 100%; height: auto; } figure { display: inline-block; margin: .5rem 1rem .5rem 0; }
.note { color: #666; } img { image-rendering: pixelated; width: 160px; }
"""


def page(document: dict[str, Any], pictures: dict[str, np.ndarray] | None = None) -> str:
    """The whole page. pictures: of the peers, uint8 [H, W, 3] by name."""
    card, runs = document.get("card"), document["runs"]
    title = f"hd-bench: {document.get('settings', {}).get('engines', '')}"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if document.get("interrupted"):
        parts.append("<p class=note>Interrupted: the page shows the results until then.</p>")
    if card:
        ceilings = card["ceilings"]
        flops, how = ceilings["matmul"]["flops"], ceilings["matmul"]["how"]
        rows = [
            ["CPU", f"{card['cpu']}, {card['cores']} cores, {card['threads']} used, {card['memory_gb']} GB"],
            ["GPU", card["gpu"] or f"none: {card['no_gpu']}"],
            ["System", f"{card['system']}, Python {card['python']}, load average {card['load_average']}"],
            ["Versions", ", ".join(f"{name} {version}" for name, version in card["packages"].items())],
            ["Matrix ceiling", f"{flops / 1e9:.1f} GFLOP/s ({how})" if flops else how],
            ["Copy ceiling", f"{ceilings['copy']['bytes'] / 1e9:.1f} GB/s ({ceilings['copy']['how']})"],
            ["Clock", document.get("clock", "")],
        ]
        parts += ["<h2>Hardware</h2><div id=card>", table(["", ""], rows), "</div>"]
    if runs:
        parts += [_latency(runs), _throughput(runs), _stages(runs)]
    if first := document.get("first_picture"):
        parts.append(
            f"<p>First picture of a fresh process: {first['wall']:.2f} s, {first['cpu']:.2f} CPU seconds, "
            f"{first['peak_mb']:.0f} MB at the peak.</p>"
        )
    parts += [_peers(table, pictures or {}) for table in document.get("peers", []) if table.get("rows")]
    if alone := document.get("alone"):
        rows = [[name, f"{x['wall']:.2f}", f"{x['cpu']:.2f}", f"{x['peak_mb']:.0f}"] for name, x in alone.items()]
        parts.append(table(["one picture in a fresh process", "wall s", "CPU s", "peak MB"], rows))
    if document.get("load", {}).get("rows"):
        parts.append(_load(document["load"]))
    if document.get("soak", {}).get("rss_mb"):
        parts.append(_soak(document["soak"]))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n"
    )


def _latency(runs: list[dict[str, Any]]) -> str:
    columns = ["batch x steps", "p50 ms", "p90", "p99", "max", "samples"]
    names = ("p50", "p90", "p99", "max")
    rows = [[_name(r), *(f"{1e3 * r['latency'][n]:.1f}" for n in names), str(len(r["samples"]))] for r in runs]

    def draw(axes: Any) -> None:
        for i, run in enumerate(runs):
            values = [1e3 * sample["total"] for sample in run["samples"]]
            axes.plot([i] * len(values), values, "o", color=SERIES[0], alpha=0.5, markersize=4)
            axes.plot([i - 0.3, i + 0.3], [1e3 * run["latency"]["p50"]] * 2, color=SERIES[1])
        axes.set_xticks(range(len(runs)), [_name(run) for run in runs])
        axes.set_ylim(bottom=0)
        axes.set(xlabel="batch x steps", ylabel="ms", title="Latency: every sample; the line is the median")

    return f"<h2>Latency</h2>{plot(draw)}{table(columns, rows)}"


def _throughput(runs: list[dict[str, Any]]) -> str:
    columns = ["batch x steps", "pictures/s", "guided steps/s", "peak MB"]
    rows = [
        [
            _name(run),
            f"{run['pictures_per_second']:.2f}",
            f"{run['guided_steps_per_second']:.1f}",
            f"{run['memory']['peak_mb']:.0f}",
        ]
        for run in runs
    ]

    def draw(axes: Any) -> None:
        for color, steps in zip(SERIES * len(runs), dict.fromkeys(run["steps"] for run in runs), strict=False):
            some = sorted((run["batch"], run["pictures_per_second"]) for run in runs if run["steps"] == steps)
            axes.plot(*zip(*some, strict=True), "o-", color=color, label=f"{steps} steps")
        axes.set_ylim(bottom=0)
        axes.set(xlabel="batch", ylabel="pictures a second", title="Throughput against batch")
        axes.legend(frameon=False)

    return f"<h2>Throughput</h2>{plot(draw)}{table(columns, rows)}"


def _stages(runs: list[dict[str, Any]]) -> str:
    runs = [run for run in runs if run["stages"]]
    if not runs:
        return ""
    columns = ["batch x steps", *(title for _, title in STAGES), "host", "total, ms"]
    rows = [
        [
            _name(run),
            *(f"{1e3 * run['stages'].get(name, 0):.1f}" for name, _ in STAGES),
            "-" if run["host"] is None else f"{1e3 * run['host']:.1f}",
            f"{1e3 * run['total']:.1f}",
        ]
        for run in runs
    ]

    def draw(axes: Any) -> None:
        left = np.zeros(len(runs))
        for color, (name, title) in zip(SERIES, (*STAGES, ("host", "host")), strict=True):
            values = [run["host"] or 0 if name == "host" else run["stages"].get(name, 0) for run in runs]
            shares = np.array(values) / [run["total"] for run in runs]
            axes.barh(range(len(runs)), shares, left=left, color=color, label=title)
            left += shares
        axes.set_yticks(range(len(runs)), [_name(run) for run in runs])
        axes.invert_yaxis()
        axes.set(xlabel="share of the time", ylabel="batch x steps", title="Where the time goes")
        axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.15))

    return f"<h2>Stages</h2>{plot(draw)}{table(columns, rows)}"


def _peers(found: dict[str, Any], pictures: dict[str, np.ndarray]) -> str:
    run = found["run"]
    done = [row for row in found["rows"] if "skipped" not in row]
    rows, clock = [], found.get("clock", "cpu")
    for row in done:
        ratio, fidelity = row[f"ratio_{clock}"], row["fidelity"]
        psnr = "the same" if fidelity["psnr"] is None else f"{fidelity['psnr']:.1f} dB"
        rows.append(
            [
                row["name"],
                f"{1e3 * row[clock]:.0f}",
                "-" if row["step_cpu"] is None else f"{1e3 * row['step_cpu']:.1f}",
                f"{ratio['median']:.2f} ({ratio['q1']:.2f} - {ratio['q3']:.2f})",
                f"{fidelity['max_difference']} / 255, {psnr}",
            ]
        )

    def draw(axes: Any) -> None:
        for i, row in enumerate(done):
            ratio = row[f"ratio_{clock}"]
            axes.barh(i, ratio["median"], color=SERIES[0 if i == 0 else 1])
            axes.plot([ratio["q1"], ratio["q3"]], [i, i], color=INK)
        axes.set_yticks(range(len(done)), [row["name"] for row in done])
        axes.invert_yaxis()
        axes.set(xlabel=f"{CLOCKS[clock]} seconds a picture, times ours; the line spans the quartiles", title="Peers")

    shown = "".join(
        f"<figure>{_image(picture)}<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, picture in pictures.items()
    )
    skipped = "".join(
        f"<p class=note>{html.escape(row['name'])}: skipped. {html.escape(row['skipped'])}</p>"
        for row in found["rows"]
        if "skipped" in row
    )
    title = f"Peers: batch {run['batch']} x {run['steps']} steps, {run['solver']}, guidance {run['guidance']:g}"
    columns = ["", f"{CLOCKS[clock]} ms", "a step", f"{CLOCKS[clock]}, times ours", "picture differs by"]
    return f"<h2>{html.escape(title)}</h2>{plot(draw)}{table(columns, rows)}{shown}{skipped}"


def _load(load: dict[str, Any]) -> str:
    names = ("p50", "p90", "p95", "p99", "max", "mean")
    rows = [
        [row["name"], *(f"{row['latency'][n]:.2f}" for n in names), f"{row['pictures_per_second']:.3f}"]
        for row in load["rows"]
    ]

    def draw(axes: Any) -> None:
        for color, row in zip(SERIES, load["rows"], strict=False):
            values = np.sort(row["samples"])
            axes.step(values, np.arange(1, len(values) + 1) / len(values), color=color, label=row["name"], where="post")
        axes.set_xlim(left=0)
        axes.set(xlabel=f"seconds from arrival to picture ({load['clock']})", ylabel="share of requests", title="Load")
        axes.legend(frameon=False)

    said = (
        f"{load['requests']} requests of {load['steps'][0]} to {load['steps'][1]} steps at random times, "
        f"{load['arrival_rate']:.3f} a second: {load['utilisation']:.0%} of the capacity. Batch {load['batch']}."
    )
    return f"<h2>Load</h2><p>{said}</p>{plot(draw)}{table(['', *names, 'pictures/s'], rows)}"


def _soak(soak: dict[str, Any]) -> str:
    def draw(axes: Any) -> None:
        axes.plot(*zip(*soak["rss_mb"], strict=True), color=SERIES[0])
        axes.set_ylim(bottom=0)
        axes.set(xlabel="requests", ylabel="MB", title="Memory of the process")

    slope = soak.get("mb_per_1000")
    said = "" if slope is None else f"; {slope:+.2f} MB per 1000 requests"
    return f"<h2>Soak</h2><p>{soak['pictures']} pictures of {soak['requests']} requests{said}.</p>{plot(draw)}"


def _name(run: dict[str, Any]) -> str:
    return f"{run['batch']} x {run['steps']}"


def _image(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
