"""Which names a piece of Python reads and binds, as its scopes have it."""

import ast
from collections.abc import Iterable, Iterator

Function = ast.FunctionDef | ast.AsyncFunctionDef
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def free_names(node: ast.AST) -> set[str]:
    """Return the names that a node reads from around it.

    Args:
        node: any node.

    Returns:
        The names, without those that functions, lambdas and comprehensions within it bind.
    """
    match node:
        case ast.Name(id=name, ctx=ast.Load()):
            return {name}
        case ast.AugAssign(target=ast.Name(id=name)):
            return {name} | free_names(node.value)
        case ast.Delete():
            return _all(node.targets) | {t.id for t in node.targets if isinstance(t, ast.Name)}
        case ast.Lambda():
            return _defaults(node.args) | (free_names(node.body) - _parameters(node.args))
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            inner = _all(node.body) - _parameters(node.args) - _locals(node)
            return _all(node.decorator_list) | _defaults(node.args) | inner
        case ast.ClassDef():
            inner = _all(node.body) - bound_names(node.body)
            return _all(node.decorator_list) | _all(node.bases) | _all(node.keywords) | inner
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            first = free_names(node.generators[0].iter)
            return first | (_all(ast.iter_child_nodes(node)) - comprehension_names(node))
    return _all(ast.iter_child_nodes(node))


def bound_names(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that statements bind in their own scope."""
    found: set[str] = set()
    for node in nodes:
        for part in walk_scope(node):
            match part:
                case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                    found.add(name)
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    found.add(name)
                case ast.ClassDef(name=name):
                    found.add(name)
                case ast.alias(name=name, asname=asname):
                    found.add(asname or name.partition(".")[0])
                case ast.ExceptHandler(name=str(name)):
                    found.add(name)
                case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                    found.add(name)
                case ast.MatchMapping(rest=str(name)):
                    found.add(name)
    return found


def walk_scope(node: ast.AST) -> Iterator[ast.AST]:
    """Walk over a node and what is in it, but not into functions, classes and lambdas in it."""
    yield node
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        # Only an assignment expression binds outside of it.
        for part in ast.walk(node):
            if isinstance(part, ast.NamedExpr):
                yield part.target
        return
    if not isinstance(node, _SCOPES):
        for child in ast.iter_child_nodes(node):
            yield from walk_scope(child)


def comprehension_names(node: Comprehension) -> set[str]:
    """Return the names that a comprehension's own loops bind."""
    return bound_names(part.target for part in node.generators)


def chain_root(node: ast.AST) -> ast.AST:
    """Return what a chain of attributes, subscripts and calls begins with."""
    while True:
        match node:
            case ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.Call(func=inner):
                node = inner
            case _:
                return node


def _all(nodes: Iterable[ast.AST]) -> set[str]:
    return set().union(*map(free_names, nodes))


def _defaults(args: ast.arguments) -> set[str]:
    return _all(args.defaults) | _all(part for part in args.kw_defaults if part is not None)


def _parameters(args: ast.arguments) -> set[str]:
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    return {part.arg for part in every if part is not None}


def _locals(node: Function) -> set[str]:
    declared = {
        name
        for part in ast.walk(node)
        if isinstance(part, ast.Global | ast.Nonlocal)
        for name in part.names
    }
    return bound_names(node.body) - declared
