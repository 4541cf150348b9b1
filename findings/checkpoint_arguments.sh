#!/usr/bin/env bash
# Megatron-Core 0.19.2, megatron.training: --use-checkpoint-args.
#
# A checkpoint holds all arguments of its run, and the option's help is "Override model-related
# command-line arguments with arguments from checkpoint." Expected: the model is built as the one that
# was saved. Seen: the arguments that are taken over are a fixed list, which names the rotary base and
# the normalization but not other settings that change what the model computes. They silently keep the
# defaults of the command line:
#
#   taken over: num_layers hidden_size num_attention_heads rotary_base rotary_percent normalization add_bias_linear
#   layernorm_epsilon: saved 1e-06, loaded 1e-05
#   qk_layernorm: saved True, loaded False
#   use_rope_scaling: saved True, loaded False
#   rope_scaling_factor: saved 4.0, loaded 8.0
#   rotary_seq_len_interpolation_factor: saved 2, loaded None
#   quick_geglu: saved True, loaded False
#   glu_linear_offset: saved 1.0, loaded 0.0
#   activation_func_clamp_value: saved 7.0, loaded None
#
# Such flags have to be given again, or their values copied from the saved arguments.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet megatron-core==0.19.2 torch==2.15.0 numpy==2.5.5 psutil==7.2.2
# a file, since saving starts a process that imports it
cat > "$folder/arguments.py" <<'PYTHON'
import contextlib
import io
import sys
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint

# saving calls these two even if all tensors are on the CPU
torch.cuda.synchronize = lambda: None
torch.cuda.current_device = lambda: "cpu"

TAKEN = """--num-layers 1 --hidden-size 8 --num-attention-heads 2 --rotary-base 5000 --rotary-percent 0.5
    --normalization RMSNorm --disable-bias-linear"""
LEFT = """--norm-epsilon 1e-6 --qk-layernorm --use-rope-scaling --rope-scaling-factor 4
    --rotary-seq-len-interpolation-factor 2 --quick-geglu --glu-linear-offset 1
    --activation-func-clamp-value 7"""
COMMON = "--micro-batch-size 1 --seq-length 8 --max-position-embeddings 8 --position-embedding-type rope"


def arguments(flags: str):
    """What Megatron's training does with its command line."""
    sys.argv[1:] = flags.split()
    with contextlib.redirect_stdout(io.StringIO()):  # it lists all arguments
        args = parse_args()
        if args.use_checkpoint_args:
            load_args_from_checkpoint(args)
        validate_args(args)
    return args


def main(folder: Path) -> None:
    saved = arguments(f"{COMMON} {TAKEN} {LEFT}")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    (folder / "iter_0000001").mkdir()
    dist_checkpointing.save({"args": saved, "iteration": 1}, str(folder / "iter_0000001"))
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    torch.distributed.destroy_process_group()

    loaded = arguments(f"--micro-batch-size 1 --use-checkpoint-args --load {folder}")
    taken = "num_layers hidden_size num_attention_heads rotary_base rotary_percent normalization add_bias_linear"
    print("taken over:", taken)
    for name in taken.split():
        assert getattr(loaded, name) == getattr(saved, name), name
    for name in (
        "layernorm_epsilon qk_layernorm use_rope_scaling rope_scaling_factor "
        "rotary_seq_len_interpolation_factor quick_geglu glu_linear_offset activation_func_clamp_value"
    ).split():
        was, now = getattr(saved, name), getattr(loaded, name)
        print(f"{name}: saved {was}, loaded {now}")
        assert was != now, "the behaviour has changed"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
PYTHON
mkdir "$folder/checkpoint"
CUDA_VISIBLE_DEVICES="" "$folder/venv/bin/python" -W ignore "$folder/arguments.py" "$folder/checkpoint"
echo "as described"
