"""Memory of one GPU by part: arithmetic on counts, for each pipeline stage.

Weights, gradients and optimizer are exact but for the padding of Megatron's buffers (a few
kilobytes per bucket). What passes through the layers take is in plan/activations.py. A peak is the
largest of several moments of a run. The reserve for what libraries take is not measured.
"""

import argparse
from dataclasses import dataclass

import torch

from megatron_espo.config import RolloutConfig
from megatron_espo.generation.scheduler import micro_batches
from megatron_espo.model.shape import query_groups
from megatron_espo.plan import activations
from megatron_espo.plan.activations import Sizes
from megatron_espo.plan.parameters import StageParameters

GB = 10**9

# CUDA context, NCCL's buffers, workspaces of cuBLAS and cuDNN, fragmentation: not measured.
RESERVE = 4 * GB


@dataclass(frozen=True)
class Passes:
    """The model passes of a run, as far as memory depends on them.

    Attributes:
        rows: rows of a micro-batch with gradients.
        positions: positions of a row, its noisy copies included where tokens come block by block.
        head_rows: hidden states of a micro-batch that reach the output head.
        num_batches: micro-batches of an optimizer step.
        sampling: settings of the rollouts, or None without.
        sampled_rows: most completions that one call of the sampler makes on a rank.
        keeps_reference: whether a reference policy is kept on the host.
        fp8_gradients: whether passes with gradients compute in FP8, where any pass does.
        copies: noisy copies of a row beside its clean tokens.
    """

    rows: int
    positions: int
    head_rows: int
    num_batches: int
    sampling: RolloutConfig | None = None
    sampled_rows: int = 0
    keeps_reference: bool = False
    fp8_gradients: bool = True
    copies: int = 0

    @property
    def width(self) -> int:
        """Positions of a row without copies."""
        return self.positions // (self.copies + 1)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU, and of the host for each rank.

    Attributes:
        weights: what the layers read.
        quantised: FP8 copies of the linear weights and their transposes.
        gradients: the gradient buffer.
        optimizer: master weights and Adam's two moments.
        buffers: what libraries keep from call to call.
        activations: most that an update takes: what is kept for the backward pass with the logits
            of the masked rows, or with the gradient of the embedding.
        rollout: working memory of a sampling pass; not at the same time as activations.
        cache: keys and values that a rollout keeps; at the same time as ``rollout``.
        others: most that a change of policies or a checkpoint takes; not at the same time.
        build: all that the model takes when it is built, with its weights in two places.
        reserve: for what libraries take.
        reference: the reference policy, on the host.
        offloaded: optimizer state on the host.
        saving: the host's memory for the optimizer's state while a checkpoint is written.
    """

    weights: float
    quantised: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    rollout: float
    cache: float
    others: float
    build: float
    reserve: float
    reference: float
    offloaded: float
    saving: float

    @property
    def lasting(self) -> float:
        """Bytes of the GPU that are held all the time."""
        return self.weights + self.quantised + self.gradients + self.optimizer + self.buffers

    @property
    def peak(self) -> float:
        """Most bytes of the GPU at once, without the reserve."""
        passing = max(self.activations, self.rollout + self.cache, self.others)
        return max(self.lasting + passing, self.build)

    @property
    def total(self) -> float:
        """Bytes of the GPU to have, with the reserve."""
        return self.peak + self.reserve

    @property
    def host(self) -> float:
        """Bytes of the host that this rank holds all the time."""
        return self.reference + self.offloaded


def parameter_bytes(args: argparse.Namespace) -> tuple[int, int, float]:
    """Bytes of one parameter: as weight, as gradient, and in the optimizer.

    Args:
        args: Megatron's validated arguments.

    Returns:
        Bytes of a weight, of its gradient, and of its optimizer state on all ranks that share it:
        see :func:`_optimizer_memory`.
    """
    half = args.bf16 or args.fp16
    weight = 2 if half else 4
    gradient = 4 if args.accumulate_allreduce_grads_in_fp32 or not half else 2
    # Without half precision the weights are their own master copy.
    state = [torch.float32] * (3 if half else 2)
    if args.use_precision_aware_optimizer:
        state = [args.main_params_dtype, args.exp_avg_dtype, args.exp_avg_sq_dtype]
    return weight, gradient, float(sum(dtype.itemsize for dtype in state))


def _optimizer_memory(args: argparse.Namespace, stage: StageParameters, each: float) -> float:
    """Bytes of a rank's optimizer state, ``each`` of them for a parameter.

    With the distributed optimizer the data- and context-parallel ranks share it; that of experts
    the ranks that hold the same ones.
    """
    if not args.use_distributed_optimizer:
        return stage.trained * each
    ranks = args.data_parallel_size * args.context_parallel_size
    tp, ep = args.tensor_model_parallel_size, args.expert_model_parallel_size
    alike = ranks * tp / (ep * (args.expert_tensor_parallel_size or tp))
    return each * ((stage.trained - stage.experts) / ranks + stage.experts / alike)


def _chunks_in_flight(args: argparse.Namespace, stage: int, num_batches: int) -> tuple[int, float]:
    """Say how many model chunks keep activations at once on a stage, and their layers."""
    pp = args.pipeline_model_parallel_size
    virtual = args.virtual_pipeline_model_parallel_size or 1
    layers = args.num_layers / (pp * virtual)
    if virtual == 1:
        return min(pp - stage, num_batches), layers
    # Megatron's interleaved schedule: the passes before its first backward pass, and one.
    return min(2 * (pp - stage - 1) + (virtual - 1) * pp + 1, num_batches * virtual), layers


def activation_memory(
    args: argparse.Namespace,
    passes: Passes,
    sizes: Sizes,
    stage: int,
    fused: bool,
    frozen: bool = False,
) -> float:
    """Most bytes that an update takes on a stage beside what lasts.

    Args:
        args: Megatron's validated arguments.
        passes: sizes of the passes.
        sizes: of the layers.
        stage: pipeline stage.
        fused: whether weight gradients are added to the buffer where they are computed.
        frozen: whether the weights have no gradients, under adapters.

    Returns:
        Bytes: the largest of the backward passes of the head, of a layer and of the embedding.
    """
    pp, cp = args.pipeline_model_parallel_size, args.context_parallel_size
    tokens, rows = passes.rows * passes.positions / cp, passes.head_rows / cp
    chunks, layers = _chunks_in_flight(args, stage, passes.num_batches)
    number, is_last = chunks * layers, stage == pp - 1
    kept = activations.layer_kept(sizes, tokens)
    last = activations.last_layer_kept(sizes, tokens, rows) if is_last else kept
    state = sizes.width * tokens * sizes.part
    # Between stages: what came in, and the gradient that goes back.
    between = 2 * state if pp > 1 else 0.0
    head = 0.0
    if is_last:
        chunk = getattr(args, "head_chunk", None)
        head = activations.head_memory(sizes, passes.head_rows, fused, frozen, chunk)
    transient = activations.layer_transient(sizes, tokens)
    all_kept = (number - 1) * kept + last
    # The last layer's own backward pass is that of few rows: the one before it takes most.
    moments = [all_kept + head, all_kept - (last if is_last else 0.0) + transient]
    if args.recompute_granularity == "full":
        group = args.recompute_num_layers or 1
        if args.recompute_method == "block":
            again, whole = min(group, layers), max(layers - group, 0.0)
            inputs, group = chunks * again * state + (chunks * whole) * kept, 1
        else:
            inputs = chunks * layers / group * state
        moments = [inputs + head, inputs + group * kept + transient]
    if stage == 0 and not frozen:
        embedding = sizes.vocabulary * sizes.hidden * sizes.width
        others = all_kept * (chunks - 1) / chunks
        if args.recompute_granularity == "full":
            others = inputs * (chunks - 1) / chunks
        moments.append(others + embedding + sizes.width * tokens * sizes.hidden)
    return max(moments) + between + mask_memory(passes, sizes)


def mask_memory(passes: Passes, sizes: Sizes) -> float:
    """Bytes of the masks of rows with noisy copies: whole, while made twice; and by segments."""
    if not passes.copies:
        return 0.0
    return passes.rows * (2.0 * passes.positions**2 + 3 * sizes.width * passes.width**2)


def rollout_memory(
    args: argparse.Namespace, passes: Passes, sampling: RolloutConfig, sizes: Sizes
) -> float:
    """Bytes of a sampling pass: the largest layer, or the logits of a block."""
    pp, cp = args.pipeline_model_parallel_size, args.context_parallel_size
    _, rows = micro_batches(passes.sampled_rows, sampling.micro_batch_size, pp)
    rows *= 2 if sampling.guidance_scale > 0.0 else 1
    # In float32, and a copy where more is read from them than one distribution.
    copied = (
        sampling.temperature not in (0.0, 1.0)
        or sampling.remasking == "entropy"
        or sampling.keeps_likeliest
    )
    entry = 4 * (2 if copied or sampling.guidance_scale > 0.0 else 1)
    candidates = rows * sampling.block_length
    chunk = getattr(args, "head_chunk", None)
    shown = candidates if chunk is None else min(candidates, chunk)
    logits = shown * sizes.vocabulary * entry + candidates * sizes.hidden * sizes.width
    layer = activations.forward_memory(sizes, rows * passes.width / cp)
    if passes.copies:  # each row sees up to its own block; the kernel's mask is not of one bit
        layer += rows * passes.width**2 / cp * (2 + sizes.width)
    return max(layer, logits)


def saving_memory(
    args: argparse.Namespace, stage: StageParameters, index: int
) -> tuple[float, float]:
    """Bytes that the optimizer's state takes in the GPU and on the host while it is written.

    Every rank gathers the state of all data-parallel ranks, bucket by bucket and one kind of number
    after the other (Megatron 0.19, ``get_parameter_state_dp_zero``), and puts it together on the
    host. Buckets are those of overlapped reductions, on the first pipeline stage.

    Args:
        args: Megatron's validated arguments.
        stage: parameters of the rank.
        index: pipeline stage.

    Returns:
        Bytes in the GPU, bytes on the host; 0 where each rank writes what it has.
    """
    if not (args.use_distributed_optimizer and args.dist_ckpt_optim_fully_reshardable):
        return 0.0, 0.0
    ranks = args.data_parallel_size * args.context_parallel_size
    bucket, virtual = stage.largest_chunk, args.virtual_pipeline_model_parallel_size or 1
    if args.overlap_grad_reduce and index == 0:
        # Only the first chunk, which has the embedding, is cut.
        cut = min(bucket, stage.largest + max(40_000_000, 1_000_000 * ranks))
        bucket = max(cut, (stage.trained - bucket) // max(virtual - 1, 1))
    if args.distrib_optim_fully_reshardable_mem_efficient:
        # The first of the data-parallel ranks does, on the host alone.
        share = min(1.0, args.tensor_model_parallel_size / args.dry_run_gpus_per_node)
        return 0.0, 12.0 * stage.trained * share
    return 4.0 * bucket * (1 + 1 / ranks), 12.0 * stage.trained


def cache_memory(args: argparse.Namespace, passes: Passes) -> float:
    """Bytes of the keys and values that a rollout keeps (see passes/state.py).

    Args:
        args: Megatron's validated arguments.
        passes: sizes of the passes.

    Returns:
        Bytes of this rank's layers and heads, for all rows in flight at full length; 0 without
        --rollout-cache. All kinds keep the same: all positions of the rows.
    """
    sampling = passes.sampling
    if sampling is None or sampling.cache == "none":
        return 0.0
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    groups = query_groups(args)
    number, rows = micro_batches(passes.sampled_rows, sampling.micro_batch_size, pp)
    size = 2 if args.bf16 or args.fp16 else 4
    per_position = 2 * size * groups / tp * args.kv_channels * args.num_layers / pp
    return number * rows * passes.width * per_position


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


def plan_memory(
    args: argparse.Namespace, stage: StageParameters, passes: Passes, index: int = 0
) -> Memory:
    """Add up the memory of one rank.

    Args:
        args: Megatron's validated arguments.
        stage: parameters of the rank.
        passes: sizes of its passes.
        index: its pipeline stage.

    Returns:
        Bytes by part.
    """
    weight, gradient, optimizer = parameter_bytes(args)
    moved = args.optimizer_offload_fraction if args.optimizer_cpu_offload else 0.0
    state = _optimizer_memory(args, stage, optimizer)
    frozen = stage.trained < stage.total
    sizes = activations.layer_sizes(args, bool(args.fp8) and passes.fp8_gradients)
    fused = args.gradient_accumulation_fusion and sizes.with_te and not frozen
    sampling, rollout, most_rows = passes.sampling, 0.0, passes.rows
    if sampling is not None:
        rollout = rollout_memory(args, passes, sampling, sizes)
        most_rows = max(passes.rows, min(sampling.micro_batch_size, passes.sampled_rows))
    most_tokens = most_rows * passes.width / args.context_parallel_size
    most_tokens = max(most_tokens, passes.rows * passes.positions / args.context_parallel_size)
    weights, gradients = float(stage.total * weight), float(stage.trained * gradient)
    saved, saving = saving_memory(args, stage, index)
    swapped = float(stage.largest * weight) if passes.keeps_reference else 0.0
    # The distributed optimizer's weights move to a buffer of their own.
    moved_weights = float(stage.trained * weight) if args.use_distributed_optimizer else 0.0
    return Memory(
        weights=weights,
        quantised=quantised_memory(args, stage.linear, with_gradients=passes.fp8_gradients),
        gradients=gradients,
        optimizer=state * (1.0 - moved),
        buffers=activations.lasting_buffers(args, sizes, most_tokens, fused),
        activations=activation_memory(args, passes, sizes, index, fused, frozen),
        rollout=rollout,
        cache=cache_memory(args, passes),
        others=max(swapped, saved if args.save is not None else 0.0),
        build=weights + moved_weights + gradients,
        reserve=float(RESERVE),
        reference=weights if passes.keeps_reference else 0.0,
        offloaded=state * moved,
        saving=saving if args.save is not None else 0.0,
    )
