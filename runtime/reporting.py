"""The messages of `hd-run` while it works, all on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..engines.adapted import adapted_bundle, chosen, sentences
from .loading import check_merges, takes_adapters
from .outputs import OutputFolder

if TYPE_CHECKING:
    from rich.progress import Progress

MAX_WARNINGS = 20  # about pictures
SECONDS_A_LINE = 5.0  # in a log, which has no live bar


class Reporter:
    """A live bar on a terminal, plain lines in a log, only warnings and errors with --quiet."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.said: set[str] = set()

    def problem(self, sentence: str) -> None:
        line(sentence, "hd-run:", "red")

    def note(self, sentence: str) -> None:
        """Something that the user did not ask for and needs to know; --quiet hides it."""
        if not self.quiet:
            line(sentence, "hd-run:")

    def warning(self, sentence: str) -> None:
        line(sentence, "hd-run: warning:", "yellow")

    def warning_of(self, picture: str, sentence: str) -> None:
        """Shows a warning about a picture, each sentence once, and at most MAX_WARNINGS of them."""
        if sentence in self.said or len(self.said) > MAX_WARNINGS:
            return
        self.said.add(sentence)
        if len(self.said) > MAX_WARNINGS:
            self.warning("There are more warnings of pictures. See the ID.json of each.")
        else:
            self.warning(f"{picture}: {sentence}")

    def progress(self, total: int, what: str = "making hands") -> ProgressReport:
        return ProgressReport(total, self.quiet, what)

    def merge(self, bundle: Path, lora: Sequence[str], backend: str, device: str) -> None:
        """Merges adapters into a bundle in the user's cache, with a bar, and then says what they change.

        Plans that can be refitted get them as they are loaded, without a merge.
        Raises as `loading.check_merges` and `adapted.adapted_bundle` do.
        """
        adapters = chosen(lora)
        check_merges(backend, adapters)
        if not adapters:
            return
        if not takes_adapters(bundle, backend, device):
            with self.progress(0, "merging adapters") as progress:
                adapted_bundle(bundle, adapters, progress.part)
        for sentence in sentences(adapters, bundle):
            self.note(sentence)

    def summary(
        self, folder: OutputFolder, index: str, seconds: float, skipped: int, refused: int, failed: int
    ) -> None:
        if self.quiet:
            return
        done = len(folder.saved)
        counts = [f"{done} picture{'s' * (done != 1)} in {seconds:.1f} s"]
        for count, what in ((skipped, "skipped (done before)"), (refused, "refused"), (failed, "failed")):
            if count:
                counts.append(f"{count} {what}")
        there = done or skipped
        line(f"{', '.join(counts)}." + f" They are in {folder.where}" * bool(there))
        if index and there:
            line(f"See them all: {index}")


def line(sentence: str, head: str = "", color: str | None = None) -> None:
    """Prints a line on stderr. head: its beginning, in this colour on a terminal."""
    plain = False if os.environ.get("NO_COLOR") else None
    click.echo(f"{click.style(head, fg=color)} {sentence}" if head else sentence, err=True, color=plain)


class ProgressReport:
    """Shows how many of the pictures are done, and steps a second."""

    def __init__(self, total: int, quiet: bool, what: str) -> None:
        """total: all pictures; `picture` takes off those that are skipped or refused. what: is done first."""
        self.what = what
        self.quiet, self.live = quiet, not quiet and sys.stderr.isatty()
        self.total, self.pictures, self.steps = total, 0, 0
        self.ready = 0  # engines
        self.started = self.printed = time.perf_counter()
        self.bar = live_bar() if self.live else None

    def __enter__(self) -> ProgressReport:
        if self.bar is not None:
            self.bar.start()
            self.bar.add_task(self.what, total=self.total or None, rate="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, **what: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], **what)

    @property
    def rate(self) -> str:
        return f"{self.steps / max(time.perf_counter() - self.started, 1e-9):.1f} it/s"

    def part(self, done: int, total: int) -> None:
        """Shows that so many weights of all are merged."""
        self.update(completed=done, total=total)
        if not self.live and not self.quiet and time.perf_counter() - self.printed > SECONDS_A_LINE:
            self.printed = time.perf_counter()
            line(f"{self.what}: {done} of {total} weights", "hd-run:")

    def event(self, kind: str, count: int) -> None:
        """See `results.OnEvent`."""
        if kind == "warm-up":
            self.ready += count
            self.update(description=f"engines made ready: {self.ready}")
        if kind == "steps":
            self.steps += count
            self.update(description="pictures", rate=self.rate)

    def picture(self, left_out: int) -> None:
        """One more picture is done. left_out: how many were skipped or refused so far."""
        self.pictures += 1
        total = max(self.total - left_out, self.pictures)
        self.update(completed=self.pictures, total=total)
        now = time.perf_counter()
        if not self.live and not self.quiet and (now - self.printed > SECONDS_A_LINE or self.pictures == total):
            self.printed = now
            line(f"{self.pictures} of {total} pictures, {self.rate}")


def live_bar() -> Progress:
    # Imported here: it takes a twentieth of a second, and a log does not need it.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False, soft_wrap=True),
        transient=True,
    )
