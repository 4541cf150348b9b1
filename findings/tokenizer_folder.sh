#!/usr/bin/env bash
# transformers 5.23.0 and 4.57.6: a tokenizer folder written by version 5 does not load in version 4.
#
# PreTrainedTokenizerFast.save_pretrained of version 5 writes two fields of tokenizer_config.json that
# version 4 cannot read, although the tokenizer.json beside it is one that both understand:
#
#   "tokenizer_class": "TokenizersBackend"   4: Tokenizer class TokenizersBackend does not exist
#   "extra_special_tokens": [...]            4 wants a mapping; it then takes the file for one of
#                                            SentencePiece and asks for protobuf
#
# With "PreTrainedTokenizerFast" and "additional_special_tokens" in their places both versions load the
# folder, with equal ids and special tokens. It matters where a model's published code asks for version 4.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 5.23.0 4.57.6; do
    "${PYTHON:-python3.12}" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet transformers==$version
done
"$folder/5.23.0/bin/python" - "$folder" <<'PYTHON' 2> /dev/null
import sys

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

backend = Tokenizer(models.WordLevel({"a": 0, "[END]": 1, "<x>": 2}, unk_token="a"))
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="[END]", extra_special_tokens=["<x>"]
)
tokenizer.save_pretrained(f"{sys.argv[1]}/tokenizer")
PYTHON
cat > "$folder/load.py" <<'PYTHON'
import json
import pathlib
import sys

import transformers

folder = pathlib.Path(sys.argv[1], "tokenizer")
path = folder / "tokenizer_config.json"


def load() -> str:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:70]}"
    return f"loaded: {tokenizer('<x>')['input_ids']} {sorted(tokenizer.all_special_tokens)}"


written = json.loads(path.read_text())
results = [load()]
path.write_text(json.dumps({**written, "tokenizer_class": "PreTrainedTokenizerFast"}))
results.append(load())
older = {**written, "tokenizer_class": "PreTrainedTokenizerFast"}
older["additional_special_tokens"] = older.pop("extra_special_tokens")
path.write_text(json.dumps(older))
results.append(load())
path.write_text(json.dumps(written))
for changed, result in zip(("as written", "other class", "other class and list"), results, strict=True):
    print(f"transformers {transformers.__version__}, {changed}: {result}")
loads = "loaded: [2] ['<x>', '[END]']"
if transformers.__version__.startswith("4."):
    assert "TokenizersBackend" in results[0], "the behaviour has changed"
    assert results[1].startswith("ImportError"), "the behaviour has changed"
    assert results[2] == loads, "the behaviour has changed"
else:
    assert results == [loads] * 3, "the behaviour has changed"
PYTHON
for version in 5.23.0 4.57.6; do "$folder/$version/bin/python" "$folder/load.py" "$folder" 2> /dev/null; done
