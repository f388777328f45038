"""How many patterns of a JSON schema may hold for one and the same text.

llguidance compares them with each other, in time that doubles with each: with 18 it took a second, with 24 too long to
wait for. So their number is limited before it sees them.
"""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import unquote

_MANY: Final = ("allOf",)
_ONE_OF_MANY: Final = ("anyOf", "oneOf")
_ONE: Final = ("items", "additionalItems", "additionalProperties", "contains", "not", "if", "then", "else")


class Meeting:
    """The patterns of one schema, counted."""

    def __init__(self, schema: dict[str, Any], n_patterns: int) -> None:
        """`n_patterns` are all patterns of the schema: what a reference may add that is not local."""
        self._schema = schema
        self._n_patterns = n_patterns
        self._counts: dict[int, int] = {}

    def most(self, node: object = None) -> int:
        """At most this many patterns hold for one text in a value of `node`, which is the whole schema unless given.

        Raises RecursionError for references that are nested too deeply.
        """
        node = self._schema if node is None else node
        if not isinstance(node, dict):
            return 0
        if id(node) not in self._counts:
            self._counts[id(node)] = 0  # a cycle adds nothing
            self._counts[id(node)] = self._count(node)
        return self._counts[id(node)]

    def _count(self, node: dict[str, Any]) -> int:
        own = ("pattern" in node) + ("format" in node)
        inside = [self.most(child) for child in _children(node)]
        named = sum(map(self.most, _values(node, "patternProperties")))
        together = sum(self.most(child) for name in _MANY for child in _values(node, name))
        apart = sum(max(map(self.most, _values(node, name)), default=0) for name in _ONE_OF_MANY)
        return max([own, *inside]) + named + together + apart + self._reference(node.get("$ref"))

    def _reference(self, reference: object) -> int:
        if not isinstance(reference, str):
            return 0
        if reference != "#" and not reference.startswith("#/"):
            return self._n_patterns
        target: Any = self._schema
        for part in reference.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and name.isdecimal() and int(name) < len(target):
                target = target[int(name)]
            elif isinstance(target, dict) and name in target:
                target = target[name]
            else:
                return 0  # llguidance refuses it
        return self.most(target)


def _values(node: dict[str, Any], name: str) -> list[Any]:
    value = node.get(name)
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _children(node: dict[str, Any]) -> list[Any]:
    """The schemas of parts of a value. No two of them are for the same part, except one by a name's pattern."""
    lists = [child for name in ("properties", "prefixItems", "items") for child in _values(node, name)]
    return [*lists, *(node[name] for name in _ONE if name in node)]
