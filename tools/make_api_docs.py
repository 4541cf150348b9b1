"""Writes docs/api.md from the docstrings of what a user imports.

    python tools/make_api_docs.py            # write it
    python tools/make_api_docs.py --check    # status 1 if it is not what the docstrings say

It reads sources and imports nothing of them.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
_HEAD = """# API

What Python code imports. Made from docstrings by `make docs`: change those, not this page.
Tensors are written as type and shape, `float32 [n, m]`; times are in seconds, likelihoods in nats.
"""


class Part(NamedTuple):
    """A section of the page.

    Attributes:
        title: heading.
        text: what stands under it, Markdown.
        module: imported to have the names.
        file: source that defines them, below the package.
        names: classes, functions and types, in the order of the page.
    """

    title: str
    text: str
    module: str
    file: str
    names: tuple[str, ...]


PARTS = (
    Part(
        "Models",
        "[Models in Python](python.md) shows them at work.",
        "megatron_espo.api",
        "api/model.py",
        ("load", "Model", "Sample", "Likelihood", "Prompt"),
    ),
    Part(
        "Settings of sampling",
        "Keywords of `generate`, `sample`, `chat` and `animate`, and flags `--rollout-*` "
        "([sampling](sampling.md)). Defaults are those of training; in Python temperature is 0, a "
        "completion has up to 256 tokens, and a step commits one.",
        "megatron_espo.config",
        "rollout_config.py",
        ("RolloutConfig",),
    ),
    Part(
        "lm-evaluation-harness",
        "Needs `pip install lm_eval`.",
        "megatron_espo.api.harness",
        "api/harness.py",
        ("HarnessModel",),
    ),
    Part(
        "Tasks",
        "What a task is, and what helps to write one ([tasks](tasks.md#your-own-task)).",
        "megatron_espo.tasks.base",
        "tasks/base.py",
        (
            "Example", "Score", "Task", "GeneratingTask", "DemonstratingTask", "ChatMessage",
            "read_jsonl", "read_records", "draw_distinct", "split_of", "tagged_prompt",
            "dressed_answer",
        ),
    ),
    Part(
        "Parts of a completion",
        "For tasks whose reward is defined on parts, too ([parts](tasks.md#parts)).",
        "megatron_espo.tasks.parts",
        "tasks/parts.py",
        ("PartedTask",),
    ),
    Part(
        "Loading a task",
        "",
        "megatron_espo.tasks",
        "tasks/__init__.py",
        ("load_task",),
    ),
    Part(
        "Answers in a text",
        "For `score`: where a completion's answer stands.",
        "megatron_espo.tasks.answers",
        "tasks/answers.py",
        ("tagged_answer", "boxed_answer", "final_statement"),
    ),
    Part(
        "Objectives",
        "What to inherit for [one of your own](objectives.md#your-own).",
        "megatron_espo.objectives",
        "objectives/base.py",
        ("Objective", "Given", "Loss", "setting"),
    ),
    Part(
        "Credit of parts",
        "What an objective's `credit` returns ([credit of parts](objectives.md#credit-of-parts)).",
        "megatron_espo.objectives",
        "objectives/credit.py",
        ("Credit",),
    ),
    Part(
        "Masks and their weights",
        "Functions of tensors: no model, no process group.",
        "megatron_espo.diffusion.noise",
        "diffusion/noise.py",
        ("Noise", "ElboViews", "bernoulli", "exact_count", "elbo_views", "random_lengths"),
    ),
    Part(
        "The ELBO of noised views",
        "",
        "megatron_espo.diffusion.estimators",
        "diffusion/estimators.py",
        ("elbo_draws",),
    ),
    Part(
        "Converting checkpoints",
        "As `megatron-espo convert` does ([conversion](conversion.md)).",
        "megatron_espo.conversion.convert",
        "conversion/convert.py",
        ("convert_to_megatron", "convert_to_hugging_face"),
    ),
    Part(
        "Curves of runs",
        "As `megatron-espo plot` does ([monitoring](monitoring.md)).",
        "megatron_espo.monitor.curves",
        "monitor/curves.py",
        ("find_events", "read_scalars"),
    ),
    Part(
        "Pictures of runs",
        "",
        "megatron_espo.monitor.pictures",
        "monitor/pictures.py",
        ("draw_runs",),
    ),
    Part(
        "A user's mistake",
        "",
        "megatron_espo.errors",
        "errors.py",
        ("UserError",),
    ),
)  # fmt: skip

_SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
Node = ast.FunctionDef | ast.ClassDef | ast.TypeAlias


def page(parts: Sequence[Part] = PARTS, package: Path = ROOT / "megatron_espo") -> str:
    """Make the page.

    Args:
        parts: its sections.
        package: folder of the sources.

    Returns:
        Markdown, ending in one line break.

    Raises:
        SystemExit: a name is not where its section says.
    """
    lines = [_HEAD]
    for part in parts:
        body = ast.parse((package / part.file).read_text("utf-8")).body
        found = {_name(node): (node, body[i + 1 : i + 2]) for i, node in enumerate(body)}
        lines.append(f"## {part.title}\n\n`{part.module}`. {part.text}".rstrip() + "\n")
        for name in part.names:
            if name not in found:
                sys.exit(f"error: {part.file} has no {name}; mend PARTS in {Path(__file__).name}.")
            node, following = found[name]
            lines += _entry(node, following)
    return "\n".join(lines).rstrip() + "\n"


def _name(node: ast.stmt) -> str:
    if isinstance(node, ast.TypeAlias):
        return ast.unparse(node.name)
    return getattr(node, "name", "")


def _entry(node: ast.stmt, following: Sequence[ast.stmt]) -> Iterator[str]:
    """Write a class, a function or a type."""
    if isinstance(node, ast.TypeAlias):
        yield f"### {_name(node)}\n\n```python\n{ast.unparse(node)}\n```\n"
        yield from _described(_text_of(following[0]) if following else "")
    elif isinstance(node, ast.ClassDef):
        yield f"### {node.name}\n"
        yield from _described(ast.get_docstring(node) or "")
        yield from _fields(node)
        for member in node.body:
            if isinstance(member, ast.FunctionDef) and _is_shown(member):
                yield from _function(member, f"{node.name}.", "####")
    elif isinstance(node, ast.FunctionDef):
        yield from _function(node, "", "###")


def _is_shown(member: ast.FunctionDef) -> bool:
    return not member.name.startswith("_") or (
        member.name == "__init__" and ast.get_docstring(member) is not None
    )


def _function(node: ast.FunctionDef, owner: str, level: str) -> Iterator[str]:
    """Write a function or method: its signature and what its docstring says."""
    is_property = any(ast.unparse(mark) == "property" for mark in node.decorator_list)
    name = owner.rstrip(".") if node.name == "__init__" else owner + node.name
    title = name if node.name != "__init__" else f"{name}(...)"
    yield f"{level} {title}\n\n```python\n{_signature(node, name, is_property)}\n```\n"
    yield from _described(ast.get_docstring(node) or "")


def _signature(node: ast.FunctionDef, name: str, is_property: bool) -> str:
    returns = ast.unparse(node.returns).strip("'\"") if node.returns else "None"
    if is_property:
        return f"{name}: {returns}"
    arguments = [word for word in _arguments(node.args) if word not in ("self", "cls")]
    end = "" if node.name == "__init__" else f" -> {returns}"
    line = f"{name}({', '.join(arguments)}){end}"
    if len(line) <= 92:
        return line
    inner = "\n".join(f"    {argument}," for argument in arguments)
    return f"{name}(\n{inner}\n){end}"


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    """Write each parameter as it stands in the source."""
    plain = [*arguments.posonlyargs, *arguments.args]
    missing: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults))
    for argument, default in zip(plain, [*missing, *arguments.defaults], strict=True):
        yield _argument(argument, default)
    if arguments.vararg:
        yield f"*{_argument(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _argument(argument, default)
    if arguments.kwarg:
        yield f"**{_argument(arguments.kwarg, None)}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return f"{argument.arg}{kind}" + (f" = {ast.unparse(default)}" if default else "")


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """Write the fields that have a docstring of their own, with types and defaults."""
    rows = []
    for member, after in zip(node.body, node.body[1:], strict=False):
        if isinstance(member, ast.AnnAssign) and (text := _text_of(after)):
            default = f"`{ast.unparse(member.value)}`" if member.value else ""
            kind = ast.unparse(member.annotation).replace("|", r"\|")
            rows.append(f"| `{ast.unparse(member.target)}` | `{kind}` | {default} | {_one(text)} |")
    if rows:
        yield "\n".join(["| field | type | default | |", "|---|---|---|---|", *rows]) + "\n"


def _text_of(node: ast.stmt) -> str:
    """Return the text of a string that stands alone, as docstrings of fields and types do."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return node.value.value if isinstance(node.value.value, str) else ""
    return ""


def _described(docstring: str) -> Iterator[str]:
    """Write a docstring in Google's form: paragraphs, and a table for each section of names."""
    heads = "|".join(_SECTIONS)
    opening, *rest = re.split(rf"^({heads}):\n", docstring, flags=re.MULTILINE)
    if opening.strip():
        yield _markdown(opening.strip()) + "\n"
    for head, body in zip(rest[::2], rest[1::2], strict=True):
        if head in ("Returns", "Yields"):
            yield f"{head}: {_one(body)}\n"
            continue
        label = {"Args": "argument", "Attributes": "attribute", "Raises": "raises"}[head]
        rows = [f"| `{name}` | {_one(text)} |" for name, text in _items(body)]
        yield "\n".join([f"| {label} | |", "|---|---|", *rows]) + "\n"


def _items(body: str) -> Iterator[tuple[str, str]]:
    """Split a section into its names and what is said of each."""
    for item in re.split(r"^    (?=\S)", body, flags=re.MULTILINE)[1:]:
        name, _, text = item.partition(":")
        yield name.strip(), text


def _one(text: str) -> str:
    """Put a text into one line of a table."""
    return " ".join(_markdown(text).split()).replace(" | ", r" \| ")


def _markdown(text: str) -> str:
    """Turn references and literals of reStructuredText into Markdown's."""
    text = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"``([^`]*)``", r"`\1`", text)


def main(argv: Sequence[str]) -> int:
    """Write the page, or compare it.

    Args:
        argv: command line without the program's name.

    Returns:
        Status: 1 where ``--check`` finds another page.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    if not parser.parse_args(argv).check:
        PAGE.write_text(page(), "utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text("utf-8") == page():
        return 0
    print(f"error: {PAGE.relative_to(ROOT)} is not what the docstrings say; run make docs.")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
