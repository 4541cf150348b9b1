#!/usr/bin/env bash
# Pre-trains a tiny masked-diffusion model on plain text, through the path that 8B pre-training
# takes (Megatron's indexed data, pretrain(), torch_dist checkpoints), and samples from it.
#
#   examples/pretrain_tiny.sh [--text PATH ...] [--out DIR] [-- Megatron flags]
#
# PATH is a file or a folder, of whose files all are read that hold text. Without --text it reads the
# project's own documents. Environment: PYTHON (python3), RANKS (2).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

text=() out="$root/runs/pretrain-tiny"
while (($#)); do
  case $1 in
    --text)
      shift
      while (($#)) && [[ $1 != --* ]]; do text+=("$(realpath -m "$1")"); shift; done
      ;;
    --out) out=$(realpath -ms "$2"); shift 2 ;;
    --) shift; break ;;
    *) echo "error: unknown argument $1; see the head of $0." >&2; exit 2 ;;
  esac
done
((${#text[@]})) || text=("$root/README.md" "$root/CONTRIBUTING.md" "$root/docs" "$root/megatron_espo")
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(realpath -s "$python")
cd "$root"
export OMP_NUM_THREADS=1 PYTHONPATH=${PYTHONPATH:-$PWD}
if [[ -e $out || -L $out ]] && [[ ! -d $out || (-n $(ls -A "$out") && ! -e $out/.pretrain-tiny) ]]; then
  echo "error: --out $out is not empty and holds no earlier run of this script; choose another." >&2
  exit 2
fi
rm -rf "$out" && mkdir -p "$out" && touch "$out/.pretrain-tiny"

# Documents of a page each, so that a few long files can be shared out to training and validation.
pages=$("$python" - "$out" "${text[@]}" <<'PYTHON'
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
# So few pages leave none to validate on.
split=(--split 95,5,0 --eval-interval 100 --eval-iters 4)
((pages >= 40)) || split=(--split 100,0,0 --eval-iters 0)
status=0
"$python" -m torch.distributed.run --standalone --nproc-per-node "${RANKS:-2}" \
  -m megatron_espo.training.pretrain --preset tiny --tokenizer-model "$out/tokenizer" \
  --data-path "$out/text" "${split[@]}" --seq-length 128 --micro-batch-size 8 \
  --global-batch-size 32 --train-iters 600 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine \
  --lr-warmup-iters 20 --adam-beta2 0.98 --weight-decay 0.01 --log-interval 20 \
  --save "$out/checkpoint" --tensorboard-dir "$out/tensorboard" "$@" \
  2>"$out/pretrain.log" || status=$?
if ((status)); then # torchrun's report is long; the sentence is what counts
  grep -E '^error|^\[rank[0-9]+\]: [A-Za-z.]*Error' "$out/pretrain.log" >&2 || tail -n 20 "$out/pretrain.log" >&2
  exit "$status"
fi
"$python" tools/generate.py --load "$out/checkpoint" --tokenizer-model "$out/tokenizer" \
  --prompt "The " "def " "Masked diffusion " --rollout-completion-length 48 \
  --rollout-block-length 16 --rollout-denoising-steps 48 --rollout-remasking random \
  --rollout-temperature 0.6
