"""The file that a model was loaded from, as far as clients may know it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

HEAD_BYTES = 1 << 20
"""Bytes of the file that its digest depends on. To read gigabytes would take longer than to load the model."""

_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model file."""

    name: str
    """Without its directory, which is nobody's business."""
    size: int
    """Bytes, of all parts if the model is split into several files."""
    modified_ns: int
    """When it was last changed, in nanoseconds since 1970."""
    digest: str
    """64 hex digits, the same as long as the file is. Not a digest of its contents: it is made of the path, the size,
    the time of the last change, and the first MiB."""

    @classmethod
    def read(cls, path: Path) -> ModelFile:
        """The file at `path`. Raises OSError if it cannot be read."""
        path = path.absolute()
        status = path.stat()
        parts = path.parent.glob(_PART.sub("-*-of-*", path.name)) if _PART.search(path.name) else (path,)
        size = sum(part.stat().st_size for part in parts)
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        digest = sha256(f"{path}\0{size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape") + head)
        return cls(path.name, size, status.st_mtime_ns, digest.hexdigest())
