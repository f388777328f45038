"""What clients may call the model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_runner.errors import UnknownModel
from trio_runner.models import DEFAULT_MODEL, model_name
from trio_runner.server.names import MAX_NAME_LENGTH, ModelNames

NAMES = ModelNames("SmolLM2", ("gpt-4o", "small:latest"))


@pytest.mark.parametrize(
    "name",
    [None, "", "SmolLM2", "smollm2", "SmolLM2:latest", "gpt-4o", "gpt-4o:latest", "small", "small:latest", "Small"],
)
def test_the_name_and_the_aliases_are_known(name: str | None) -> None:
    NAMES.check(name)


@pytest.mark.parametrize("name", ["smol", "SmolLM2:1b", "SmolLM2.gguf", "/models/SmolLM2", ":latest", " ", "gpt-4"])
def test_no_other_name_is_known(name: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        NAMES.check(name)
    assert caught.value.name == name
    assert caught.value.known == ("SmolLM2", "gpt-4o", "small:latest")
    assert caught.value.param == "model"
    assert str(caught.value) == f"model: there is no {name!r} here, only 'SmolLM2', 'gpt-4o', 'small:latest'"


def test_any_name_may_be_allowed() -> None:
    ModelNames("a", any_model=True).check("b")


def test_a_long_name_is_not_repeated() -> None:
    with pytest.raises(UnknownModel) as caught:
        NAMES.check("x" * 100_000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * (MAX_NAME_LENGTH + 1), "\ud800"])
def test_a_name_can_be_printed(name: str) -> None:
    for names in ((name,), ("a", (name,))):
        with pytest.raises(ValueError, match="printable"):
            ModelNames(*names)


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("default", DEFAULT_MODEL.name),
        ("smollm2-135m-instruct", DEFAULT_MODEL.name),
        ("model.gguf", "model"),
        ("/srv/models/Qwen3-0.6B-Q8_0.GGUF", "Qwen3-0.6B-Q8_0"),
        ("C:\\models\\a.b.gguf", "a.b"),
        ("hf:owner/repo@main/folder/big-00001-of-00003.gguf", "big"),
        ("blob", "blob"),
        ("/", "model"),
        (".gguf", "model"),
        ("new\nline.gguf", "new_line"),
    ],
)
def test_a_model_is_called_as_its_file(reference: str, name: str) -> None:
    assert model_name(reference) == name


@given(st.text())
def test_every_file_has_a_name(reference: str) -> None:
    ModelNames(model_name(reference)).check(model_name(reference))
