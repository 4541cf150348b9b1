"""Splits a test into what the judge does and what only the code's process can do.

The code's process evaluates no more than the expressions that need the code: ``f(2)`` of ``assert
abs(f(2) - 5) < 1``. The judge has the rest: expected values, comparisons, built-in functions, loops
and branches. So the code's process never sees what it would have to know to pass.

A *live* name is one that belongs to the code, or whose value came from it; statements that bind one
run in the code's process, as Python runs them. A *hole* is an expression there whose value the
judge asks for. Where the value turns out not to be plain, the judge runs the test anew with marks:
the expression around it is then evaluated there, too.
"""

import ast
import builtins
import copy
from collections.abc import Iterable, Sequence
from typing import Any

from .inner import AskJudge, InnerAssert
from .parsed import Parsed, number_of, pure_imports, required_asserts
from .scopes import (
    bound_names,
    chain_root,
    comprehension_names,
    free_names,
    walk_scope,
)

# Modules whose results depend on their arguments alone, so that the judge can call them itself;
# every other module is imported where the code is.
PURE_MODULES = frozenset(
    "array base64 bisect calendar cmath collections copy datetime decimal fractions functools "
    "hashlib heapq itertools json math numbers numpy operator random re statistics string struct "
    "textwrap typing unicodedata uuid".split()
)
# Built-in functions that depend on the process they are called in.
_AMBIENT = frozenset(
    "open input print exec eval compile globals locals vars dir id __import__ exit quit breakpoint "
    "help memoryview".split()
)
_BUILTINS = frozenset(dir(builtins)) | {"__name__"}
# Expressions that cannot be taken apart.
_WHOLE = (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr, ast.Lambda)
_LINED_UP = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)


class Split:
    """A test, split.

    Args:
        parsed: the test, with what earlier runs have shown.
        overriding: built-in names that the code defines and the tests mean.
        modules: names that the code imports pure modules as.

    Attributes:
        module: what the judge executes; it calls ``__jail__``.
        snippets: sources for the code's process, by number.
        asserts: those that run there, by number.
        required: numbers of asserts there that every run of the test comes by.
    """

    def __init__(self, parsed: Parsed, overriding: set[str], modules: set[str]) -> None:
        self._tree, self.marks = parsed.tree, parsed.marks
        self._bound = bound_names(self._tree.body)
        self._imports = pure_imports(self._tree, PURE_MODULES)
        unknown = free_names(self._tree) - self._bound - _BUILTINS - modules
        self.live = self.marks.live | unknown | overriding | (_AMBIENT - self._bound)
        self._closures: list[ast.expr] | None = None  # within an assert of a function
        self._here: frozenset[str] = frozenset()  # names of the functions around it
        body: list[ast.stmt] = []
        more = True
        while more:
            self.snippets: list[str] = []
            self.asserts: dict[int, InnerAssert] = {}
            self._used: set[str] = set()
            self._mentioned = self._spread()
            body = [part for node in self._tree.body for part in self._statement(node)]
            more = self._pull_in_functions()
        self.required = required_asserts(self._tree) & set(self.asserts)
        self.module = ast.fix_missing_locations(ast.Module(body, []))

    # Which names are live.

    def _spread(self) -> set[str]:
        """Make live what is bound to live values; returns the names mentioned near live ones."""
        statements = [node for part in self._tree.body for node in walk_scope(part)]
        while True:
            before, mentioned = len(self.live), set()
            for node in statements:
                if isinstance(node, ast.stmt) and self._is_live(node):
                    self.live |= self._caught_up(node)
                    mentioned |= free_names(node)
                elif isinstance(node, ast.NamedExpr) and self._is_live(node.value):
                    self.live.add(node.target.id)
                elif isinstance(node, ast.Import | ast.ImportFrom):
                    self.live |= bound_names([node]) - self._imports
            if len(self.live) == before:
                return mentioned

    def _caught_up(self, node: ast.stmt) -> set[str]:
        """Return the names that a live statement makes live."""
        match node:
            case ast.Assert() | ast.If() | ast.While():
                return set()
            case ast.For(iter=values, target=target):
                native = self._is_live(values) or bound_names([target]) & self.live
                return bound_names([node]) if native else set()
            case ast.With(items=items):
                return bound_names(part.optional_vars for part in items if part.optional_vars)
            case ast.Try(handlers=handlers):
                return {part.name for part in handlers if part.name}
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                # It may read them at any time, so that they have to be where it is.
                return {node.name} | (free_names(node) & self._variables())
        return bound_names([node])

    def _pull_in_functions(self) -> bool:
        """Make functions and classes of the test live that snippets use."""
        found = {
            node.name
            for part in self._tree.body
            for node in walk_scope(part)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        }
        more = (found & self._used) - self.live
        self.live |= more
        return bool(more)

    def _variables(self) -> set[str]:
        """Return the names of the test's own variables that are the judge's."""
        return self._bound - self.live - self._imports

    def _is_live(self, node: ast.AST) -> bool:
        names = free_names(node)
        if isinstance(node, ast.stmt):
            names = names | bound_names([node])
        return not names.isdisjoint(self.live) or not names.isdisjoint(self._here)

    # Statements.

    def _statement(self, node: ast.stmt) -> list[ast.stmt]:
        match node:
            case ast.Assert():
                return [ast.Assert(self._condition(node.test), None)]
            case ast.Import() | ast.ImportFrom():
                here = [node] if bound_names([node]) <= self._imports else []
                needed = not here or bound_names([node]) & self._mentioned
                return [*here, *(self._run(node) if needed else [])]
        if not self._is_live(node):
            touches = _root_name(node) in self._imports  # random.seed(0), for example
            return [node, *(self._run(node) if touches and self._mentioned else [])]
        match node:
            case ast.If():
                return [ast.If(self._condition(node.test), self._block(node.body),
                               self._block(node.orelse, empty=True))]  # fmt: skip
            case ast.While():
                return [ast.While(self._condition(node.test), self._block(node.body),
                                  self._block(node.orelse, empty=True))]  # fmt: skip
            case ast.For() if not (self._is_live(node.iter) or self._is_live(node.target)
                                   or bound_names([node.target]) & self.live):  # fmt: skip
                return [ast.For(node.target, node.iter, self._block(node.body),
                                self._block(node.orelse, empty=True))]  # fmt: skip
            case ast.With():
                return self._with(node)
            case ast.Try():
                return [self._try(node)]
        return self._run(node)

    def _block(self, nodes: Sequence[ast.stmt], *, empty: bool = False) -> list[ast.stmt]:
        found = [part for node in nodes for part in self._statement(node)]
        return found if found or empty else [ast.Pass()]

    def _run(self, node: ast.stmt) -> list[ast.stmt]:
        """Run a statement where the code is; its asserts ask the judge."""
        inner = AskJudge(self.inner_assert).visit(copy.deepcopy(node))
        call = self._call("run", self._snippet(ast.fix_missing_locations(inner)), self._env(node))
        return [ast.Expr(call)]

    def _with(self, node: ast.With) -> list[ast.stmt]:
        body = self._block(node.body)
        for item in reversed(node.items):
            target = item.optional_vars
            text = ast.Constant(ast.unparse(target) if target else None)
            number = self._snippet(item.context_expr)
            context = self._call("context", number, self._env(item.context_expr), text)
            body = [ast.With([ast.withitem(context)], body)]
        return body

    def _try(self, node: ast.Try) -> ast.Try:
        """Handlers stand twice: for what the code raised, and for what the judge itself did."""
        chain: list[ast.stmt] = [ast.Raise()]
        for handler in reversed(node.handlers):
            kind = handler.type or ast.Name("BaseException", ast.Load())
            test = self._call("matches", self._snippet(kind), self._env(kind),
                              ast.Constant(handler.name))  # fmt: skip
            chain = [ast.If(test, self._block(handler.body), chain)]
        control = ast.ExceptHandler(ast.Name("__control__", ast.Load()), None, [ast.Raise()])
        raised = ast.ExceptHandler(ast.Name("__raised__", ast.Load()), None, chain)
        own = [
            ast.ExceptHandler(handler.type, handler.name, self._block(handler.body))
            for handler in node.handlers
            if handler.type is None or not self._is_live(handler.type)
        ]
        return ast.Try(
            self._block(node.body), [control, raised, *own],
            self._block(node.orelse, empty=True), self._block(node.finalbody, empty=True),
        )  # fmt: skip

    # Expressions.

    def _condition(self, node: ast.expr) -> ast.expr:
        return self._expression(node, frozenset())

    def inner_assert(self, node: ast.Assert, here: frozenset[str], caught: bool) -> ast.Expr:
        """Split an assert that runs where the code is; returns what stands there in its place."""
        closures: list[ast.expr] = []
        self._closures, self._here = closures, here
        test = ast.fix_missing_locations(ast.Expression(self._condition(node.test)))
        self._closures, self._here = None, frozenset()
        number = number_of(node)
        self.asserts[number] = InnerAssert(test, caught)
        name = ast.Name("__check__", ast.Load())
        return ast.Expr(ast.Call(name, [ast.Constant(number), *closures], []))

    def _expression(self, node: ast.expr, inner: frozenset[str]) -> ast.expr:
        """Return an expression for the judge.

        Args:
            node: the expression.
            inner: names bound by comprehensions and lambdas of the judge around it.
        """
        if not self._is_live(node):
            return node
        if number_of(node) in self.marks.native:
            return self._native(node, inner)
        match node:
            case ast.Compare() if self._compares_identity(node):
                return self._hole(node, inner)
            case ast.BoolOp() | ast.UnaryOp() | ast.BinOp() | ast.Compare() | ast.IfExp():
                return self._children(node, inner)
            case ast.List() | ast.Tuple() | ast.Set() | ast.Dict() | ast.JoinedStr():
                return self._children(node, inner)
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                if not any(part.is_async for part in node.generators):
                    return self._children(node, inner | comprehension_names(node))
            case ast.Attribute() | ast.Subscript() | ast.Call():
                root = chain_root(node)
                known = not (isinstance(root, ast.Name) and self._is_live(root))
                if known and not isinstance(root, _WHOLE):
                    return self._children(node, inner)
        return self._hole(node, inner)

    def _compares_identity(self, node: ast.Compare) -> bool:
        """Return whether two live objects may be asked to be one, which no copy can tell."""
        sides = [node.left, *node.comparators]
        return any(
            isinstance(operator, ast.Is | ast.IsNot) and self._is_live(a) and self._is_live(b)
            for operator, a, b in zip(node.ops, sides, sides[1:], strict=False)
        )

    def _children(self, node: ast.expr, inner: frozenset[str]) -> ast.expr:
        def changed(value: object) -> object:
            if isinstance(value, list):
                return [changed(part) for part in value]
            if isinstance(value, ast.expr) and not isinstance(
                value, ast.Starred | ast.Slice | ast.FormattedValue
            ):
                return self._expression(value, inner)
            if isinstance(value, ast.AST):
                return self._children(value, inner)  # type: ignore[arg-type]
            return value

        parts = {name: changed(value) for name, value in ast.iter_fields(node)}
        copied: Any = type(node)
        return copied(**parts)

    def _native(self, node: ast.expr, inner: frozenset[str]) -> ast.expr:
        """Evaluate an expression where the code is, lined up if a side of it is the judge's."""
        if number_of(node) in self.marks.bare:
            return self._hole(node, inner)
        match node:
            case ast.Compare(left=left, ops=[operator], comparators=[right]) if isinstance(
                operator, _LINED_UP
            ):
                pass
            case ast.BinOp(left=left, op=operator, right=right):
                pass
            case _:
                return self._hole(node, inner)
        sides = [self._is_live(left), self._is_live(right)]
        if all(sides):
            return self._hole(node, inner)
        swapped = sides[1]
        live, known = (right, left) if swapped else (left, right)
        hole = self._hole(live, inner, number=number_of(node))
        how = [known, ast.Constant(type(operator).__name__), ast.Constant(swapped)]
        return self._call("line_up", *hole.args, *how)

    def _hole(self, node: ast.expr, inner: frozenset[str], number: int | None = None) -> ast.Call:
        """Ask for the value of an expression where the code is.

        Args:
            node: the expression.
            inner: see `_expression`.
            number: of the expression that its value is for, by default itself.
        """
        own = number_of(node)
        method = "truth" if own in self.marks.truths and number is None else "value"
        names = sorted(free_names(node) & inner)
        self._used |= free_names(node)
        if self._closures is not None:
            at = self._closure(node, names)
        else:
            at = self._snippet(ast.Lambda(_arguments(names), node) if names else node)
        env = ast.Dict([], []) if self._closures is not None else self._env(node, names)
        number = own if number is None else number
        return self._call(method, at, env, _values(names), ast.Constant(number))

    def _closure(self, node: ast.expr, names: Sequence[str]) -> ast.Constant:
        """Hand an expression within a function over as a function of what the judge binds."""
        assert self._closures is not None
        body, closure = copy.deepcopy(node), ast.Lambda(_arguments(names), node)
        if any(isinstance(part, _WHOLE) and not isinstance(part, ast.Lambda)
               for part in ast.walk(body)):  # fmt: skip
            # Such an expression belongs to the function itself.
            later = ast.Lambda(_arguments([]), ast.Name("value", ast.Load()))
            self._closures.append(ast.Call(ast.Lambda(_arguments(["value"]), later), [body], []))
        else:
            self._closures.append(closure)
        return ast.Constant(-len(self._closures))

    def _env(self, node: ast.AST, inner: Sequence[str] = ()) -> ast.Dict:
        """Write down the judge's variables that something in the code's process reads."""
        return _values(sorted((free_names(node) & self._variables()) - set(inner)))

    def _snippet(self, node: ast.AST) -> ast.Constant:
        self._used |= free_names(node)
        self.snippets.append(ast.unparse(ast.fix_missing_locations(node)))
        return ast.Constant(len(self.snippets) - 1)

    @staticmethod
    def _call(method: str, *args: ast.expr) -> ast.Call:
        jail = ast.Attribute(ast.Name("__jail__", ast.Load()), method, ast.Load())
        return ast.Call(jail, list(args), [])


def _root_name(node: ast.stmt) -> str | None:
    """Return the name that a call, or an assignment to an attribute, begins with."""
    match node:
        case ast.Expr(value=ast.Call() as value) | ast.Assign(targets=[ast.Attribute() as value]):
            root = chain_root(value)
            return root.id if isinstance(root, ast.Name) else None
    return None


def _arguments(names: Iterable[str]) -> ast.arguments:
    return ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])


def _values(names: Sequence[str]) -> ast.Dict:
    keys: list[ast.expr | None] = [ast.Constant(name) for name in names]
    return ast.Dict(keys, [ast.Name(name, ast.Load()) for name in names])
