"""A decoded picture: RGB pixels, and a digest to compare them by."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Pixels:
    """A picture of `width` times `height` pixels.

    Two are equal if their digests are. Raises `ValueError` if `data` does not have the length that the size asks for.
    """

    width: int = field(compare=False)
    height: int = field(compare=False)
    data: bytes = field(compare=False, repr=False)
    """Three bytes (R, G, B) for each pixel, rows from top to bottom."""
    digest: bytes = field(init=False)
    """A BLAKE2b digest of 32 bytes over the size and the data."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1 or len(self.data) != 3 * self.width * self.height:
            raise ValueError(f"{len(self.data)} bytes are not {self.width} x {self.height} pixels")
        digest = hashlib.blake2b(struct.pack("<QQ", self.width, self.height), digest_size=32)
        digest.update(self.data)
        object.__setattr__(self, "digest", digest.digest())
