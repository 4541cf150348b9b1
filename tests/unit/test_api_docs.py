"""docs/api.md says what the docstrings say, of names that can be imported."""

import importlib
import inspect
from pathlib import Path

import pytest
from tool_loading import load_tool

api_docs = load_tool("make_api_docs")


def test_the_page_is_what_the_docstrings_say() -> None:
    committed = api_docs.PAGE.read_text("utf-8")
    assert committed == api_docs.page(), "run make docs"
    assert api_docs.main(["--check"]) == 0


@pytest.mark.parametrize("part", api_docs.PARTS, ids=lambda part: part.title)
def test_names_are_imported_as_the_page_says(part) -> None:
    module = importlib.import_module(part.module)
    for name in part.names:
        found = getattr(module, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            # Of the file that is read, not of another one with that name.
            assert inspect.getsourcefile(found) == str(api_docs.ROOT / "megatron_espo" / part.file)


def test_what_is_public_in_python_is_on_the_page() -> None:
    import megatron_espo.api

    listed = {name for part in api_docs.PARTS for name in part.names}
    assert set(megatron_espo.api.__all__) <= listed


def test_signatures_sections_and_fields_are_written(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        'type Text = str\n"""A text."""\n\n'
        'class C:\n    """Holds.\n\n    Attributes:\n        a: first, ``[n]``.\n    """\n\n'
        '    b: int | None = 3\n    """How many."""\n\n'
        '    @property\n    def size(self) -> int:\n        """Of :class:`C`."""\n\n'
        '    def _hidden(self) -> None:\n        """No."""\n\n'
        'def f(a: int, /, *rest: str, key: float = 0.5, **more: int) -> "C":\n'
        '    """Do it.\n\n    Args:\n        a: one\n            more line.\n'
        "        **more: all.\n\n"
        '    Returns:\n        It.\n\n    Raises:\n        ValueError: always.\n    """\n'
    )
    part = api_docs.Part("Title", "Text.", "m", "m.py", ("Text", "C", "f"))
    found = api_docs.page([part], tmp_path)
    for line in (
        "## Title\n\n`m`. Text.\n",
        "type Text = str\n```\n\nA text.\n",
        "| `a` | first, `[n]`. |",
        r"| `b` | `int \| None` | `3` | How many. |",
        "C.size: int\n```\n\nOf `C`.\n",
        "f(a: int, *rest: str, key: float = 0.5, **more: int) -> C",
        "| `a` | one more line. |\n| `**more` | all. |",
        "Returns: It.",
        "| `ValueError` | always. |",
    ):
        assert line in found, line
    assert "_hidden" not in found
    with pytest.raises(SystemExit, match=r"m\.py has no g"):
        api_docs.page([part._replace(names=("g",))], tmp_path)
