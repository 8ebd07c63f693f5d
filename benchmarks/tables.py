"""The document's figures as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

STAGES = (
    ("text_encoder", "text"),
    ("hand_prior", "hand prior"),
    ("hand_features", "kinematics"),
    ("text_hand_encoder", "text+hand"),
    ("unet_context", "context"),
    ("unet_time", "time"),
    ("unet", "UNet"),
    ("image_decoder", "decoder"),
)


CLOCKS = {"cpu": "CPU", "wall": "wall"}  # of the peers, in a table's words
# The processor features that decide its figures.
TOLD = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "i8mm")


class Tables:
    """Prints on stdout. Lines are not wrapped and tables keep their width, because a log may be narrow."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True, markup=False)
        if not self.console.is_terminal:
            self.console.width = 160

        self.cpu = ""  # in every table's caption: figures without their machine mislead

    def line(self, text: str = "") -> None:
        self.console.print(text)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left", title_style="bold", caption=self.cpu or None)
        table.caption_justify, table.caption_style = "left", ""
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.line()
        self.console.print(table, soft_wrap=False)

    def card(self, card: dict[str, Any]) -> None:
        features = card.get("cpu_features", [])
        told = [name for name in TOLD if name in features]
        self.cpu = f"{card['cpu']} ({', '.join(told)})" if told else card["cpu"]
        self.line(f"CPU      {self.cpu}, {card['cores']} cores, {card['threads']} threads used, {card['memory_gb']} GB")
        if card["gpu"]:
            self.line(
                f"GPU      {card['gpu']}, compute capability {card['compute_capability']}, {card['gpu_memory_gb']} GB, "
                f"driver {card['driver'] or '(version unknown)'} for CUDA {card['driver_cuda']}"
            )
        else:
            self.line(f"GPU      none: {card['no_gpu']}")
        self.line(f"System   {card['system']}, Python {card['python']}, load average {card['load_average']}")
        self.line("Versions " + ", ".join(f"{name} {version}" for name, version in card["packages"].items()))
        matmul, copy = card["ceilings"]["matmul"], card["ceilings"]["copy"]
        flops = f"{matmul['flops'] / 1e9:.1f} GFLOP/s" if matmul["flops"] else "unknown"
        self.line(f"Ceilings {flops} ({matmul['how']}); {copy['bytes'] / 1e9:.1f} GB/s ({copy['how']})")

    def ceiling(self, matmul: dict[str, Any]) -> None:
        self.line(f"         {matmul['flops'] / 1e9:.1f} GFLOP/s ({matmul['how']}), the ceiling of this bundle")

    def runs(self, runs: list[dict[str, Any]], clock: str) -> None:
        if not runs:
            return
        first = runs[0]
        rows = []
        for run in runs:
            latency, flops = run["latency"], run.get("flops", {})
            rows.append(
                [
                    f"{run['batch']} x {run['steps']}",
                    *(f"{1e3 * latency[name]:.1f}" for name in ("p50", "p90", "p99", "max")),
                    f"{1e3 * run['cpu_seconds']:.1f}",
                    f"{run['pictures_per_second']:.2f}",
                    f"{run['guided_steps_per_second']:.1f}",
                    _percent(flops.get("of_ceiling")),
                    _percent(flops.get("unet_of_ceiling")),
                    f"{run['memory']['peak_mb']:.0f}",
                    f"{run['memory'].get('device_mb', 0):.0f}" if "device_mb" in run["memory"] else "-",
                ]
            )
        title = (
            f"{first['solver']}, guidance {first['guidance']:g}; {len(first['samples'])} samples after "
            f"{first['warm_up']} to warm up; milliseconds of a whole batch, {clock}"
        )
        columns = ["batch x steps", "p50", "p90", "p99", "max", "CPU", "pictures/s", "steps/s"]
        self.table(title, [*columns, "of ceiling", "UNet of it", "peak MB", "GPU MB"], rows)

    def stages(self, runs: list[dict[str, Any]]) -> None:
        rows = []
        for run in runs:
            if not run["stages"]:
                continue
            total = run["total"]
            rows.append([f"{run['batch']} x {run['steps']}"])
            rows[-1] += [f"{1e3 * run['stages'].get(name, 0):.1f}" for name, _ in STAGES]
            rows[-1].append("-" if run["host"] is None else f"{1e3 * run['host']:.1f} ({run['host'] / total:.1%})")
            rows[-1] += [f"{1e3 * total:.1f}", f"{1e3 * run['unet_step']:.2f}", f"{1e3 * run['png']:.1f}"]
        if rows:
            columns = [
                "batch x steps",
                *(title for _, title in STAGES),
                "host",
                "total",
                "UNet a step",
                "PNG a picture",
            ]
            self.table("Where the time goes: milliseconds of the median sample", columns, rows)

    def first_picture(self, first: dict[str, Any]) -> None:
        self.line()
        self.line(
            f"First picture of a fresh hd-run: {first['wall']:.2f} s, {first['cpu']:.2f} CPU seconds, "
            f"{first['peak_mb']:.0f} MB at the peak (medians of {len(first['samples'])})"
        )

    def peers(self, table: dict[str, Any]) -> None:
        """Prints a comparison, unless it ended before its first round."""
        if not any("samples" in row for row in table.get("rows", [])):
            return
        rows, clock = [], table.get("clock", "cpu")
        for row in table["rows"]:
            if "skipped" in row:
                continue
            rows.append(
                [
                    row["name"],
                    f"{1e3 * row['wall']:.0f}",
                    f"{1e3 * row['cpu']:.0f}",
                    "-" if row["step_cpu"] is None else f"{1e3 * row['step_cpu']:.1f}",
                    _spread(row[f"ratio_{clock}"]),
                    _spread(row["ratio_step_cpu"]),
                    f"{row['fidelity']['max_difference']} / 255",
                    "the same" if row["fidelity"]["psnr"] is None else f"{row['fidelity']['psnr']:.1f} dB",
                ]
            )
        run = table["run"]
        title = (
            f"Peers: batch {run['batch']} x {run['steps']} steps, {run['solver']}, guidance {run['guidance']:g}, "
            f"{table['threads']} threads; milliseconds, medians of {table['repeats']} in alternation"
        )
        columns = [
            "",
            "wall",
            "CPU",
            "CPU a step",
            f"{CLOCKS[clock]}, times ours",
            "a step, times ours",
            "largest difference",
            "PSNR",
        ]
        self.table(title, columns, rows)
        for row in table["rows"]:
            if "skipped" in row:
                self.line(f"{row['name']}: skipped. {row['skipped']}")

    def alone(self, alone: dict[str, Any]) -> None:
        columns = ["one picture", "wall s", "CPU s", "peak MB"]
        rows = [[name, f"{x['wall']:.2f}", f"{x['cpu']:.2f}", f"{x['peak_mb']:.0f}"] for name, x in alone.items()]
        self.table("A picture from the start of a process to its end", columns, rows)

    def load(self, load: dict[str, Any]) -> None:
        rows = []
        base = load["rows"][0]["latency"]["p95"] if load["rows"] else None
        for row in load["rows"]:
            latency = row["latency"]
            rows.append(
                [row["name"], *(f"{latency[name]:.2f}" for name in ("p50", "p90", "p95", "p99", "max", "mean"))]
            )
            rows[-1] += [f"{row['pictures_per_second']:.3f}", f"{base / latency['p95']:.2f}" if base else "-"]
        steps = load["steps"]
        title = (
            f"Load: {load['requests']} requests of {steps[0]} to {steps[1]} steps, batch {load['batch']}, "
            f"{load['arrival_rate']:.3f} a second, which is {load['utilisation']:.0%} of the capacity "
            f"({load['capacity']:.3f} a second); seconds, {load['clock']}"
        )
        columns = ["", "p50", "p90", "p95", "p99", "max", "mean", "pictures/s", "in-flight's p95 to its own"]
        self.table(title, columns, rows)
        if len(load.get("runs", [])) > 1:
            figures = ("p50", "p95", "pictures_per_second", "p95_ratio")
            several = [[row["name"], *(_interval(row[name]) for name in figures)] for row in load["over_runs"]]
            title = f"The same over {len(load['runs'])} runs with other requests: means and 95 % intervals"
            self.table(title, ["", "p50", "p95", "pictures/s", "in-flight's p95 to its own"], several)

    def serve(self, serve: dict[str, Any]) -> None:
        """Over HTTP: throughput by round, then waiting times by share of the capacity."""
        at_once = [row for row in serve["rows"] if "round" in row]
        names = list(dict.fromkeys(row["name"] for row in at_once))
        found = {name: [row["pictures_per_second"] for row in at_once if row["name"] == name] for name in names}
        least, most = serve["steps"]
        self.table(
            f"{serve['requests']} requests of {least} to {most} steps at once, pictures a second",
            ["", *(f"round {i + 1}" for i in range(max(map(len, found.values()), default=0)))],
            [[name, *(f"{rate:.3f}" for rate in rates)] for name, rates in found.items()],
        )
        cpu = {name: [row["cpu_seconds_per_picture"] for row in at_once if row["name"] == name] for name in names}
        self.table(
            "CPU seconds a picture of the same",
            ["", *(f"round {i + 1}" for i in range(max(map(len, cpu.values()), default=0)))],
            [[name, *(f"{seconds:.3f}" for seconds in each)] for name, each in cpu.items()],
        )
        rows = [row for row in serve["rows"] if "share" in row]
        if rows:
            self.table(
                "The same at random times, by share of the bare loop's capacity",
                ["", "share", "p50", "p95", "p99", "pictures a second"],
                [
                    [row["name"], f"{row['share']:.0%}", *(f"{row['latency'][p]:.2f} s" for p in ("p50", "p95", "p99")),
                     f"{row['pictures_per_second']:.3f}"]
                    for row in rows
                ],
            )  # fmt: skip

    def soak(self, soak: dict[str, Any]) -> None:
        slope, memory = soak.get("mb_per_1000"), soak["rss_mb"]
        lost = soak.get("lost", "an unknown number of")
        self.line()
        self.line(
            f"Soak: {soak['pictures']} pictures of {soak['requests']} requests, {lost} lost, each id once; "
            + (f"memory {memory[0][1]:.0f} MB at first, {memory[-1][1]:.0f} MB at last, " if memory else "")
            + ("too few samples for a slope" if slope is None else f"{slope:+.2f} MB per 1000 requests")
        )


def _spread(ratio: dict[str, float] | None) -> str:
    """Median and quartiles."""
    return "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['q1']:.2f} - {ratio['q3']:.2f})"


def _interval(value: dict[str, float | None]) -> str:
    return f"{value['mean']:.3f}" + ("" if value["half"] is None else f" ± {value['half']:.3f}")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
