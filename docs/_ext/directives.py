"""Directives for Sphinx: the tables of `tables.py`, and docstrings as we write them.

mypy does not check this file, because Sphinx and docutils are installed only to build the documentation. What decides
something is in `tables.py`, which the tests import.

```{parameters} trio_runner.sampling.SamplingParams
```
```{wire-fields} completion
:part: sampling
```
```{commands}
```
```{command-options} embed
:beside: serve
```
```{error-classes}
```
```{bounds}
```
```{metrics} llama-server
```
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive, directives
from sphinx.application import Sphinx

from docs._ext import tables

_CODE = re.compile(r"`([^`]*)`")


class TableDirective(Directive):
    """Puts the table that `make` returns where the directive stands."""

    option_spec = dict.fromkeys(("beside", "common", "part"), directives.unchanged)
    optional_arguments = 1
    make: Callable[..., tables.Table]

    def run(self) -> list[nodes.Node]:
        table = type(self).make(*self.arguments, **self.options)
        return [_table_node(table)]


def _table_node(table: tables.Table) -> nodes.table:
    node = nodes.table(classes=["colwidths-given"])
    group = nodes.tgroup(cols=len(table.headings))
    group += [nodes.colspec(colwidth=width) for width in table.widths]
    head, body = nodes.thead(), nodes.tbody()
    head += _row(table.headings)
    body += [_row(row) for row in table.rows]
    group += [head, body]
    node += group
    return node


def _row(cells: tuple[str, ...]) -> nodes.row:
    row = nodes.row()
    for cell in cells:
        paragraph = nodes.paragraph()
        for index, piece in enumerate(_CODE.split(cell)):
            if piece:
                paragraph += nodes.literal(text=piece) if index % 2 else nodes.Text(piece)
        entry = nodes.entry()
        entry += paragraph
        row += entry
    return row


def _parameters(path: str) -> tables.Table:
    module, _, name = path.rpartition(".")
    return tables.parameters(getattr(importlib.import_module(module), name))


def _as_restructured_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings show code by indenting it. To Sphinx that is a quotation, unless `::` stands before it."""
    result: list[str] = []
    for index, line in enumerate(lines):
        before = lines[index - 1] if index else ""
        begins = line.startswith("    ") and not before.strip()
        if begins and not _is_in_block(result):
            result += ["::", ""]
        result.append(line)
    lines[:] = result


def _is_in_block(lines: list[str]) -> bool:
    """Whether the last line that is not empty is indented, or opens a block."""
    last = next((line for line in reversed(lines) if line.strip()), "")
    return last.startswith("    ") or last.rstrip().endswith("::")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    makers = {
        "parameters": _parameters,
        "wire-fields": tables.wire_fields,
        "commands": tables.commands,
        "command-options": tables.command_options,
        "error-classes": tables.error_classes,
        "bounds": tables.bounds,
        "metrics": tables.metrics,
    }
    for name, make in makers.items():
        app.add_directive(name, type("_Table", (TableDirective,), {"make": staticmethod(make)}))
    app.connect("autodoc-process-docstring", _as_restructured_text)
    return {"parallel_read_safe": True}
