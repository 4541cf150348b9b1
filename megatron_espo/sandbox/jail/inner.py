"""Asserts within functions that run where the code is: the judge is asked for them."""

import ast
from collections.abc import Callable
from dataclasses import dataclass

from .scopes import Function, bound_names


@dataclass(frozen=True)
class InnerAssert:
    """An assert within a function that runs where the code is.

    Attributes:
        test: its condition, for the judge.
        caught: whether a ``try`` around it may go on after it has failed.
    """

    test: ast.Expression
    caught: bool


class AskJudge(ast.NodeTransformer):
    """Puts questions to the judge where a statement that runs with the code has asserts."""

    def __init__(self, split: Callable[[ast.Assert, frozenset[str], bool], ast.Expr]) -> None:
        """Take what splits an assert, given the names around it and whether it is caught."""
        self._split = split
        self._here: frozenset[str] = frozenset()
        self._caught = False

    def visit_Assert(self, node: ast.Assert) -> ast.Expr:
        """Replace an assert."""
        return self._split(node, self._here, self._caught)

    def visit_Try(self, node: ast.Try) -> ast.AST:
        """Note that what is in it may fail and go on."""
        before, self._caught = self._caught, self._caught or bool(node.handlers)
        node.body = [self.visit(part) for part in node.body]
        self._caught = before
        for name in ("handlers", "orelse", "finalbody"):
            setattr(node, name, [self.visit(part) for part in getattr(node, name)])
        return node

    def _function(self, node: Function) -> ast.AST:
        before = self._here
        names = {part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)}
        self._here = before | names | bound_names(node.body)
        self.generic_visit(node)
        self._here = before
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function
