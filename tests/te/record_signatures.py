"""Record the parameters of Transformer Engine's classes and functions that Megatron calls.

    python tests/te/record_signatures.py FOLDER_OF_AN_UNPACKED_WHEEL > tests/te/signatures.json

Reads the source; Transformer Engine itself cannot be imported without CUDA's libraries.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

MODULES = "transformer_engine/pytorch/module"
ATTENTION = "transformer_engine/pytorch/attention/dot_product_attention"
QUANTIZATION = "transformer_engine/pytorch/quantization.py"
# Name in the stand-in -> file and path of the definition; of several, keywords are joined.
SOURCES = {
    "Linear.__init__": [(f"{MODULES}/linear.py", "Linear.__init__")],
    "Linear.forward": [(f"{MODULES}/linear.py", "Linear.forward")],
    "LayerNormLinear.__init__": [(f"{MODULES}/layernorm_linear.py", "LayerNormLinear.__init__")],
    "LayerNormLinear.forward": [(f"{MODULES}/layernorm_linear.py", "LayerNormLinear.forward")],
    # Passes its **kwargs on to the operation of the same name.
    "RMSNorm.__init__": [
        (f"{MODULES}/rmsnorm.py", "RMSNorm.__init__"),
        ("transformer_engine/pytorch/ops/basic/rmsnorm.py", "RMSNorm.__init__"),
    ],
    "DotProductAttention.__init__": [
        (f"{ATTENTION}/dot_product_attention.py", "DotProductAttention.__init__")
    ],
    "DotProductAttention.forward": [
        (f"{ATTENTION}/dot_product_attention.py", "DotProductAttention.forward")
    ],
    "fp8_autocast": [(QUANTIZATION, "fp8_autocast")],
    "fp8_model_init": [(QUANTIZATION, "fp8_model_init")],
}
RECIPES = ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling")


def find(tree: ast.AST, path: str) -> Any:
    """Find a definition by its dotted path."""
    for name in path.split("."):
        tree = next(
            node
            for node in tree.body  # type: ignore[attr-defined]
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
        )
    return tree


def parameters(function: ast.FunctionDef) -> dict[str, bool]:
    """Parameter names without self, and whether each must be given."""
    named = [a.arg for a in function.args.args]
    required = len(named) - len(function.args.defaults)
    result = {name: place < required for place, name in enumerate(named) if name != "self"}
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        result[argument.arg] = default is None
    return result


def main(folder: Path) -> None:
    """Print the record."""

    def tree(path: str) -> ast.AST:
        return ast.parse((folder / path).read_text())

    record: dict[str, dict[str, bool]] = {}
    for name, places in SOURCES.items():
        joined: dict[str, bool] = {}
        for path, definition in places:
            for parameter, required in parameters(find(tree(path), definition)).items():
                joined.setdefault(parameter, required)
        record[name] = joined
    recipes = tree("transformer_engine/common/recipe/__init__.py")
    for name in RECIPES:
        fields = [n for n in find(recipes, name).body if isinstance(n, ast.AnnAssign)]
        record[name] = {field.target.id: field.value is None for field in fields}
    metadata = next(folder.glob("transformer_engine-*.dist-info"))
    version = metadata.name.removeprefix("transformer_engine-").removesuffix(".dist-info")
    lines = [f'  "{name}": {json.dumps(names)}' for name, names in record.items()]
    body = ",\n".join(lines)
    print(f'{{\n  "version": "{version}",\n{body}\n}}')


if __name__ == "__main__":
    main(Path(sys.argv[1]))
