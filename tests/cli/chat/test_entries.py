"""From lines to entries, and from entries to what they mean."""

from __future__ import annotations

import pytest

from trio_runner.cli.chat.composer import Composer, Entry
from trio_runner.cli.chat.entry import (
    COMMANDS,
    Action,
    AttachImage,
    BadEntry,
    Clear,
    Help,
    Leave,
    Load,
    Retry,
    Save,
    Say,
    System,
    help_text,
    parse_entry,
)

ENTRIES = [
    (["hello"], Entry("hello")),
    ([""], Entry("")),
    (["one\\", "two"], Entry("one\ntwo")),
    (["one\\", "\\", "two"], Entry("one\n\ntwo")),
    (["two backslashes\\\\"], Entry("two backslashes\\\\")),
    (['"""one"""'], Entry("one", literal=True)),
    (['"""', "one", "  two", '"""'], Entry("one\n  two", literal=True)),
    (['  """one', "", 'two""" '], Entry("one\n\ntwo", literal=True)),
    (['"""one\\', '"""'], Entry("one\\", literal=True)),
    (['""""""'], Entry("", literal=True)),
    (['"""', "/help", '"""'], Entry("/help", literal=True)),
    (['/system """be', 'kind"""'], Entry("/system be\nkind")),
    (['say """this"""'], Entry('say """this"""')),
    (["pasted\ntext"], Entry("pasted\ntext")),
]


@pytest.mark.parametrize(("lines", "entry"), ENTRIES)
def test_an_entry_ends_with_its_last_line(lines: list[str], entry: Entry) -> None:
    composer = Composer()
    for line in lines[:-1]:
        assert composer.push(line) is None
        assert composer.is_open
    assert composer.push(lines[-1]) == entry
    assert not composer.is_open


@pytest.mark.parametrize(
    ("lines", "entry"),
    [([], None), (["one\\"], Entry("one")), (['"""one', "two"], Entry("one\ntwo", literal=True))],
)
def test_the_end_of_the_input_ends_an_entry(lines: list[str], entry: Entry | None) -> None:
    composer = Composer()
    for line in lines:
        assert composer.push(line) is None
    assert composer.flush() == entry
    assert not composer.is_open


def test_an_entry_can_be_dropped() -> None:
    composer = Composer()
    composer.push('"""one')
    composer.clear()
    assert composer.push("two") == Entry("two")


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("hello", Say("hello")),
        (" /hello", Say(" /hello")),
        ("  ", None),
        ("/system be kind", System("be kind")),
        ("/system be\nkind", System("be\nkind")),
        ("/system", System(None)),
        ('/system ""', System("")),
        ("/image cat.png", AttachImage("cat.png")),
        ("/image 'my cat.png'", AttachImage("my cat.png")),
        ("/image my cat.png ", AttachImage("my cat.png")),
        ("/save talk.json", Save("talk.json", overwrite=False)),
        ("/save -f talk.json", Save("talk.json", overwrite=True)),
        ("/load talk.json", Load("talk.json")),
        ("/clear", Clear()),
        ("/retry", Retry()),
        ("/help", Help()),
        ("/BYE", Leave()),
    ],
)
def test_what_an_entry_means(text: str, action: Action | None) -> None:
    assert parse_entry(Entry(text)) == action


def test_a_text_in_quotes_is_no_command() -> None:
    assert parse_entry(Entry("/bye", literal=True)) == Say("/bye")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/nothing", "there is no command /nothing"),
        ("/sytem be kind", "Did you mean /system?"),
        ("/", "there is no command /"),
        ("/save", "a path is missing: /save PATH"),
        ("/save -f", "a path is missing"),
        ("/image ''", "a path is missing: /image PATH"),
        ("/clear all", "/clear takes nothing after it"),
    ],
)
def test_a_bad_entry_is_one_line(text: str, words: str) -> None:
    with pytest.raises(BadEntry) as caught:
        parse_entry(Entry(text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_help_names_every_command() -> None:
    assert all(f"  {name}" in help_text() for name in COMMANDS)
    assert max(map(len, help_text().splitlines())) < 100
