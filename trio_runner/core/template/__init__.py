"""Render a template from a model's file, within bounds of time and memory.

A chat template is a program that a stranger wrote. Jinja's sandbox keeps it away from Python, but not from time and
memory: `"x" * 10**9`, ten nested loops, a list that contains itself twice, forty times over. A deadline or a process
with limits would stop it too, but core/ has neither a clock nor processes, and a template must fail at the same place
on every machine. So work is counted before it is done, in units of about ten nanoseconds:

    256     a call, a lookup that fails
     64     an operator, a filter, a test, an element that a filter or test is applied to
     32     a lookup of an attribute or item, an output
     16     an element of a list, tuple or dict that is compared or written out
      8     a node of the program in a loop or macro, whether or not it is executed
      4     an element that is copied, or compared with one value
      1     a character

The weight of a structure is that of its text, because with shared parts it can be much smaller in memory. The budget is
one or two seconds of work, and 32 units for each character of the longest request. The templates of well-known models
take 3 to 16 for each, so each operation is charged for what it reads, and not for the whole of its arguments.

The sandbox asks its environment to do operators, lookups and calls, but not loops, slices, comparisons, `~` and keys of
dicts. The program is rewritten to call a filter or a test for those. No value is an iterator, which could be weighed
only once: filters and methods return lists. A template gets plain values: None, bool, int, float, str, list, dict.

A cap on the output and counters in loops would be shorter, but do not suffice: they miss long work in one native call
(to compare, hash, sort, search, or write JSON) and values that never reach the output. Each kind has a template in
`tests/core/test_template.py`.

    work.py          the budget, and what values weigh
    costs.py         what takes longer than it takes to read the values
    filters.py       filters and tests that spend before they work
    environment.py   operators, lookups and calls that spend before they work
    rewriter.py      what the sandbox would do without its environment
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from trio_runner.core.template.environment import ENVIRONMENT
from trio_runner.core.template.rewriter import Rewriter
from trio_runner.core.template.work import Refusal, TemplateError, TooLong, bounds, short

__all__ = ["MAX_TEMPLATE_BYTES", "MAX_WORK", "BoundedTemplate", "Refusal", "TemplateError", "TooLong"]

MAX_TEMPLATE_BYTES: Final = 128 << 10
MAX_WORK: Final = 1 << 27
"""Units of work that one rendering may take."""


class BoundedTemplate:
    """A compiled template. Several threads may render it at once.

    Raises `TemplateError` if it does not compile.
    """

    def __init__(self, source: str) -> None:
        with bounds(MAX_WORK):
            if len(source.encode(errors="surrogatepass")) > MAX_TEMPLATE_BYTES:
                raise TemplateError(f"it has more than {MAX_TEMPLATE_BYTES} bytes")
            tree = ENVIRONMENT.parse(source)
            self._template = ENVIRONMENT.from_string(Rewriter().visit(tree))

    def render(
        self,
        variables: Mapping[str, Any],
        *,
        max_characters: int,
        strftime_now: Callable[[str], str] | None = None,
        max_work: int = MAX_WORK,
    ) -> str:
        """The text for `variables`, which are plain values. If `strftime_now` is None, templates have no such function.

        Raises `Refusal` if the template refuses the variables, `TooLong` for a text of more than `max_characters`, and
        `TemplateError` if the template fails or works for too long.
        """
        functions: dict[str, Any] = {}
        if strftime_now is not None:
            functions["strftime_now"] = lambda layout: strftime_now(short(layout))
        pieces: list[str] = []
        n_characters = 0
        with bounds(max_work):
            for piece in self._template.generate({**variables, **functions}):
                n_characters += len(piece)
                if n_characters > max_characters:
                    raise TooLong(f"it makes more than {max_characters} characters")
                pieces.append(piece)
        return "".join(pieces)
