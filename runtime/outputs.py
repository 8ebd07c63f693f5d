"""The output folder: pictures that survive interruptions, and the contact sheet that shows them.

    with OutputFolder("out") as folder:
        todo = [request for request in requests if not folder.done(request, bundle)]
        for picture in pipeline.run(todo):
            folder.save(picture)
    # out/<id>.png, <id>.hands.npz, <id>.hands.png, <id>.json and out/index.html

A picture is done when its `<id>.json` is there, which is written last. Every file is written under a temporary name and
renamed. Whatever stops a run, finished pictures stay, and the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import html
import json
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from ..errors import OutputError, RequestError
from ..files import FULL, lock
from ..hands import hands_file
from ..schema import MisfitError, read_json
from ..skeleton import draw_skeleton
from .requests import Request, picture_key
from .results import Picture, png

INDEX = "index.html"
_LOCK = ".hd-run.lock"
_TEMPORARY = ".hd-run.tmp."  # prefix of files that are being written
_SUFFIXES = (".png", ".hands.npz", ".hands.png")
_MAX_PENDING = 64  # pictures that wait for the disk; with more, the sampler waits too


class OutputFolder:
    """A folder of pictures, locked while it is open. Threads of its own encode and write them.

    shared: another process holds the lock and lets this one write, too.
    """

    def __init__(self, path: str | Path, shared: bool = False) -> None:
        self.path, self.shared = Path(path), shared
        self.where = str(self.path)  # its name in messages
        self.saved: list[str] = []  # ids of the pictures written so far; two threads append to it
        self._pending: deque[Future[None]] = deque()
        self._lock: IO[str] | None = None
        self._made: list[Path] = []  # the folder, and those around it, where this run made them

    def __enter__(self) -> OutputFolder:
        """Makes and locks the folder, and removes unfinished files of an interrupted run.

        Raises OutputError when that fails, or when another run has the folder.
        """
        try:
            self._open()
        except OSError as error:
            raise self._refusal(error) from error
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="hd-save")
        return self

    def __exit__(self, *_: object) -> None:
        self.drain()
        self._close()

    def _open(self) -> None:
        self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        if self.shared:
            return
        self._lock = lock(self.path / _LOCK)
        for leftover in self.path.glob(_TEMPORARY + "*"):
            leftover.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._lock is None:
            return
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            if self._made and [path.name for path in self.path.iterdir()] == [_LOCK]:
                (self.path / _LOCK).unlink()  # a run that was refused leaves no trace
                for folder in self._made:
                    folder.rmdir()
        self._lock.close()  # this unlocks it

    def done(self, request: Request, bundle: str = "") -> bool:
        """Whether the folder holds this picture, complete.

        Raises RequestError when another picture has its id, or when its hands file cannot be read.
        """
        record = self._record(str(request.id))
        if record is None:
            return False
        if record["key"] != picture_key(request, bundle):
            raise RequestError(
                f"{self.where} holds another picture with the id {request.id}: its prompt, settings or bundle differ. "
                f"Give another id or another --output, or delete {request.id}.json to make it again."
            )
        return True

    def _record(self, id: str) -> dict[str, Any] | None:
        return _read_record(self.path / f"{id}.json")

    def save(self, picture: Picture) -> None:
        """Writes the files of a picture in the background. Raises OutputError when an earlier write failed."""
        self._pending.append(self._pool.submit(self._save, picture))
        while self._pending and (self._pending[0].done() or len(self._pending) > _MAX_PENDING):
            self._pending.popleft().result()

    def flush(self) -> None:
        """Waits until everything is written. Raises OutputError when a write failed."""
        pending, self._pending = self._pending, deque()
        wait(pending)
        for future in pending:
            future.result()

    def drain(self) -> None:
        """Waits for writes that are under way, after Ctrl-C or an error, and takes no more."""
        self._pool.shutdown(wait=True)

    def _save(self, picture: Picture) -> None:
        record = json.dumps(_record(picture), indent=1, ensure_ascii=False) + "\n"
        hands = picture.hands
        skeleton = draw_skeleton(picture.image, hands["joints_2d"], hands["visibility"])
        contents = {
            ".png": png(picture.image, picture),
            ".hands.npz": hands_file(hands, picture.request.prompt),
            ".hands.png": png(skeleton, picture),
            ".json": record.encode(),
        }
        self._write({picture.id + suffix: content for suffix, content in contents.items()})
        self.saved.append(picture.id)

    def _write(self, files: dict[str, bytes]) -> None:
        """Writes all files under temporary names, then renames them in order. On failure it removes the temporary
        ones."""
        temporaries = [self.path / (_TEMPORARY + name) for name in files]
        try:
            for temporary, content in zip(temporaries, files.values(), strict=True):
                temporary.write_bytes(content)
            for temporary, name in zip(temporaries, files, strict=True):
                temporary.replace(self.path / name)
        except OSError as error:
            for temporary in temporaries:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
            raise self._refusal(error) from error

    def write_index(self) -> Path:
        """Rebuilds `index.html` from every picture in the folder, and returns its path."""
        records = []
        whole = (path for path in self.path.glob("*.json") if not path.name.startswith(_TEMPORARY))
        for path in sorted(whole, key=lambda path: (path.stat().st_mtime_ns, path.name)):
            record = _read_record(path)
            if record is not None:
                records.append({**record, "id": path.stem})
        self._write({INDEX: contact_sheet(records).encode()})
        return self.path / INDEX

    def _refusal(self, error: OSError) -> OutputError:
        if error.errno in FULL:
            return OutputError(
                f"The disk of {self.where} is full. The finished pictures are kept. Free some space and run the same "
                "command again: it goes on from there."
            )
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            return OutputError(f"--output must be a folder, got {self.where}, where a file is. Name another folder.")
        if isinstance(error, BlockingIOError):
            return OutputError(
                f"Another hd-run is writing into {self.where} ({error.strerror}). Wait for it, or name another folder "
                "with --output."
            )
        return OutputError(
            f"{self.where} cannot be written: {error.strerror or error}. Name another folder with --output."
        )


def contact_sheet(records: list[dict[str, Any]]) -> str:
    """HTML of one page that shows every picture beside its skeleton. It needs only the folder that it is in."""
    figures = "\n".join(_figure(record) for record in records)
    count = f"{len(records)} picture{'s' * (len(records) != 1)}"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>HanDiffuser: {count}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 14px/1.45 system-ui, sans-serif; margin: 2rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(532px, 100%), 1fr)); gap: 2rem; }}
figure {{ margin: 0; }}
.pair {{ display: flex; gap: 4px; }}
.pair a {{ flex: 1; min-width: 0; max-width: 512px; }}
img {{ width: 100%; display: block; border-radius: 4px; background: #8883; }}
.small {{ image-rendering: pixelated; }}
figcaption {{ overflow-wrap: anywhere; margin-top: .4rem; }}
.settings {{ opacity: .7; font-size: 12px; }}
</style>
<h1>{count}</h1>
<main>
{figures}
</main>
</html>
"""


def _figure(record: dict[str, Any]) -> str:
    def text(name: str) -> str:
        return html.escape(str(record.get(name, "")))

    name = quote(record["id"])
    width = record.get("width")
    small = ' class="small"' if isinstance(width, int) and width < 256 else ""
    settings = [
        f"seed {text('seed')}",
        f"{text('steps')} steps of {text('solver')}",
        f"guidance {text('guidance')}",
    ]
    if record.get("negative_prompt"):
        settings.append(f"not: {text('negative_prompt')}")
    if record.get("hands"):
        settings.append(f"hands from {text('hands')}")
    if record.get("image"):
        part = "a part of " if record.get("mask") else ""
        settings.append(f"{part}{text('image')} painted again, strength {text('strength')}")
    settings.append(f'<a href="{name}.hands.npz">hands</a>')
    warnings = record.get("warnings")
    for warning in warnings if isinstance(warnings, list) else []:
        settings.append(html.escape(str(warning)))
    return f"""<figure>
<div class="pair"><a href="{name}.png"><img src="{name}.png"{small} loading="lazy" alt="{text("prompt")}"></a>
<a href="{name}.hands.png"><img src="{name}.hands.png" loading="lazy" alt="skeleton of the hands"></a></div>
<figcaption>{text("prompt")}<div class="settings">{" · ".join(settings)}</div></figcaption>
</figure>"""


def _record(picture: Picture) -> dict[str, Any]:
    """The content of `<id>.json`."""
    height, width = picture.image.shape[:2]
    bundle = picture.made_by.get("bundle", "")
    return {
        **picture.request.said(picture.adapters),
        "id": picture.id,
        "key": picture_key(picture.request, bundle, picture.adapters),
        "width": width,
        "height": height,
        "seconds": round(picture.seconds, 4),
        "warnings": picture.warnings,
        "hand_draws": picture.hand_draws,
        "made_by": picture.made_by,
        "files": [picture.id + suffix for suffix in _SUFFIXES],
    }


def _read_record(path: Path) -> dict[str, Any] | None:
    """The record of a picture, or None where it is missing or incomplete."""
    try:
        record = read_json(path)
    except (OSError, MisfitError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("key"), str):
        return None
    complete = all((path.parent / (path.stem + suffix)).is_file() for suffix in _SUFFIXES)
    return record if complete else None
