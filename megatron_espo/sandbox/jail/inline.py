"""Unfolds test functions that are called once, so that each of their asserts is judged apart."""

import ast
from collections.abc import Sequence

from .scopes import bound_names

_KEPT = (ast.Return, ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal)


def unfold(tree: ast.Module) -> None:
    """Replace ``def check(candidate): ...; check(f)`` by ``candidate = f`` and the body, in place.

    Names of the function get another name, which nothing else has. A function stays one if it
    returns, yields or waits, is called in another way, or has parameters beyond plain ones.

    Args:
        tree: a test.
    """
    for function in [part for part in tree.body if isinstance(part, ast.FunctionDef)]:
        call = _only_call(tree, function)
        if call is None:
            continue
        names = {part.arg for part in function.args.args} | bound_names(function.body)
        imported = bound_names(
            part for part in ast.walk(function) if isinstance(part, ast.Import | ast.ImportFrom)
        )
        rename = _Rename({name: f"{name}__{function.name}" for name in names - imported})
        body: list[ast.stmt] = [
            ast.Assign([ast.Name(rename.names.get(part.arg, part.arg), ast.Store())], argument)
            for part, argument in zip(function.args.args, call.args, strict=True)
        ]
        body += [rename.visit(part) for part in function.body]
        at = next(n for n, part in enumerate(tree.body) if _is_call(part, call))
        tree.body[at : at + 1] = body
        tree.body.remove(function)
    ast.fix_missing_locations(tree)


def _only_call(tree: ast.Module, function: ast.FunctionDef) -> ast.Call | None:
    """Return the call of a function that can be unfolded, else None."""
    args = function.args
    plain = not (args.posonlyargs or args.kwonlyargs or args.vararg or args.kwarg or args.defaults)
    names = {part.arg for part in args.args} | bound_names(function.body)
    inner = [part for part in ast.walk(function) if isinstance(part, ast.arg | ast.ClassDef)]
    clash = [part for part in inner if part not in args.args
             and (isinstance(part, ast.ClassDef) or part.arg in names)]  # fmt: skip
    uses = [part for part in ast.walk(tree)
            if isinstance(part, ast.Name) and part.id == function.name]  # fmt: skip
    if not plain or clash or function.decorator_list or len(uses) != 1:
        return None
    if any(isinstance(part, _KEPT) for part in ast.walk(function)):
        return None
    return next((found for part in tree.body if (found := _call(part, function))), None)


def _call(statement: ast.stmt, function: ast.FunctionDef) -> ast.Call | None:
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Name(id=name), args=args, keywords=[]) as call):
            fits = name == function.name and len(args) == len(function.args.args)
            return call if fits and not _starred(args) else None
    return None


def _starred(args: Sequence[ast.expr]) -> bool:
    return any(isinstance(part, ast.Starred) for part in args)


def _is_call(statement: ast.stmt, call: ast.Call) -> bool:
    return isinstance(statement, ast.Expr) and statement.value is call


class _Rename(ast.NodeTransformer):
    """Gives names other names."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        """Rename what is read or bound."""
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Rename a function."""
        node.name = self.names.get(node.name, node.name)
        return self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        """Rename what an exception is bound to."""
        node.name = self.names.get(node.name, node.name) if node.name else None
        return self.generic_visit(node)
