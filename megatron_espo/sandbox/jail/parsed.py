"""A test as a tree, and what its runs have shown about it so far."""

import ast
from collections import Counter
from dataclasses import dataclass, field

from .inline import unfold
from .scopes import Comprehension, Function, bound_names, walk_scope


@dataclass
class Marks:
    """What a run of a test has shown.

    Attributes:
        live: names whose values are shared with the code.
        native: numbers of expressions to be evaluated where the code is.
        bare: those of them that are not lined up.
        truths: numbers of expressions of which only the truth is asked.
    """

    live: set[str] = field(default_factory=set)
    native: set[int] = field(default_factory=set)
    bare: set[int] = field(default_factory=set)
    truths: set[int] = field(default_factory=set)


def number_of(node: ast.AST) -> int:
    """Return the number of a node of a parsed test."""
    number: int = node.number  # type: ignore[attr-defined]
    return number


class Parsed:
    """A test's tree; every node has a ``number``.

    Args:
        source: the test.

    Attributes:
        tree: the tree, its functions unfolded.
        once: variables that are read at one place only, as often as they are bound: a copy of their
            value serves as well as the value.
        marks: what runs have shown.

    Raises:
        SyntaxError: the source is no Python.
    """

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        unfold(self.tree)
        self._nodes = list(ast.walk(self.tree))
        self._parents: dict[int, ast.AST] = {}
        for number, node in enumerate(self._nodes):
            node.number = number  # type: ignore[attr-defined]
        for node in self._nodes:
            for child in ast.iter_child_nodes(node):
                self._parents[number_of(child)] = node
        self.once = self._read_once()
        self.marks = Marks()

    def coarser(self, number: int) -> bool:
        """Mark what has to be evaluated where the code is, after a value was not plain.

        Args:
            number: of the expression whose value was not plain.

        Returns:
            Whether there was anything left to mark.
        """
        node, marks = self._nodes[number], self.marks
        lined_up = number in marks.native and isinstance(node, ast.Compare | ast.BinOp)
        if lined_up and number not in marks.bare:
            marks.bare.add(number)
            return True
        while not self._is_condition(node):
            below, node = node, self._parent(node)
            if isinstance(node, ast.Call) and self._asks_for_closeness(node, below):
                return False
            standing = isinstance(node, ast.expr)
            if standing and not isinstance(node, ast.Starred | ast.Slice | ast.FormattedValue):
                marks.native.add(number_of(node))
                return True
        if number_of(node) in marks.truths:
            return False
        marks.truths.add(number_of(node))
        return True

    def coarser_scope(self, number: int) -> bool:
        """Mark the comprehension around an expression, whose values cannot be handed over."""
        node: ast.AST | None = self._nodes[number]
        while node is not None and not isinstance(node, Comprehension):
            node = self._parents.get(number_of(node))
        if node is None or number_of(node) in self.marks.native:
            return False
        self.marks.native.add(number_of(node))
        return True

    @staticmethod
    def _asks_for_closeness(call: ast.Call, argument: ast.AST) -> bool:
        """Return whether a call says how far an object is from a number: it would say itself."""
        match call.func:
            case ast.Name(id="abs"):
                return isinstance(argument, ast.BinOp) and isinstance(argument.op, ast.Sub)
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return name in ("isclose", "fabs")
        return False

    def _parent(self, node: ast.AST) -> ast.AST:
        return self._parents[number_of(node)]

    def _is_condition(self, node: ast.AST) -> bool:
        """Return whether only an expression's truth matters."""
        match self._parent(node):
            case ast.Assert(test=test) | ast.If(test=test) | ast.While(test=test):
                return test is node
            case ast.UnaryOp(op=ast.Not()):
                return True
            case ast.BoolOp() as parent:
                return self._is_condition(parent)
            case ast.expr() | ast.comprehension() | ast.keyword():
                return False
        return True

    def _read_once(self) -> set[str]:
        names = [node for node in self._nodes if isinstance(node, ast.Name)]
        reads = Counter(node.id for node in names if isinstance(node.ctx, ast.Load))
        binds = Counter(node.id for node in names if not isinstance(node.ctx, ast.Load))
        found = set()
        for name in (name for name, count in reads.items() if count == 1 and binds[name] == 1):
            loops = [self._loop(node) for node in names if node.id == name]
            if loops[0] is loops[1]:
                found.add(name)
        return found

    def _loop(self, node: ast.AST) -> ast.AST:
        """Return the innermost loop, function or comprehension that a node belongs to."""
        kinds = ast.For | ast.AsyncFor | ast.While | ast.FunctionDef | ast.AsyncFunctionDef
        while not isinstance(node, kinds | ast.Lambda | ast.Module | Comprehension):
            below, node = node, self._parent(node)
            if isinstance(node, ast.For) and below is node.iter:
                node = self._parent(node)
        return node


def pure_imports(tree: ast.Module, modules: frozenset[str]) -> set[str]:
    """Return the names that a test imports from some modules.

    Args:
        tree: the test.
        modules: their names.

    Returns:
        Names of the modules, and of what is imported from them, at the test's top.
    """
    found: set[str] = set()
    for part in tree.body:
        for node in walk_scope(part):
            if isinstance(node, ast.Import):
                pure = all(alias.name.partition(".")[0] in modules for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                pure = (node.module or "").partition(".")[0] in modules and not node.level
                pure = pure and node.names[0].name != "*"
            else:
                continue
            if pure:
                found |= bound_names([node])
    return found


def required_asserts(tree: ast.Module) -> set[int]:
    """Return the numbers of asserts at the top of functions which the test itself calls."""
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    found: set[int] = set()
    for function in tree.body:
        if not isinstance(function, Function) or function.name not in called:
            continue
        for node in function.body:
            if isinstance(node, ast.Assert):
                found.add(number_of(node))
            elif any(isinstance(part, ast.Return | ast.Raise) for part in walk_scope(node)):
                break
    return found
