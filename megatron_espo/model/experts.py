"""Mixtures of experts: what fits together, and a router that counts the tokens of rows alone.

The layers are Megatron's own. A router scores all experts of a token in float32; the best ones
compute, weighted by their scores. Two kinds of published models have it:

* LLaDA2.0 and 2.1 (arXiv 2512.15745): scores are sigmoids. A bias of each expert, which no gradient
  reaches, is added for the choice alone: it moves towards balance at every training step (arXiv
  2408.15664). Experts come in groups; the groups with the best sums of two are looked at. The
  scores of the chosen are divided by their sum and scaled.
* LLaDA-MoE (arXiv 2509.24389): scores are a softmax over all experts, and weights as they are.

Symbols: t tokens, e experts.
"""

import argparse
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_espo.errors import UserError
from megatron_espo.passes.state import current_pass

# The published rule of LLaDA2.0: the sum of this many scores ranks a group.
_SCORES_OF_GROUP = 2


class CountingRouter(TopKRouter):
    """Megatron's router whose balance does not depend on padding.

    Megatron's own counts take padding along, or fail on its mask (``[t, e]`` against ``[t]``).
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # Megatron leaves such a bias as it is.
        self.frozen_expert_bias = self.config.moe_router_bias_update_rate == 0.0

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts, as Megatron does, and note the choice where the pass asks for it.

        Args:
            logits: ``[w, b, e]``.
            padding_mask: bool ``[w, b]``, True where a token is padding.

        Returns:
            ``[t, e]`` weights and bool ``[t, e]``, the chosen ones.
        """
        weights, chosen = super().routing(logits, padding_mask)
        state = current_pass()
        if state is not None and state.routing is not None:
            state.routing.note(self.layer_number, chosen)
        return weights, chosen

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of each expert in passes with gradients.

        Args:
            routing_map: bool ``[t, e]``.
            padding_mask: bool ``[t]``, True where a token is padding.
        """
        if not self.enable_expert_bias or self.frozen_expert_bias or not torch.is_grad_enabled():
            return
        with torch.no_grad():
            if padding_mask is not None:
                routing_map = routing_map & ~padding_mask[:, None]
            self.local_tokens_per_expert += routing_map.sum(dim=0)

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Attach the balance of each row (DeepSeek-V2, arXiv 2405.04434, eq. 23) to the weights.

        Megatron's divides by the mean length of the rows of a micro-batch, so that the loss of a
        padded row depends on those beside it.

        Args:
            probs: ``[t, e]``.
            scores_for_aux_loss: ``[t, e]``, zero where a token is padding.
            routing_map: bool ``[t, e]``, likewise.
            seq_length: positions of this rank.
            bsz: b.
            with_padding_mask: whether any token is padding.

        Returns:
            ``probs``, whose backward pass adds the loss's gradient.
        """
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if coefficient == 0.0:
            return probs
        # Of whole rows, wherever their positions lie.
        counts = routing_map.view(seq_length, bsz, -1).sum(dim=0).float()
        counts = reduce_from_tensor_model_parallel_region(counts, self.tp_cp_group)
        lengths = (counts.sum(dim=-1) / self.topk).clamp(min=1.0)
        sums = scores_for_aux_loss.view(seq_length, bsz, -1).sum(dim=0)
        factor = coefficient * self.config.num_moe_experts / self.topk
        loss = ((sums * counts).sum(dim=-1) / lengths.square()).mean() * factor
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, loss, "seq_load_balancing_loss", self.tp_cp_group
        )


def is_balanced(config: Any) -> bool:
    """Say whether training passes count tokens, so that all of them must pass every router.

    Args:
        config: the model's transformer config.

    Returns:
        Whether a bias moves or there is an auxiliary loss.
    """
    if config.num_moe_experts is None:
        return False
    moving = config.moe_router_enable_expert_bias and config.moe_router_bias_update_rate != 0.0
    return bool(moving or has_auxiliary_loss(config))


def has_auxiliary_loss(settings: Any) -> bool:
    """Say whether there is an auxiliary loss.

    Args:
        settings: a transformer config or Megatron's arguments.

    Returns:
        Whether its coefficient is above 0.
    """
    if settings.moe_router_load_balancing_type in ("none", ["none"]):
        return False
    coefficients = settings.moe_aux_loss_coeff
    return any(coefficients) if isinstance(coefficients, list) else coefficients > 0.0


def settle_experts(args: argparse.Namespace) -> None:
    """Check the flags of a mixture of experts against each other.

    Args:
        args: Megatron's arguments before its own validation; which layers are mixtures is written
            out layer by layer.

    Raises:
        UserError: naming the flag to change.
    """
    if not args.num_experts:
        if args.expert_model_parallel_size > 1:
            raise UserError(
                f"--expert-model-parallel-size {args.expert_model_parallel_size}: the model has "
                "no experts; leave it out."
            )
        return
    frequency = args.moe_layer_freq
    if isinstance(frequency, int):
        # As Megatron reads a number. Keys of a checkpoint then name each layer in every model.
        frequency = [int(layer % frequency == 0) for layer in range(args.num_layers)]
    if len(frequency) != args.num_layers or set(frequency) - {0, 1}:
        raise UserError(
            f"--moe-layer-freq {frequency} must hold 0 or 1 for each of --num-layers "
            f"{args.num_layers}."
        )
    args.moe_layer_freq = frequency
    if args.moe_router_topk > args.num_experts:
        raise UserError(
            f"--moe-router-topk {args.moe_router_topk} exceeds --num-experts {args.num_experts}."
        )
    _check_scores(args)
    _check_groups(args)
    _check_split(args)
    if args.lora_rank is not None:
        # The base does not move under its adapters.
        args.moe_router_bias_update_rate = 0.0


def shares_experts(args: argparse.Namespace) -> bool:
    """Say whether a layer's experts lie on ranks that work on different rows.

    Args:
        args: Megatron's arguments.

    Returns:
        Whether these ranks must make the same passes.
    """
    tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
    ranks = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or tp)
    return bool(args.num_experts) and ranks > tp * cp


def check_uneven_rows(args: argparse.Namespace, what: str) -> None:
    """Refuse a dispatcher that wants as many tokens on every rank, where they have not.

    Args:
        args: Megatron's arguments.
        what: what is to be done with the model.

    Raises:
        UserError: naming the flag.
    """
    if args.moe_token_dispatcher_type == "allgather" and shares_experts(args):
        raise UserError(
            f"--moe-token-dispatcher-type allgather wants as many tokens on every rank; {what} "
            "has rows of different lengths: use alltoall."
        )


def settle_policy(args: argparse.Namespace) -> None:
    """Keep the routers of a policy from moving by anything but its loss.

    Args:
        args: Megatron's arguments; the rate of the experts' biases becomes 0.

    Raises:
        UserError: naming the flag to change.
    """
    if not args.num_experts:
        return
    check_uneven_rows(args, "ESPO")
    if has_auxiliary_loss(args):
        raise UserError(
            "--moe-aux-loss-coeff is a loss of pre-training and fine-tuning; ESPO's has no such "
            "part: leave it out."
        )
    # Old, current and reference policies then choose with the same biases.
    args.moe_router_bias_update_rate = 0.0


def check_stored_optimizer(
    args: argparse.Namespace, stored: argparse.Namespace, source: str
) -> None:
    """Refuse an optimizer's state that Megatron keeps in another form than it would look for.

    With expert parallelism it has an optimizer of its own for the experts.

    Args:
        args: Megatron's arguments.
        stored: those of the checkpoint whose optimizer is to be loaded.
        source: flag and folder.

    Raises:
        UserError: naming the flag.
    """
    theirs = getattr(stored, "expert_model_parallel_size", 1)
    ours = args.expert_model_parallel_size
    if args.num_experts and (theirs > 1) != (ours > 1):
        raise UserError(
            f"{source} was saved with --expert-model-parallel-size {theirs}: its optimizer's state "
            f"does not move to {ours}; use {'2 or more' if theirs > 1 else 1}, or begin a run with "
            f"{source.replace('--load', '--pretrained-checkpoint')}."
        )


def _check_scores(args: argparse.Namespace) -> None:
    """Check how experts are scored."""
    if args.moe_router_score_function == "softmax" and args.moe_router_enable_expert_bias:
        raise UserError(
            "--moe-router-enable-expert-bias is added to sigmoids; use --moe-router-score-function "
            "sigmoid or leave it out."
        )
    if args.add_bias_linear:
        raise UserError("--num-experts: experts have no biases; pass --disable-bias-linear.")
    if args.moe_grouped_gemm and args.transformer_impl != "transformer_engine":
        raise UserError(
            "--moe-grouped-gemm needs --transformer-impl transformer_engine; leave it out."
        )


def _check_groups(args: argparse.Namespace) -> None:
    """Check the groups of experts against the rule that ranks them."""
    groups, best = args.moe_router_num_groups, args.moe_router_group_topk
    if groups is None and best is None:
        if args.moe_router_score_function == "sigmoid":
            raise UserError(
                "--moe-router-num-groups and --moe-router-group-topk are missing, without which "
                "passes with and without gradients sum the scores of experts in another order; "
                f"pass 1 group, or as many as the model has, and a {_SCORES_OF_GROUP}nd part of "
                "--moe-router-topk."
            )
        return
    if groups is None or best is None:
        raise UserError("--moe-router-num-groups and --moe-router-group-topk: pass both or none.")
    if args.num_experts % groups:
        raise UserError(
            f"--num-experts {args.num_experts} cannot be split into --moe-router-num-groups "
            f"{groups}."
        )
    if best > groups or args.num_experts // groups * best < args.moe_router_topk:
        raise UserError(
            f"--moe-router-group-topk {best} of --moe-router-num-groups {groups} do not hold "
            f"--moe-router-topk {args.moe_router_topk} experts."
        )
    if args.moe_router_topk != _SCORES_OF_GROUP * best:
        raise UserError(
            f"--moe-router-topk {args.moe_router_topk} with --moe-router-group-topk {best}: groups "
            f"are ranked by the sum of their best {_SCORES_OF_GROUP} scores, which Megatron takes "
            f"from this ratio; use --moe-router-group-topk {args.moe_router_topk} / "
            f"{_SCORES_OF_GROUP}."
        )


def _check_split(args: argparse.Namespace) -> None:
    """Check how the experts are split over ranks."""
    tp, ep = args.tensor_model_parallel_size, args.expert_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    if args.num_experts % ep:
        raise UserError(
            f"--num-experts {args.num_experts} is not divisible by --expert-model-parallel-size "
            f"{ep}."
        )
    if tp > 1 and not args.sequence_parallel:
        raise UserError(
            f"--num-experts with --tensor-model-parallel-size {tp}: each rank must route its own "
            "part of the positions; add --sequence-parallel."
        )
    ranks = args.world_size // args.pipeline_model_parallel_size
    if ranks % (ep * etp):
        raise UserError(
            f"{ranks} ranks of a pipeline stage cannot be split into --expert-model-parallel-size "
            f"{ep} x --expert-tensor-parallel-size {etp}; change one."
        )
    peers = tp * args.context_parallel_size
    if ep * etp % peers and peers % (ep * etp):
        raise UserError(
            f"--expert-model-parallel-size {ep} x --expert-tensor-parallel-size {etp}: neither "
            f"divides the {peers} ranks that share a row, nor they it; change one."
        )
    if args.num_layers_per_virtual_pipeline_stage is not None and ep * etp > peers:
        raise UserError(
            "--num-layers-per-virtual-pipeline-stage with experts on ranks of other rows: not "
            "tried; leave it out."
        )
    for name in ("moe_ffn_hidden_size", "ffn_hidden_size"):
        size = getattr(args, name)
        if size is not None and size % etp:
            raise UserError(
                f"--{name.replace('_', '-')} {size} is not divisible by "
                f"--expert-tensor-parallel-size {etp}."
            )
        if size is not None:
            break
    shared = args.moe_shared_expert_intermediate_size
    if shared is not None and shared % tp:
        raise UserError(
            f"--moe-shared-expert-intermediate-size {shared} is not divisible by "
            f"--tensor-model-parallel-size {tp}."
        )
