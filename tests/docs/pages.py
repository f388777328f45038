"""The pages that people read, cut into blocks of code and everything else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = (ROOT / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"^(`{3,})([^\n]*)\n(.*?)^\1\s*$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block: `language` is what stands behind the fence."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(*languages: str) -> list[Block]:
    """All blocks of these languages, in the order of the pages."""
    found = []
    for page in PAGES:
        text = read(page)
        for match in _FENCE.finditer(text):
            if match[2].strip() in languages:
                found.append(Block(page, text.count("\n", 0, match.start()) + 2, match[2].strip(), match[3]))
    return found


def code_spans(page: Path) -> list[str]:
    """What stands in single backticks."""
    return _SPAN.findall(_FENCE.sub("", read(page)))
