"""A run on paper: what it needs of each GPU, what a step consists of, and whether it can work."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_espo.config import DpoConfig, EspoConfig, RolloutConfig
from megatron_espo.errors import UserError
from megatron_espo.monitor.flops import (
    ModelDimensions,
    RolloutFlops,
    preference_flops,
    rollout_flops,
    training_flops,
)
from megatron_espo.monitor.throughput import PEAK_TFLOPS
from megatron_espo.objectives import objective_of, views_per_completion
from megatron_espo.passes.shapes import round_up
from megatron_espo.plan.memory import GB, Memory, Passes, plan_memory
from megatron_espo.plan.parameters import StageParameters

# Dense bf16 peak of an H100 SXM, operations per second.
PEAK_FLOPS = 1e12 * dict(PEAK_TFLOPS)["H100"]["16-bit"]


@dataclass(frozen=True)
class PlannedRows:
    """Fine-tuning rows as they will be computed, from the data.

    Attributes:
        num_examples: examples of an epoch.
        mean_length: tokens of a row on average, what fills it up included.
        mean_maskable: tokens of a completion on average.
        longest: tokens of the longest row.
        longest_maskable: tokens of the longest completion.
        shares: how large a share of the rows is computed at which width.
    """

    num_examples: int
    mean_length: float
    mean_maskable: float
    longest: int
    longest_maskable: int
    shares: dict[int, float]

    @property
    def mean_width(self) -> float:
        """Positions that are computed of a row on average."""
        return sum(width * share for width, share in self.shares.items())


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        args: Megatron's arguments.
        stages: parameters by pipeline stage.
        memory: bytes by part, of each stage.
        gpu_memory: bytes of one GPU.
        passes: sizes of the model passes.
        flops: operations of a rollout with its updates by phase, or None for other jobs.
        step_flops: operations of one optimizer step (of a whole rollout's share with ESPO).
        num_steps: optimizer steps of the run.
        rows: what fine-tuning's data is like, where it was read.
    """

    args: argparse.Namespace
    stages: Sequence[StageParameters]
    memory: Sequence[Memory]
    gpu_memory: float
    passes: Passes
    flops: RolloutFlops | None
    step_flops: float
    num_steps: int
    rows: PlannedRows | None = None

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, without padding of the vocabulary."""
        return sum(stage.whole_model for stage in self.stages)

    @property
    def num_trained(self) -> int:
        """Those of them that are trained."""
        return sum(stage.whole_trained for stage in self.stages)

    @property
    def peak(self) -> Memory:
        """Memory of the most loaded stage."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint: weights, master weights and moments, reference policy.

        One of adapters holds neither their base nor a reference policy.
        """
        weight = 2 if self.args.bf16 or self.args.fp16 else 4
        if self.num_trained < self.num_parameters:
            return self.num_trained * (weight + 12)
        copies = 2 if self.passes.keeps_reference else 1
        return self.num_parameters * (weight * copies + 12)

    @property
    def host_bytes_per_node(self) -> float:
        """Host memory of the ranks of one node."""
        return self.peak.host * min(gpus_per_node(self.args), self.args.world_size)

    @property
    def saving_bytes_per_node(self) -> float:
        """Host memory of the ranks of one node for the optimizer's state in a checkpoint."""
        return self.peak.saving * min(gpus_per_node(self.args), self.args.world_size)


def gpus_per_node(args: argparse.Namespace) -> int:
    """GPUs of one node of the plan."""
    return int(args.dry_run_gpus_per_node)


def make_plan(
    args: argparse.Namespace,
    stages: Sequence[StageParameters],
    espo: EspoConfig | None,
    rollout: RolloutConfig | None,
    gpu_memory: float,
    pad_multiple: int = 1,
    sft_rows: PlannedRows | None = None,
    dpo: DpoConfig | None = None,
) -> Plan:
    """Work a run out.

    Args:
        args: Megatron's validated arguments.
        stages: parameters by pipeline stage.
        espo: ESPO's settings; None for pre-training and fine-tuning.
        rollout: sampling settings; None likewise.
        gpu_memory: bytes of one GPU.
        pad_multiple: ESPO pads the positions of its rows to a multiple of this.
        sft_rows: what the data of fine-tuning or preference optimization is like; None plans for
            rows of --seq-length.
        dpo: settings of preference optimization; None for other jobs.

    Returns:
        The plan.
    """
    dimensions = ModelDimensions.from_args(args)
    flops = None
    if espo is not None and rollout is not None:
        length = rollout.completion_length
        # A coupled pair masks L positions together, a view whose number is drawn L at most.
        masks = objective_of(espo).masks(espo)
        per_view = masks.masked(length) / masks.per_draw if masks.fixed else length
        completions = espo.completions_per_rollout // args.data_parallel_size
        rows = args.espo_rows_per_batch
        copies = 0 if dimensions.blocks is None else dimensions.blocks.copies
        passes = Passes(
            # Views of a sequence stand in one row, beside its clean tokens.
            rows=rows // max(copies, 1),
            positions=(copies + 1) * round_up(args.seq_length, pad_multiple),
            head_rows=int(rows * per_view),
            num_batches=completions * views_per_completion(espo) // rows,
            copies=copies,
            sampling=rollout,
            sampled_rows=_sampled_rows(args, espo, rollout),
            keeps_reference=espo.kl_coef > 0.0 and args.lora_rank is None,
            fp8_gradients=espo.fp8_phases != "rollout",
        )
        flops = rollout_flops(dimensions, args.seq_length, espo, rollout)
        step_flops = flops.total / espo.updates_per_rollout
    elif dpo is not None:
        passes, step_flops = _preference(args, dimensions, dpo, sft_rows, pad_multiple)
    else:
        passes, step_flops = _supervised(args, dimensions, sft_rows)
    memory = [plan_memory(args, stage, passes, index) for index, stage in enumerate(stages)]
    steps = args.train_iters or (args.train_samples or 0) // args.global_batch_size
    return Plan(args, stages, memory, gpu_memory, passes, flops, step_flops, steps, sft_rows)


def _supervised(
    args: argparse.Namespace, dimensions: ModelDimensions, sft: PlannedRows | None
) -> tuple[Passes, float]:
    """Size the passes of pre-training and fine-tuning, and count the operations of a step."""
    batch = args.global_batch_size
    length = maskable = args.seq_length
    if args.sft_train_data is not None and args.sft_completion_length:
        maskable = args.sft_completion_length
    mean_maskable, shares = float(maskable), {length: 1.0}
    if sft is not None:
        # The widest micro-batch is what must fit.
        length, maskable = max(sft.shares), sft.longest_maskable
        mean_maskable, shares = sft.mean_maskable, sft.shares
    copies = 0 if dimensions.blocks is None else 1
    # The clean tokens of a row predict the next ones besides.
    following = 1 if args.next_token_weight else 0
    passes = Passes(
        rows=args.micro_batch_size,
        positions=(copies + 1) * length,
        # At most all of them: the share is drawn from (0, 1).
        head_rows=args.micro_batch_size * maskable * (1 + following),
        num_batches=batch // (args.micro_batch_size * args.data_parallel_size),
        copies=copies,
    )
    read = mean_maskable * (0.5 + following)
    flops = sum(
        training_flops(dimensions, batch * share, width, batch * share * read)
        for width, share in shares.items()
    )
    return passes, flops


def _preference(
    args: argparse.Namespace,
    dimensions: ModelDimensions,
    dpo: DpoConfig,
    pairs: PlannedRows | None,
    pad_multiple: int,
) -> tuple[Passes, float]:
    """Size the passes of preference optimization, and count the operations of a step."""
    length = round_up(args.seq_length, pad_multiple)
    # Not known without the data: completions of all lengths.
    maskable, mean = length, length / 2
    shares = {length: 1.0}
    if pairs is not None:
        length, maskable, mean = max(pairs.shares), pairs.longest_maskable, pairs.mean_maskable
        shares = pairs.shares
    if dpo.completion_length is not None:
        maskable, mean = dpo.completion_length, float(dpo.completion_length)
    rows = args.dpo_rows_per_batch
    copies = 0 if dimensions.blocks is None else dimensions.blocks.copies
    views = 2 * args.global_batch_size * dpo.views_per_completion
    passes = Passes(
        rows=rows // max(copies, 1),
        positions=(copies + 1) * length,
        # A coupled pair masks as many as there are, another view that many at most.
        head_rows=rows * maskable // (2 if dpo.elbo_estimator == "coupled" else 1),
        num_batches=views // args.data_parallel_size // rows,
        copies=copies,
        keeps_reference=args.lora_rank is None,
    )
    mode: Literal["joint", "two_pass"] = "joint" if dpo.gradient == "joint" else "two_pass"
    flops = sum(
        share * preference_flops(dimensions, args.global_batch_size, width, mean, dpo, mode).total
        for width, share in shares.items()
    )
    return passes, flops


def _sampled_rows(args: argparse.Namespace, espo: EspoConfig, rollout: RolloutConfig) -> int:
    """Most completions of a rank in one call of the sampler: of a rollout or of an evaluation."""
    rows = espo.completions_per_rollout
    if espo.eval_data is not None:
        # How many problems all of them are is in a file that a plan does not read: enough.
        enough = 100 * rollout.micro_batch_size * args.world_size
        rows = max(rows, espo.eval_samples or enough)
    return -(-rows // args.data_parallel_size)


def check_plan(plan: Plan) -> None:
    """Refuse a plan that cannot work.

    Args:
        plan: the plan.

    Raises:
        UserError: saying what is too large and what to change.
    """
    memory = plan.peak
    if memory.total <= plan.gpu_memory:
        return
    args = plan.args
    parts = {
        "weights, gradients and optimizer": max(memory.lasting, memory.build),
        "activations": memory.activations,
        "rollouts": memory.rollout + memory.cache,
    }
    largest = max(parts, key=lambda name: parts[name])
    remedies = {
        "activations": "lower --micro-batch-size or add --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
        "rollouts": "lower --rollout-micro-batch-size"
        + (" or leave out --rollout-cache" if memory.cache else ""),
        "weights, gradients and optimizer": "raise --tensor-model-parallel-size "
        f"{args.tensor_model_parallel_size}"
        + (", use more GPUs" if args.use_distributed_optimizer else ", add")
        + (" or " if args.use_distributed_optimizer else " --use-distributed-optimizer or ")
        + "raise --pipeline-model-parallel-size",
    }
    raise UserError(
        f"the plan needs {memory.total / GB:.1f} GB per GPU and does not fit "
        f"{plan.gpu_memory / GB:.0f} GB; {largest} take {parts[largest] / GB:.1f} GB: "
        f"{remedies[largest]}."
    )


def warnings(plan: Plan) -> list[str]:
    """What will work but hurt.

    Args:
        plan: the plan.

    Returns:
        Sentences.
    """
    args, found = plan.args, []
    node = gpus_per_node(args)
    if args.tensor_model_parallel_size > node:
        found.append(
            f"--tensor-model-parallel-size {args.tensor_model_parallel_size} spans nodes of {node} "
            "GPUs: its collectives in every layer leave NVLink."
        )
    if args.world_size > node and args.world_size % node:
        found.append(f"{args.world_size} GPUs do not fill nodes of {node}.")
    if 0.92 * plan.gpu_memory < plan.peak.total <= plan.gpu_memory:
        found.append("less than 8% of the GPU's memory is left for what is estimated here.")
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if tp > 1 and not args.sequence_parallel:
        found.append("--sequence-parallel is off: norms and residuals are kept on every rank.")
    if pp > 1 and plan.passes.num_batches < 2 * pp:
        idle = (pp - 1) / (plan.passes.num_batches + pp - 1)
        found.append(
            f"{plan.passes.num_batches} micro-batches for {pp} pipeline stages: "
            f"{100 * idle:.0f}% of an update is the pipeline's bubble."
        )
    return found
