"""Memory of one GPU by part: arithmetic on counts, for the most loaded pipeline stage.

Weights, gradients and optimizer are exact but for the padding of Megatron's buffers (a few
kilobytes per bucket). Activations are the tensors that a backward pass keeps (arXiv 2205.05198,
section 4, for a gated MLP, without dropout, with an attention kernel that does not store its
scores). Caches of rollouts are exact for rows of the full length; the working memory of rollouts
and ELBO passes and the overhead of CUDA and NCCL are estimates.
"""

import argparse
from dataclasses import dataclass

import torch

from megatron_espo.checkpoint.shape import query_groups
from megatron_espo.config import RolloutConfig
from megatron_espo.generation.flight import micro_batches
from megatron_espo.plan.parameters import StageParameters

GB = 10**9

# CUDA context, NCCL's buffers, workspaces of cuBLAS and Transformer Engine, fragmentation.
OVERHEAD = 4 * GB


@dataclass(frozen=True)
class Passes:
    """The model passes of a run, as far as memory depends on them.

    Attributes:
        rows: rows of a micro-batch with gradients.
        positions: positions of a row.
        head_rows: hidden states of a micro-batch that reach the output head.
        num_batches: micro-batches of an optimizer step.
        sampling: settings of the rollouts, or None without.
        sampled_rows: most completions that one call of the sampler makes on a rank.
        keeps_reference: whether a reference policy is kept on the host.
        fp8_gradients: whether passes with gradients compute in FP8, where any pass does.
    """

    rows: int
    positions: int
    head_rows: int
    num_batches: int
    sampling: RolloutConfig | None = None
    sampled_rows: int = 0
    keeps_reference: bool = False
    fp8_gradients: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, and of the host for each rank.

    Attributes:
        weights: what the layers read.
        quantised: FP8 copies of the linear weights and their transposes.
        gradients: the gradient buffer.
        optimizer: master weights and Adam's two moments.
        activations: kept for the backward pass of an update, with the logits of its masked rows.
        rollout: working memory of a sampling pass; not at the same time as activations.
        cache: keys and values that a rollout keeps; at the same time as ``rollout``.
        overhead: what CUDA and NCCL take.
        reference: the reference policy, on the host.
        offloaded: optimizer state on the host.
    """

    weights: float
    quantised: float
    gradients: float
    optimizer: float
    activations: float
    rollout: float
    cache: float
    overhead: float
    reference: float
    offloaded: float

    @property
    def total(self) -> float:
        """Bytes of the GPU at the peak."""
        lasting = self.weights + self.quantised + self.gradients + self.optimizer + self.overhead
        return lasting + max(self.activations, self.rollout + self.cache)

    @property
    def host(self) -> float:
        """Bytes of the host for this rank."""
        return self.reference + self.offloaded


def parameter_bytes(args: argparse.Namespace) -> tuple[int, int, float]:
    """Bytes of one parameter: as weight, as gradient, and in the optimizer.

    Args:
        args: Megatron's validated arguments.

    Returns:
        Bytes of a weight, of its gradient, and of its optimizer state, the latter as an average
        over the data-parallel ranks with the distributed optimizer.
    """
    half = args.bf16 or args.fp16
    weight = 2 if half else 4
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 or not half else 2
    # Without half precision the weights are their own master copy.
    state = [torch.float32] * (3 if half else 2)
    if args.use_precision_aware_optimizer:
        state = [args.main_params_dtype, args.exp_avg_dtype, args.exp_avg_sq_dtype]
    optimizer = float(sum(dtype.itemsize for dtype in state))
    if args.use_distributed_optimizer:
        optimizer /= args.data_parallel_size
    return weight, gradient, optimizer


def layer_activations(args: argparse.Namespace, rows: int, positions: int) -> float:
    """Bytes that one layer keeps for its backward pass.

    Args:
        args: Megatron's validated arguments.
        rows: rows of the micro-batch.
        positions: positions per row.

    Returns:
        Bytes.
    """
    tp, size = args.tensor_model_parallel_size, 2 if args.bf16 or args.fp16 else 4
    shared = tp if args.sequence_parallel else 1
    heads, dim = args.num_attention_heads, args.kv_channels
    groups = query_groups(args)
    selective = args.recompute_granularity == "selective"
    again = args.recompute_modules if selective else ()
    # Input and output of both norms.
    outside = (2 if "layernorm" in again else 4) * args.hidden_size / shared
    # q, k, v; the attention's output; gate and up projection, and their product.
    mlp = 0 if "mlp" in again else 3 * args.ffn_hidden_size
    inside = ((2 * heads + 2 * groups) * dim + mlp) / tp
    tokens = rows * positions
    kept = tokens * size * (outside + inside)
    if args.transformer_impl == "local" and "core_attn" not in again:
        # Scores before and after the softmax.
        kept += 2 * size * rows * heads / tp * positions**2
    return kept


def activation_memory(args: argparse.Namespace, passes: Passes) -> float:
    """Bytes that the micro-batches in flight keep, and the logits of one of them.

    Args:
        args: Megatron's validated arguments.
        passes: sizes of the passes.

    Returns:
        Bytes on the first pipeline stage, which has most micro-batches in flight, with the head
        of the last.
    """
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    layer = layer_activations(args, passes.rows, passes.positions)
    layers = args.num_layers / pp
    in_flight = min(pp, passes.num_batches)
    if args.virtual_pipeline_model_parallel_size:
        in_flight *= 1 + (pp - 1) / (pp * args.virtual_pipeline_model_parallel_size)
    if args.recompute_granularity == "full":
        size = 2 if args.bf16 or args.fp16 else 4
        inputs = size * passes.rows * passes.positions * args.hidden_size
        inputs /= tp if args.sequence_parallel else 1
        kept = in_flight * layers * inputs + layer
    else:
        kept = in_flight * layers * layer
    return kept + logits_memory(args, passes.head_rows)


def logits_memory(args: argparse.Namespace, head_rows: float) -> float:
    """Bytes of the logits of some rows, from the output head to its backward pass.

    Logits are float32 (model/float_logits.py). Megatron's cross entropy works in place: softmax and
    gradient take the place of the logits; the head's backward pass gets the gradient in its
    weights' type.
    """
    gradient = 2 if args.bf16 or args.fp16 else 0
    return head_rows * args.padded_vocab_size / args.tensor_model_parallel_size * (4 + gradient)


def rollout_memory(args: argparse.Namespace, sampling: RolloutConfig, positions: int) -> float:
    """Estimate the working memory of a sampling pass: one layer and the logits of a block."""
    rows = sampling.micro_batch_size * (2 if sampling.guidance_scale > 0.0 else 1)
    # In float32, and a copy where more is read from them than one distribution.
    copied = sampling.temperature not in (0.0, 1.0) or sampling.remasking == "entropy"
    entry = 4 * (2 if copied or sampling.guidance_scale > 0.0 else 1)
    logits = rows * sampling.block_length * args.padded_vocab_size * entry
    return layer_activations(args, rows, positions) + logits / args.tensor_model_parallel_size


def cache_memory(args: argparse.Namespace, passes: Passes) -> float:
    """Bytes of the keys and values that a rollout keeps (see parallel/passes.py).

    Args:
        args: Megatron's validated arguments.
        passes: sizes of the passes.

    Returns:
        Bytes of this rank's layers and heads, for all rows in flight at full length; 0 without
        --rollout-cache. prefix and dual keep the same: all positions of the rows.
    """
    sampling = passes.sampling
    if sampling is None or sampling.cache == "none":
        return 0.0
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    groups = query_groups(args)
    number, rows = micro_batches(passes.sampled_rows, sampling.micro_batch_size, pp)
    size = 2 if args.bf16 or args.fp16 else 4
    per_position = 2 * size * groups / tp * args.kv_channels * args.num_layers / pp
    return number * rows * passes.positions * per_position


def quantised_memory(args: argparse.Namespace, linear: int, *, with_gradients: bool) -> float:
    """Bytes of the FP8 copies that Transformer Engine keeps of the linear weights.

    A copy stays with its layer until the next pass in FP8 replaces it, whatever --espo-fp8-phases
    says of the passes between. It holds the weights along their rows and, once a pass with
    gradients has asked for it, along their columns (Transformer Engine 2.20,
    ``module/linear.py``: ``columnwise_usage``).

    Args:
        args: Megatron's validated arguments.
        linear: the layers' linear weights on this rank.
        with_gradients: whether passes with gradients compute in FP8.

    Returns:
        Bytes without the scales; 0 without FP8.
    """
    if not args.fp8 or getattr(args, "fp8_param", False):
        return 0.0
    return float(linear * (2 if with_gradients else 1))


def plan_memory(args: argparse.Namespace, stage: StageParameters, passes: Passes) -> Memory:
    """Add up the memory of one rank.

    Args:
        args: Megatron's validated arguments.
        stage: parameters of the rank.
        passes: sizes of its passes.

    Returns:
        Bytes by part.
    """
    weight, gradient, optimizer = parameter_bytes(args)
    moved = args.optimizer_offload_fraction if args.optimizer_cpu_offload else 0.0
    state = stage.total * optimizer
    sampling, rollout = passes.sampling, 0.0
    if sampling is not None:
        rollout = rollout_memory(args, sampling, passes.positions)
    return Memory(
        weights=float(stage.total * weight),
        quantised=quantised_memory(args, stage.linear, with_gradients=passes.fp8_gradients),
        gradients=float(stage.total * gradient),
        optimizer=state * (1.0 - moved),
        activations=activation_memory(args, passes),
        rollout=rollout,
        cache=cache_memory(args, passes),
        overhead=float(OVERHEAD),
        reference=float(stage.total * weight) if passes.keeps_reference else 0.0,
        offloaded=state * moved,
    )
