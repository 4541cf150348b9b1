#!/usr/bin/env bash
# Megatron-Core 0.19.2, megatron.training: --dist-ckpt-strictness raise_all.
#
# The value raises on any difference between the keys of the checkpoint and those that are asked for.
# Expected: a run resumes from its own checkpoint. Seen: with the default --rerun-mode it never does,
# unless a rerun was under way. The state of the rerun machine is saved always, so that all checkpoints
# have one structure, but asked for only if the saved state says that the machine was at work:
#
#   rerun mode disabled: resumed at iteration 1
#   rerun mode validate_results: Some keys found in the checkpoint are missing in the provided sharded state dict.
#   Missing keys (for all ranks): {'rerun_state_machine_state'}.
#
# PyTorch is 2.14.1, since with 2.15.0 the value raises before this (checkpoint_strictness.sh).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet megatron-core==0.19.2 torch==2.14.1 numpy==2.5.5 psutil==7.2.2
# a file, since saving starts a process that imports it
cat > "$folder/resume.py" <<'PYTHON'
import contextlib
import io
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.rerun_state_machine import (
    RerunMode,
    destroy_rerun_state_machine,
    initialize_rerun_state_machine,
)
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.global_vars import set_args
from torch.overrides import TorchFunctionMode

# saving and loading call these even if all tensors are on the CPU
torch.cuda.synchronize = torch.cuda.empty_cache = lambda: None
torch.cuda.current_device = lambda: "cpu"
torch.cuda.get_rng_state = torch.get_rng_state


class OnCPU(TorchFunctionMode):
    """The number of the iteration is compared across ranks in a CUDA tensor."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


class Model(MegatronModule):
    def __init__(self) -> None:
        super().__init__(TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1))
        self.linear = torch.nn.Linear(4, 4)


def resume(folder: Path, mode: str) -> str:
    """Save a model and load it again, as training does, without an optimizer."""
    sys.argv[1:] = (
        "--num-layers 1 --hidden-size 4 --num-attention-heads 1 --seq-length 4 --max-position-embeddings 4 "
        "--micro-batch-size 1 --no-save-optim --no-load-optim --no-save-rng --no-load-rng --save-interval 1 "
        f"--save {folder} --load {folder} --dist-ckpt-strictness raise_all --rerun-mode {mode}"
    ).split()
    with contextlib.redirect_stdout(io.StringIO()):  # it lists all arguments
        args = parse_args()
        validate_args(args)
    set_args(args)
    destroy_rerun_state_machine()
    initialize_rerun_state_machine(mode=RerunMode(args.rerun_mode))
    save_checkpoint(1, [Model()], None, None, 0)
    try:
        iteration, _ = load_checkpoint([Model()], None, None)
    except CheckpointingException as error:
        return str(error)
    return f"resumed at iteration {iteration}"


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    init_num_microbatches_calculator(0, None, 1, 1, 1)
    with OnCPU():
        results = {mode: resume(folder / mode, mode) for mode in ("disabled", "validate_results")}
    for mode, result in results.items():
        print(f"rerun mode {mode}: {result}")
    assert results["disabled"] == "resumed at iteration 1"
    assert "{'rerun_state_machine_state'}" in results["validate_results"], "the behaviour has changed"
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
PYTHON
mkdir "$folder/disabled" "$folder/validate_results"
CUDA_VISIBLE_DEVICES="" "$folder/venv/bin/python" -W ignore "$folder/resume.py" "$folder"
echo "as described"
