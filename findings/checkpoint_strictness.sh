#!/usr/bin/env bash
# Megatron-Core 0.19.2 with PyTorch 2.15.0: megatron.core.dist_checkpointing.load(..., strict=...).
#
# `strict` says what is done with keys that only the checkpoint has, or only the model. Expected: all
# of its eight values load a checkpoint that holds exactly what is asked for. Seen: only the default
# one, assume_ok_unexpected, does. Every other value first reads what the checkpoint holds, and that
# passes all fields of PyTorch's TensorProperties on to torch.empty; PyTorch 2.15 has added `strides`
# to them, and torch.empty takes no such argument:
#
#   TypeError: empty() got an unexpected keyword argument 'strides'
#
# With PyTorch 2.14.1 all eight work. Megatron-Core asks for torch>=2.6.0, so pip installs the pair.
# In Megatron's training it is --dist-ckpt-strictness.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet megatron-core==0.19.2 torch==2.15.0 numpy==2.5.5 psutil==7.2.2
# a file, since saving starts a process that imports it
cat > "$folder/strictness.py" <<'PYTHON'
import sys

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

# saving calls these two even if all tensors are on the CPU
torch.cuda.synchronize = lambda: None
torch.cuda.current_device = lambda: "cpu"


def state(value: float) -> dict:
    weight = torch.full((4,), value)
    return {"weight": dist_checkpointing.ShardedTensor.from_rank_offsets("weight", weight)}


def load(checkpoint: str, strict: StrictHandling) -> str:
    try:
        loaded = dist_checkpointing.load(state(0.0), checkpoint, strict=strict)
    except TypeError as error:
        return f"TypeError: {error}"
    if isinstance(loaded, tuple):  # with the missing and the unexpected keys
        loaded = loaded[0]
    assert loaded["weight"].tolist() == [1.0] * 4
    return "loaded"


def main(checkpoint: str) -> None:
    assert torch.__version__.startswith("2.15.0"), torch.__version__
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    dist_checkpointing.save(state(1.0), checkpoint)
    results = {strict: load(checkpoint, strict) for strict in StrictHandling}
    for strict, result in results.items():
        print(f"{strict.value}: {result}")
    assert results.pop(StrictHandling.ASSUME_OK_UNEXPECTED) == "loaded"
    for result in results.values():
        assert "TypeError" in result and "strides" in result, "the behaviour has changed"
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
PYTHON
mkdir "$folder/checkpoint"
CUDA_VISIBLE_DEVICES="" "$folder/venv/bin/python" -W ignore "$folder/strictness.py" "$folder/checkpoint"
echo "as described"
