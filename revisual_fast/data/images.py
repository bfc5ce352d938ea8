"""Images that are opened when they are needed."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from revisual_fast.data.bad import MISSING_IMAGE, UNREADABLE_IMAGE, BadRecordError

__all__ = ["ImageRef"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class ImageRef:
    """An image that is somewhere: a file (read on demand), encoded bytes, or an image in memory."""

    content: Path | bytes | Image.Image

    @classmethod
    def of(cls, value: Any, root: Path) -> ImageRef:
        """From a path (relative to ``root``), bytes, a PIL image, or the ``{"bytes", "path"}`` that `datasets` stores.

        The file must exist and its header be that of an image. Raises :class:`BadRecordError`.
        """
        if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str | Path):
            ref = cls(_existing(str(value), root))
        elif isinstance(value, bytes | Image.Image):
            ref = cls(value)
        else:
            detail = f"expected a path, bytes or an image, found {type(value).__name__}"
            raise BadRecordError(MISSING_IMAGE if value is None else UNREADABLE_IMAGE, detail)
        ref._read_header()
        return ref

    @cached_property
    def key(self) -> str:
        """SHA-256 (hex) of the file's or the image's bytes: equal keys are equal images.

        Raises :class:`BadRecordError` if the file has gone or cannot be read.
        """
        try:
            return hashlib.sha256(self._content_bytes()).hexdigest()
        except _UNREADABLE as error:
            raise self._bad(error) from error

    def open(self) -> Image.Image:
        """The image in RGB, turned as its camera says; what is transparent becomes white.

        Raises :class:`BadRecordError` if the file has gone, or the image cannot be read or decoded.
        """
        try:
            with self._opened() as image:
                return _rgb(ImageOps.exif_transpose(image))
        except _UNREADABLE as error:
            raise self._bad(error) from error

    def _content_bytes(self) -> bytes:
        if isinstance(self.content, Image.Image):
            image = self.content
            return f"{image.mode} {image.size} ".encode() + image.tobytes()
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()

    def _opened(self) -> Image.Image:
        if isinstance(self.content, Image.Image):
            return self.content.copy()
        return Image.open(io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content)

    def _read_header(self) -> None:
        if isinstance(self.content, Image.Image):
            return
        try:
            self._opened().close()
        except _UNREADABLE as error:
            raise self._bad(error) from error

    def _bad(self, error: BaseException) -> BadRecordError:
        name = str(self.content) if isinstance(self.content, Path) else "image given as bytes"
        if isinstance(error, FileNotFoundError):
            return BadRecordError(MISSING_IMAGE, f"{error.filename or name}: the file has gone")
        # PIL's own message repeats the path or the address of a buffer
        why = "not an image that PIL knows" if isinstance(error, Image.UnidentifiedImageError) else error
        return BadRecordError(UNREADABLE_IMAGE, f"{name}: {why}")


def _existing(name: str, root: Path) -> Path:
    shown = name if len(name) <= 200 else f"{name[:200]}..."
    if _URL.match(name):
        raise BadRecordError(MISSING_IMAGE, f"{shown!r} is a URL; nothing is downloaded, give the path of a file")
    path = root / name
    if not os.path.isfile(path):  # unlike Path.is_file, false for a name that is too long to be one
        raise BadRecordError(MISSING_IMAGE, f"no file {shown!r} in {root} (image_root says where paths begin)")
    return path


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
