"""Models in several files: they load like one file, and each file is checked before native code reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from tests.llama.running import Running, tokens_of
from trio_runner.errors import LoadError
from trio_runner.llama.gguf import check_gguf, check_parts

Models = Callable[[str], Path]


@pytest.fixture
def split(models: Models, tmp_path: Path) -> list[Path]:
    """The files of the tiny llama, split as llama.cpp's own tool does it."""
    whole = gguf.GGUFReader(models("llama"))
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama", split_max_tensors=8)
    for name, field in whole.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            is_array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if is_array else None)
    for tensor in whole.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(paths) == 3
    return paths


def refusal(path: Path) -> LoadError:
    with pytest.raises(LoadError) as caught:
        Running(path)
    return caught.value


def test_a_model_in_several_files_says_what_it_says_in_one(models: Models, split: list[Path]) -> None:
    first = split[0]
    assert check_parts(str(first), check_gguf(first)) == [str(path) for path in split]
    assert tokens_of(Running(first).generate()) == tokens_of(Running(models("llama")).generate())


@pytest.mark.parametrize("part", [1, 2])
def test_a_damaged_file_is_named(split: list[Path], part: int) -> None:
    data = split[part].read_bytes()
    name = gguf.GGUFReader(split[part]).tensors[0].name.encode()
    n_dimensions = data.index(name) + len(name)
    split[part].write_bytes(data[:n_dimensions] + b"\x05" + data[n_dimensions + 1 :])
    error = refusal(split[0])
    assert error.path == str(split[part])
    assert "has 5 dimensions" in error.reason


def test_a_missing_file_is_named(split: list[Path]) -> None:
    split[2].unlink()
    error = refusal(split[0])
    assert (error.path, error.reason) == (str(split[2]), "no such file")


def test_files_in_the_wrong_order_are_refused(split: list[Path]) -> None:
    contents = [path.read_bytes() for path in split]
    split[1].write_bytes(contents[2])
    error = refusal(split[0])
    assert (error.path, error.reason) == (str(split[1]), "damaged: its split.no is 2, but must be 1")


def test_a_later_file_is_not_a_model(split: list[Path]) -> None:
    assert refusal(split[1]).path == str(split[1])


def test_a_renamed_first_file_is_refused(split: list[Path]) -> None:
    renamed = split[0].rename(split[0].with_name("renamed.gguf"))
    error = refusal(renamed)
    assert error.path == str(renamed)
    assert "must have a name that ends in -00001-of-00003.gguf" in error.reason
