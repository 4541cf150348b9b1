"""Which tokens an expert gets on GPUs that are not there: as many as every other expert.

Without data no router's choice is known, and from it Megatron works out the sizes of what ranks
exchange. Here each expert gets its share of a rank's tokens, and every rank has as many.
"""

import functools
from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor


def balance_experts() -> None:
    """Let each rank's tokens go to all experts alike."""
    megatrons = MoEAlltoAllTokenDispatcher.preprocess

    @functools.wraps(megatrons)
    def preprocess(self: Any, routing_map: Tensor) -> Tensor:
        megatrons(self, routing_map)  # its collectives are a part of the job
        total, experts = routing_map.size(0) * self.config.moe_router_topk, self.num_experts
        counts = torch.full((experts,), total // experts, device="cpu")
        counts[: total % experts] += 1
        own = counts[self.local_expert_indices[0] : self.local_expert_indices[-1] + 1]
        ranks, tp = self.ep_size, self.tp_size
        if ranks > 1 or tp > 1:
            # As they come from a device's copy on the host.
            self.input_splits = counts.view(ranks, -1).sum(dim=1).numpy()
            self.output_splits = own.sum().repeat(ranks).numpy()
            self.output_splits_tp = (own.sum() * ranks).repeat(tp).numpy()
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = own.repeat(tp * ranks, 1)
        return own * (tp * ranks)

    setattr(MoEAlltoAllTokenDispatcher, "preprocess", preprocess)  # noqa: B010
