"""Rewrite a template, so that filters and tests do what the sandbox would do without its environment."""

from __future__ import annotations

from typing import Final, NoReturn

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from trio_runner.core.template.work import STEP, TemplateError

_BODIES: Final = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)
_OPERATORS: Final = {"lteq": "le", "gteq": "ge", "notin": "in"}


class Rewriter(NodeTransformer):
    """Visits a tree, and changes it. The filters are those of `filters.py`."""

    def _filter(self, name: str, first: nodes.Expr, *others: nodes.Expr | None) -> nodes.Filter:
        return nodes.Filter(first, name, [other or nodes.Const(None) for other in others], [], None, None)

    def _pay(self, *within: nodes.Node) -> nodes.Filter:
        """Spend the cost of these nodes and all inside them, except for other bodies, which spend it themselves."""
        cost = 4 * STEP
        todo = list(within)
        while todo:
            node = todo.pop()
            cost += STEP + (len(node.data) if isinstance(node, nodes.TemplateData) else 0)
            todo += node.iter_child_nodes(exclude=("body",) if isinstance(node, _BODIES) else ())
        return self._filter("=pay", nodes.Const(cost))

    def visit_For(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._pay(node, *node.body)))
        if isinstance(node, nodes.For) and node.test is not None:  # executed more often than the body
            node.test = nodes.And(self._pay(node.test), node.test)
        return node

    visit_Macro = visit_CallBlock = visit_Block = visit_For  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filter("=concat", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if len(node.ops) > 1:  # a < b < c
            node.expr = self._filter("=weighed", node.expr)
            for operand in node.ops:
                operand.expr = self._filter("=weighed", operand.expr)
            return node
        (operand,) = node.ops
        test = nodes.Test(node.expr, _OPERATORS.get(operand.op, operand.op), [operand.expr], [], None, None)
        return nodes.Not(test) if operand.op == "notin" else test

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        return self._filter("=cut", node.node, node.arg.start, node.arg.stop, node.arg.step)

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = self._filter("=weighed", node.key)
        return node

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> NoReturn:  # noqa: N802
        raise TemplateError("it escapes for HTML")
