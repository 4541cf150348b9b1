# Sourced by the tiny demonstrations, which set: out (a folder), python, ranks, started (SECONDS).

# check_folder MARK refuses a folder with other things than an earlier run of the script, which left
# MARK there; new_folder MARK empties it.
check_folder() {
  if [[ -e $out || -L $out ]] && [[ ! -d $out || (-n $(ls -A "$out") && ! -e $out/$1) ]]; then
    echo "error: --out $out is not empty and holds no earlier run of this script; choose another." >&2
    exit 2
  fi
}
new_folder() { rm -rf "$out" && mkdir -p "$out" && touch "$out/$1"; }

say() { printf '\n\033[1m[%3ds] %s\033[0m\n' $((SECONDS - started)) "$*"; }

# ranks LOG ARGUMENTS starts the ranks of a program. The log keeps all that is printed, the console
# shows what happens.
ranks() {
  local log=$1 status; shift
  set +e
  "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" "$@" 2>&1 |
    tee "$out/$log.log" |
    grep -E --line-buffered '^error|^rollout|^held-out|^iteration [0-9]+/|^validation loss|^\[rank[0-9]+\]: [A-Za-z.]*Error'
  status=${PIPESTATUS[0]} # of the ranks: grep fails where it has nothing to show
  set -e
  return "$status"
}

# begin_with_text MARK goes to the project's folder (root) and makes out; without --text (text) the
# project's own documents are read.
begin_with_text() {
  ((${#text[@]})) || text=("$root/README.md" "$root/CONTRIBUTING.md" "$root/docs" "$root/megatron_espo")
  [[ $python != */* ]] || python=$(realpath -s "$python")
  cd "$root"
  export OMP_NUM_THREADS=1 PYTHONPATH=${PYTHONPATH:-$PWD}
  check_folder "$1"
  new_folder "$1"
}

# prepare_text PATH ... makes a tokenizer and $out/text.bin of files and of folders' files, and says
# in pages how many documents they are: of a page each, so that a few long files can be shared out
# to training and validation.
prepare_text() {
  pages=$("$python" - "$out" "$@" <<'PYTHON'
import json, sys
from pathlib import Path

out, most, pages = Path(sys.argv[1]), 50_000_000, []
for given in map(Path, sys.argv[2:]):
    if not given.exists():
        sys.exit(f"error: --text {given}: no such file or folder.")
    # A folder's hidden files are left out, and what is no text.
    inside = [given] if given.is_file() else sorted(given.rglob("*"))
    for path in inside:
        shown = path == given or not any(p.startswith(".") for p in path.relative_to(given).parts)
        if not (shown and path.is_file()) or sum(map(len, pages)) > most:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        if "\0" in text:
            continue
        page = ""
        for line in text.splitlines(keepends=True):
            page += line
            if len(page) > 1500:
                pages, page = [*pages, page], ""
        pages += [page] if page.strip() else []
if not pages:
    sys.exit(f"error: --text {' '.join(sys.argv[2:])}: holds no text.")
with (out / "text.jsonl").open("w") as file:
    file.writelines(json.dumps({"text": page}) + "\n" for page in pages)
(out / "text.txt").write_text("".join(pages), "utf-8")
print(len(pages))
PYTHON
)
  # Whole words, where the text has enough of them; else its bytes.
  "$python" tools/make_tokenizer.py --out "$out/tokenizer" --train "$out/text.txt" --vocab-size 1024 \
    2>/dev/null || "$python" tools/make_tokenizer.py --out "$out/tokenizer"
  "$python" tools/preprocess_data.py --input "$out/text.jsonl" --tokenizer-model "$out/tokenizer" \
    --output-prefix "$out/text"
}
