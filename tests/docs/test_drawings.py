"""The drawing of the prompt cache in docs/internals.md is what a pool of slots does."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.docs.pages import ROOT, read
from trio_runner.core.memory import Copy, Trim
from trio_runner.core.prompt import Item
from trio_runner.core.slots import Slot, SlotPool
from trio_runner.info import Capabilities

_SLOT = re.compile(r"^  slot (\d)   (busy|free)   \[ (.*) \]([^\]\n]*)$", re.MULTILINE)
_PROMPT = re.compile(r"^  a (?:new|second) prompt +(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Drawn:
    """A slot of the drawing. `text` is what it holds, and `note` stands behind it."""

    id: int
    busy: bool
    text: str
    note: str


def drawn_section() -> str:
    page = read(ROOT / "docs" / "internals.md")
    begin = page.index("## The prompt cache")
    return page[begin : page.index("## Context shift")]


def drawn_slots(section: str) -> list[Drawn]:
    return [
        Drawn(int(number), state == "busy", text, note.strip()) for number, state, text, note in _SLOT.findall(section)
    ]


class Vocabulary:
    """A token for each word."""

    def __init__(self) -> None:
        self._words: list[str] = []

    def tokenize(self, text: str) -> list[Item]:
        self._words += [word for word in text.split() if word not in self._words]
        return [self._words.index(word) for word in text.split()]

    def text_in(self, slot: Slot) -> str:
        return " ".join(self._words[item] for item in slot.items if isinstance(item, int))


def pool_of(drawn: list[Drawn], vocabulary: Vocabulary) -> SlotPool:
    n_slots = len(drawn) // 2
    pool = SlotPool(Capabilities(n_slots=n_slots, n_spare_slots=len(drawn) - n_slots, n_ctx=256, max_rows=256))
    for slot in sorted(drawn, key=lambda slot: not slot.note.startswith("unused for longest")):
        pool[slot.id].hold(vocabulary.tokenize(slot.text))
        pool.release(pool[slot.id])
        pool[slot.id].busy = slot.busy
    return pool


def test_the_prompt_cache_does_what_is_drawn() -> None:
    section = drawn_section()
    *before, first, second = drawn_slots(section)
    prompts = _PROMPT.findall(section)
    assert (len(before), len(prompts)) == (6, 2)
    assert prompts == [f"{slot.text} {slot.note.partition('  ')[0]}" for slot in (first, second)]
    words = Vocabulary()
    pool = pool_of(before, words)

    taken = pool.acquire(words.tokenize(prompts[0]), reuse=True)
    assert taken is not None
    slot, edits = taken
    assert (slot.id, words.text_in(slot)) == (first.id, first.text)
    assert edits == [Trim(first.id, len(slot.items))]

    taken = pool.acquire(words.tokenize(prompts[1]), reuse=True)
    assert taken is not None
    slot, edits = taken
    assert (slot.id, words.text_in(slot)) == (second.id, second.text)
    assert edits == [Trim(second.id, 0), Copy(0, second.id, len(slot.items))]
