#!/usr/bin/env bash
# Megatron-Core 0.19.2: a router with expert biases and a padding mask.
#
# GPTModel.forward takes a padding_mask, so that tokens that are padding count neither in the
# auxiliary loss nor in the biases of experts. Expected: tokens_per_expert counts the others alone.
# Seen, in TopKRouter._apply_expert_bias: the mask of t tokens meets the map of [t, e] tokens and
# experts without an axis for the experts.
#
# * t != e: RuntimeError, "The size of tensor a (8) must match the size of tensor b (6)";
# * t == e: no error, and whole experts are left out in place of tokens.
#
# The auxiliary loss, in the same call, masks tokens. Runs on a CPU; what Megatron asks of
# torch.cuda.current_device() is answered with the CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet megatron-core==0.19.2 torch==2.15.0 numpy==2.5.5 psutil==7.2.2
CUDA_VISIBLE_DEVICES="" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"
import torch

torch.cuda.current_device = lambda: torch.device("cpu")
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
EXPERTS = 8
config = TransformerConfig(
    num_layers=1, hidden_size=4, num_attention_heads=1, num_moe_experts=EXPERTS,
    moe_router_topk=2, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
    moe_router_load_balancing_type="none", use_cpu_initialization=True,
)
groups = ProcessGroupCollection.use_mpu_process_groups()


def counted(tokens: int) -> tuple[str, int]:
    """Count the tokens of each expert where the last two of all are padding."""
    torch.manual_seed(0)
    router = TopKRouter(config, pg_collection=groups)
    padding = torch.zeros(tokens, 1, dtype=torch.bool)
    padding[-2:] = True
    try:
        router.routing(torch.randn(tokens, 1, EXPERTS), padding_mask=padding)
    except RuntimeError as error:
        return str(error), 0
    return "no error", int(router.local_tokens_per_expert.sum())


other, _ = counted(6)
print(f"6 tokens, {EXPERTS} experts:", other)
equal, total = counted(EXPERTS)
per_token = (EXPERTS - 2) * 2
print(f"{EXPERTS} tokens, {EXPERTS} experts: {equal}, {total} choices counted, of {per_token}")
assert "must match the size" in other, "the behaviour has changed"
assert equal == "no error" and total != per_token, "the behaviour has changed"
PYTHON
echo "as described"
