"""Bodies that bring pictures: `multipart/form-data`, read in memory.

    files, fields = await read_form(http, ("image", "mask"))
    picture = Upload.read("image", files["image"][0], limits.pixels)

No file is written: the names that a client gives to its files are not even read. A picture's format and its number of
pixels are known from its header, before anything is decoded.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NoReturn

import numpy as np
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ..errors import RequestError
from ..pictures import decode_mask, kind_of
from ..repair.files import Original
from ..schema import MisfitError
from .service import UnfinishedError

FORMATS = ("PNG", "JPEG", "WEBP", "MPO")  # the last is a telephone's JPEG with more behind it
MAX_FILES, MAX_FIELDS = 17, 64  # of a form
MAX_FIELD = 1 << 20  # bytes of a field that is text
Files = dict[str, list[bytes]]


class _InMemory(MultiPartParser):
    spool_max_size = 1 << 40  # bytes from which Starlette writes a file to the disk; `Guard` limits the body


async def read_form(http: Http, names: tuple[str, ...]) -> tuple[Files, dict[str, str]]:
    """The files of a form, and its text. names: of the files; `name[]` counts as `name`. Raises RequestError, and
    UnfinishedError where the server's environment is older than forms."""
    if find_spec("python_multipart") is None:
        raise UnfinishedError(
            'This server reads no forms: python-multipart is missing. Install it: pip install "handiffuser[serve]"', 501
        )
    parser = _InMemory(http.headers, http.stream(), max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD)
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError) as error:
        why = str(getattr(error, "message", error)).rstrip(".")
        raise RequestError(
            f"The body must be a form as multipart/form-data, got one that is damaged: {why}.", code="invalid_form"
        ) from None
    files: Files = {}
    fields: dict[str, str] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if isinstance(value, UploadFile):
            if name not in names:
                raise RequestError(f"The file {name[:60]!r} is unknown. Send {' and '.join(names)}.", name[:60])
            files.setdefault(name, []).append(await value.read())
        elif name in names:
            raise RequestError(f"{name} must be a file, got text. Send it as curl does with -F {name}=@FILE.", name)
        elif name in fields:
            raise RequestError(f"{name[:60]} must be given once. Leave the others out.", name[:60])
        else:
            fields[name] = value
    return files, fields


def fit_fields(kind: type[BaseModel], fields: dict[str, str], nested: tuple[str, ...]) -> Any:
    """The text of a form as a body of its kind. nested: fields whose text is JSON. An empty field counts as a missing
    one. Raises RequestValidationError and RequestError."""
    values: dict[str, Any] = {name: text for name, text in fields.items() if text}
    for name in {*nested} & {*values}:
        if fields[name].lstrip()[:1] in ("{", "["):
            try:
                values[name] = json.loads(fields[name], parse_constant=_refuse)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{name} must be JSON: {str(error)[:100].rstrip('.')}.", name) from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


@dataclass
class Upload:
    """A picture of a form. original: what its file holds. pixels: uint8 [H, W, 3], upright, on white where it is
    transparent. hole: uint8 [H, W] of its own transparency, 255 where it is transparent, or None."""

    original: Original = field(repr=False)
    pixels: np.ndarray = field(repr=False)
    hole: np.ndarray | None = field(default=None, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.pixels.shape[0], self.pixels.shape[1]

    @classmethod
    def read(cls, name: str, content: bytes, most: int) -> Upload:
        """name: of its field. most: pixels that it may have. Raises RequestError. Runs in a thread."""
        checked(name, content, most)
        try:
            original = Original.of(content)
        except MisfitError as error:
            raise refused(name, error) from None
        alpha = original.alpha
        if alpha is None or (alpha == 255).all():
            return cls(original, original.image)
        return cls(original, original.shown, 255 - alpha)


def mask_of(content: bytes, size: tuple[int, int], most: int, opaque: bool = False) -> np.ndarray:
    """A mask of the size (height, width) of its image: uint8 [H, W], 255 where to paint. opaque: see `decode_mask`.
    Raises RequestError."""
    checked("mask", content, most)
    try:
        mask = decode_mask(content, opaque)
    except MisfitError as error:
        raise refused("mask", error) from None
    if mask.shape != size:
        raise RequestError(
            f"mask must have the size of its image, {size[1]}x{size[0]}, got {mask.shape[1]}x{mask.shape[0]}. Draw it "
            "over the image.",
            "mask",
        )
    return mask


def checked(name: str, content: bytes, most: int) -> None:
    """Raises RequestError for another format, and for a picture that would take too much memory once it is decoded."""
    try:
        kind_of(content)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:  # the header alone
            width, height = image.size
    except MisfitError as error:
        raise refused(name, error) from None
    except Image.DecompressionBombError:
        raise RequestError(f"{name} must have at most {most / 1e6:g} million pixels, got many more.", name) from None
    except Exception as error:  # Pillow raises many kinds
        raise refused(name, MisfitError(f"Its picture cannot be decoded: {str(error)[:100].rstrip('.')}.")) from None
    if width * height > most:
        raise RequestError(
            f"{name} must have at most {most / 1e6:g} million pixels, got {width}x{height}. Make it smaller.", name
        )


def refused(name: str, error: MisfitError) -> RequestError:
    said = str(error).replace("Its picture cannot", f"The {name} cannot", 1).replace("Its picture", name, 1)
    return RequestError(f"{said} Give a PNG, JPEG or WebP file." if "decoded" in said else said, name)
