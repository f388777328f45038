"""GGUF: checks the header of a model file before native code trusts it.

llama.cpp reports most damage as an error. For some it aborts the process, such as for a block count out of range or a
repeated entry of the vocabulary, and some it does not notice. This module reads only the header, in a fraction of a
second, and says what is wrong with it. The format is described in ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import struct
from dataclasses import dataclass, field
from os import PathLike
from typing import Final, TypeAlias

from trio_runner.errors import LoadError
from trio_runner.llama.ggml_types import GGML_TYPES

MAX_KEYS: Final = 65_536
MAX_TENSORS: Final = 100_000
MAX_STRING_BYTES: Final = 16 << 20
MAX_ARRAY_LENGTH: Final = 4_000_000
MAX_NAME_BYTES: Final = 64  # ggml's own bound, including the terminating NUL
MAX_DIMENSIONS: Final = 4
MAX_TEMPLATE_CHARACTERS: Final = 1 << 20
MAX_BLOCKS: Final = 512
SHORT_ARRAY_LENGTH: Final = 64
"""Length up to which the values of an array are kept."""

ADAPTER_TYPE: Final = "adapter"
"""The `general.type` of an adapter's file."""
PROJECTOR_ARCHITECTURE: Final = "clip"
"""The `general.architecture` of every projector's file, whatever kind of projector it is."""

_DEFAULT_ALIGNMENT: Final = 32
_STRING: Final = 8
_ARRAY: Final = 9
_BOOL: Final = 7
_NUMBERS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array of the metadata. `values` is None if it is longer than `SHORT_ARRAY_LENGTH`.

    `type` is a code of the struct module, or "s" for strings.
    """

    type: str
    length: int
    values: tuple[object, ...] | None = None


GgufValue: TypeAlias = "bool | int | float | str | GgufArray"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor in a file. `type` is ggml's name of its type, and `offset` its first byte in the file."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of a file."""

    version: int
    file_size: int
    metadata: dict[str, GgufValue] = field(default_factory=dict)
    tensors: tuple[GgufTensor, ...] = ()

    @property
    def architecture(self) -> str:
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else ""

    @property
    def name(self) -> str | None:
        value = self.metadata.get("general.name")
        return value if isinstance(value, str) and value else None

    @property
    def n_params(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.n_bytes for tensor in self.tensors)


def check_gguf(path: str | PathLike[str], *, part: int = 0) -> GgufHeader:
    """Read and check the header of the model, adapter or projector file at `path`. Reads no weights.

    With `part` above 0 the file must be that part of a model in several files, counted from 0. Only the first part has
    the values of the model, so they are checked there.

    Raises `LoadError` if the file is not a regular file, not GGUF, damaged or cut short, or if it has values that
    llama.cpp would abort on.
    """
    name = os.fspath(path)
    try:
        # Checked before it is opened: opening a pipe would wait for a writer.
        status = os.stat(name)
        if not stat.S_ISREG(status.st_mode):
            raise LoadError("not a regular file", path=name)
        if status.st_size == 0:
            raise LoadError("the file is empty", path=name)
        with open(name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _Reader(data).read_header()
                if part:
                    _check_part(header, part)
                else:
                    _check_values(header)
            except _Damaged as damage:
                raise LoadError(str(damage), path=name) from None
    except FileNotFoundError:
        raise LoadError("no such file", path=name) from None
    except (OSError, ValueError) as failure:
        raise LoadError(f"cannot be read: {failure}", path=name) from failure
    return header


def check_parts(path: str, header: GgufHeader) -> list[str]:
    """Check the other files of a model whose first file is at `path` and has `header`.

    Returns the paths of all files of the model, `path` first. Raises `LoadError` that names the file at fault.
    """
    n_parts = header.metadata.get("split.count", 1)
    if not isinstance(n_parts, int) or n_parts <= 1:
        return [path]
    end = f"-00001-of-{n_parts:05}.gguf"
    if not path.endswith(end):  # llama.cpp makes the names of the other files from it
        raise LoadError(f"the first of {n_parts} files of a model must have a name that ends in {end}", path=path)
    prefix = path.removesuffix(end)
    paths = [path]
    for part in range(1, n_parts):
        paths.append(f"{prefix}-{part + 1:05}-of-{n_parts:05}.gguf")
        check_gguf(paths[-1], part=part)
    return paths


class _Damaged(Exception):
    """The message says what is wrong with the file, in words that follow its name."""


class _Reader:
    """Reads a file from its beginning, and never beyond its end. Raises `_Damaged`."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._at = 0

    def _number(self, code: str) -> int | float | bool:
        end = self._at + struct.calcsize("<" + code)
        if end > self._size:
            raise _Damaged(f"cut short: the header goes on after the file's {self._size} bytes")
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at = end
        return value  # type: ignore[no-any-return]

    def _integer(self, code: str) -> int:
        return int(self._number(code))

    def _bytes(self, what: str) -> bytes:
        length = self._integer("Q")
        if length > MAX_STRING_BYTES or length > self._size - self._at:
            raise _Damaged(f"damaged: {what} has {length} bytes where {self._size - self._at} are left")
        begin, self._at = self._at, self._at + length
        return self._data[begin : self._at]

    def _text(self, what: str) -> str:
        return self._bytes(what).decode(errors="replace")

    def read_header(self) -> GgufHeader:
        magic = self._data[:4]
        if magic != b"GGUF":
            raise _Damaged(f"not a GGUF file: it begins with {magic!r}")
        self._at = 4
        version = self._integer("I")
        if version & 0xFFFF == 0 and version:
            raise _Damaged("a big-endian GGUF file, which is not supported")
        if version not in (2, 3):
            raise _Damaged(f"GGUF version {version} is not supported, only 2 and 3")
        n_tensors, n_keys = self._integer("Q"), self._integer("Q")
        if n_keys > MAX_KEYS or n_tensors > MAX_TENSORS:
            raise _Damaged(f"damaged: it claims {n_keys} keys and {n_tensors} tensors")
        metadata: dict[str, GgufValue] = {}
        for _ in range(n_keys):
            key = self._text("a key")
            if key in metadata:
                raise _Damaged(f"damaged: the key {key} appears twice")
            metadata[key] = self._value(key, self._integer("I"))
        tensors = self._tensors(n_tensors, _alignment(metadata))
        return GgufHeader(version, self._size, metadata, tensors)

    def _value(self, key: str, kind: int) -> GgufValue:
        if kind == _STRING:
            return self._text(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind == _BOOL:
            return self._integer("B") != 0
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        raise _Damaged(f"damaged: {key} is of the unknown type {kind}")

    def _array(self, key: str) -> GgufArray:
        kind, length = self._integer("I"), self._integer("Q")
        if length > MAX_ARRAY_LENGTH:
            raise _Damaged(f"damaged: {key} claims {length} elements")
        if kind == _STRING:
            return self._string_array(key, length)
        if kind not in _NUMBERS:
            raise _Damaged(f"damaged: {key} is an array of the unknown type {kind}")
        code = "B" if kind == _BOOL else _NUMBERS[kind]
        n_bytes = length * struct.calcsize("<" + code)
        if n_bytes > self._size - self._at:
            raise _Damaged(f"damaged: {key} has {n_bytes} bytes where {self._size - self._at} are left")
        begin, self._at = self._at, self._at + n_bytes
        short = length <= SHORT_ARRAY_LENGTH
        return GgufArray(code, length, struct.unpack_from(f"<{length}{code}", self._data, begin) if short else None)

    def _string_array(self, key: str, length: int) -> GgufArray:
        # A vocabulary has a hundred thousand strings, so this loop uses local names only.
        data, at, size, unpack = self._data, self._at, self._size, struct.Struct("<Q").unpack_from
        want = key == "tokenizer.ggml.tokens" or length <= SHORT_ARRAY_LENGTH
        strings: list[bytes] = []
        for _ in range(length):
            if at + 8 > size:
                raise _Damaged(f"cut short: {key} goes on after the file's {size} bytes")
            (n_bytes,) = unpack(data, at)
            at += 8
            if n_bytes > MAX_STRING_BYTES or n_bytes > size - at:
                raise _Damaged(f"damaged: an element of {key} has {n_bytes} bytes where {size - at} are left")
            if want:
                strings.append(data[at : at + n_bytes])
            at += n_bytes
        self._at = at
        if key == "tokenizer.ggml.tokens":
            named = [text for text in strings if text]  # llama.cpp makes up names for empty ones
            if len(set(named)) != len(named):
                raise _Damaged("damaged: the vocabulary has the same token twice")
        short = length <= SHORT_ARRAY_LENGTH
        return GgufArray("s", length, tuple(text.decode(errors="replace") for text in strings) if short else None)

    def _tensors(self, n_tensors: int, alignment: int) -> tuple[GgufTensor, ...]:
        raw: list[tuple[str, tuple[int, ...], str, int, int]] = []
        names: set[str] = set()
        for _ in range(n_tensors):
            name = self._text("a tensor's name")
            if len(name.encode()) >= MAX_NAME_BYTES:
                raise _Damaged(f"damaged: the tensor name {name[:80]!r} is too long")
            if name in names:
                raise _Damaged(f"damaged: the tensor {name} appears twice")
            names.add(name)
            n_dimensions = self._integer("I")
            if n_dimensions > MAX_DIMENSIONS:
                raise _Damaged(f"damaged: the tensor {name} has {n_dimensions} dimensions")
            shape = tuple(self._integer("Q") for _ in range(n_dimensions))
            kind, offset = self._integer("I"), self._integer("Q")
            if kind not in GGML_TYPES:
                raise _Damaged(f"the tensor {name} is of the unknown type {kind}")
            type_name, block, block_bytes, _ = GGML_TYPES[kind]
            n_elements = math.prod(shape)
            if not 0 < n_elements < 2**62:
                raise _Damaged(f"damaged: the tensor {name} has the shape {shape}")
            if shape and shape[0] % block:
                raise _Damaged(f"damaged: the rows of the tensor {name} are not whole blocks of {type_name}")
            if offset % alignment:
                raise _Damaged(f"damaged: the tensor {name} is not aligned to {alignment} bytes")
            raw.append((name, shape, type_name, offset, n_elements // block * block_bytes))
        begin = -(-self._at // alignment) * alignment
        for name, _, _, offset, n_bytes in raw:
            if begin + offset + n_bytes > self._size:
                raise _Damaged(
                    f"truncated: the tensor {name} ends at byte {begin + offset + n_bytes}, the file has {self._size}"
                )
        return tuple(
            GgufTensor(name, shape, type_name, begin + offset, n_bytes)
            for name, shape, type_name, offset, n_bytes in raw
        )


def _alignment(metadata: dict[str, GgufValue]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise _Damaged(f"damaged: general.alignment is {alignment}")
    return alignment


def _check_part(header: GgufHeader, part: int) -> None:
    number = header.metadata.get("split.no")
    if number != part:
        raise _Damaged(f"damaged: its split.no is {number}, but must be {part}")


def _check_values(header: GgufHeader) -> None:
    """Refuse well-formed values that would make llama.cpp abort, divide by zero, or compute rubbish."""
    metadata, architecture = header.metadata, header.architecture
    if not architecture:
        raise _Damaged("damaged: it does not name its architecture")
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and len(template) > MAX_TEMPLATE_CHARACTERS:
        raise _Damaged(f"the chat template has more than {MAX_TEMPLATE_CHARACTERS} characters")
    # What is left out here must be all that the loader refuses as a model. An adapter and a projector have no
    # hyperparameters of a model.
    if metadata.get("general.type") == ADAPTER_TYPE or architecture == PROJECTOR_ARCHITECTURE:
        return
    if metadata.get("split.no", 0) != 0:
        raise _Damaged("a later part of a model in several files: name its first part")

    def whole(key: str, low: int, high: int) -> int | None:
        value = metadata.get(f"{architecture}.{key}")
        if value is None or isinstance(value, GgufArray):  # an array has a value for each layer, which may be 0
            return None
        if not isinstance(value, int) or not low <= value <= high:
            raise _Damaged(f"{architecture}.{key} is {value}, but must be between {low} and {high}")
        return value

    whole("block_count", 1, MAX_BLOCKS)
    whole("context_length", 1, 2**31 - 1)
    whole("embedding_length", 1, 2**24)
    # A recurrent model may have 0 heads.
    has_state = any(".ssm." in key or ".wkv." in key or ".shortconv." in key for key in metadata)
    least = 0 if has_state or "rwkv" in architecture else 1
    n_head = whole("attention.head_count", least, 2**16)
    n_head_kv = whole("attention.head_count_kv", least, 2**16)
    if n_head and n_head_kv and n_head % n_head_kv:
        raise _Damaged(f"{n_head} attention heads cannot share {n_head_kv} key and value heads")
    for key, value in metadata.items():
        if not isinstance(value, float) or not key.startswith(architecture + "."):
            continue
        is_epsilon, is_rope = key.endswith("epsilon"), ".rope." in key
        if math.isnan(value) or (math.isinf(value) and (is_epsilon or is_rope)):
            raise _Damaged(f"{key} is {value}")
        if value < 0 and is_epsilon:
            raise _Damaged(f"{key} is {value}, but must not be negative")
        if value <= 0 and "rope.freq_base" in key:
            raise _Damaged(f"{key} is {value}, but must be more than 0")
