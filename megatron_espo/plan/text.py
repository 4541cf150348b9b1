"""The plan of a run as text."""

from megatron_espo.adapters.base import lora_settings
from megatron_espo.adapters.projections import targets_of
from megatron_espo.config import DpoConfig, EspoConfig, RolloutConfig
from megatron_espo.objectives import num_draws, objective_of, views_per_completion
from megatron_espo.objectives.masks import ElboMasks
from megatron_espo.plan.memory import GB
from megatron_espo.plan.plan import PEAK_FLOPS, Plan, gpus_per_node, warnings


def plan_report(
    plan: Plan,
    espo: EspoConfig | None,
    rollout: RolloutConfig | None,
    dpo: DpoConfig | None = None,
) -> str:
    """Write a plan.

    Args:
        plan: the plan.
        espo: ESPO's settings; None for other jobs.
        rollout: sampling settings; None likewise.
        dpo: settings of preference optimization; None for other jobs.

    Returns:
        Lines.
    """
    lines = _layout(plan) + _memory(plan)
    if espo is not None and rollout is not None:
        lines += _rollout(plan, espo, rollout)
    elif dpo is not None:
        lines += _pairs(plan, dpo)
    else:
        lines += _steps(plan)
    lines += [f"warning: {text}" for text in warnings(plan)]
    return "\n".join(lines)


def _layout(plan: Plan) -> list[str]:
    args = plan.args
    node = gpus_per_node(args)
    nodes = -(-args.world_size // node)
    used = [
        name
        for name, on in (
            ("sequence parallel", args.sequence_parallel),
            ("distributed optimizer", args.use_distributed_optimizer),
            ("overlapped gradient reduction", args.overlap_grad_reduce),
            ("overlapped parameter gather", args.overlap_param_gather),
            (f"{args.recompute_granularity} recomputation", args.recompute_granularity),
            (f"FP8 {args.fp8}", args.fp8),
        )
        if on
    ]
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    padding = args.padded_vocab_size - args.vocab_size
    per_gpu = max(stage.total for stage in plan.stages)
    sizes = {
        "tensor": args.tensor_model_parallel_size,
        "pipeline": args.pipeline_model_parallel_size,
        "context": args.context_parallel_size,
        "data": args.data_parallel_size,
    }
    split = " x ".join(
        f"{name} {size}" for name, size in sizes.items() if size > 1 or name != "context"
    )
    return [
        f"Layout: {args.world_size} GPUs of {plan.gpu_memory / GB:.0f} GB in "
        f"{nodes} node{'s' if nodes > 1 else ''} of {node}: {split}; "
        f"{', '.join([precision, *used])}",
        f"Model: {args.preset or 'of the command line'}, {plan.num_parameters:,} parameters "
        f"(vocabulary {args.vocab_size:,} + {padding:,} rows of padding), {per_gpu:,} on a GPU",
        *_adapters(plan),
        *_blocks(plan),
    ]


def _blocks(plan: Plan) -> list[str]:
    args, passes = plan.args, plan.passes
    if not passes.copies:
        return []
    grown = f", grown to {args.block_growth_to}" if args.block_growth_to else ""
    copies = f"{passes.copies} noisy cop{'ies' if passes.copies > 1 else 'y'}"
    return [
        f"Blocks: {args.attention_mask}, of {args.block_size} tokens{grown}; a row of "
        f"{passes.width:,} positions passes with {copies} beside the clean tokens, "
        f"{passes.positions:,} in all"
    ]


def _adapters(plan: Plan) -> list[str]:
    lora = lora_settings(plan.args)
    if lora.rank is None:
        return []
    targets = " ".join(targets_of(lora.targets, gated=bool(plan.args.swiglu)))
    share = 100 * plan.num_trained / plan.num_parameters
    return [
        f"LoRA: rank {lora.rank}, scale {lora.scale:g}, on {targets}: {plan.num_trained:,} of the "
        f"parameters are trained ({share:.2f}%); the reference is the base"
    ]


def _memory(plan: Plan) -> list[str]:
    memory = plan.peak
    rows = [
        ("weights", memory.weights, ""),
        ("FP8 copies of weights", memory.quantised, ""),
        ("gradients", memory.gradients, ""),
        ("optimizer", memory.optimizer, ""),
        ("buffers of the layers", memory.buffers, ""),
        ("update", memory.activations, " (activations, logits; not at the same time as others)"),
        ("sampling pass", memory.rollout, " (not at the same time)"),
        ("key/value caches", memory.cache, " (with the sampling pass)"),
        ("policies, checkpoints", memory.others, " (a swap or a save; not at the same time)"),
    ]
    stage = "" if len(plan.memory) == 1 else ", most loaded pipeline stage"
    lines = [f"Memory of a GPU{stage}:"]
    lines += [f"  {name:26}{size / GB:8.2f} GB{note}" for name, size, note in rows if size]
    free = plan.gpu_memory - memory.total
    rest = f"{free / GB:.1f} GB free" if free >= 0.0 else f"{-free / GB:.1f} GB too much"
    building = ", when the model is built" if memory.build >= memory.peak else ""
    lines += [
        f"  {'peak of tensors':26}{memory.peak / GB:8.2f} GB{building}",
        f"  {'reserve, not measured':26}{memory.reserve / GB:8.2f} GB "
        "(CUDA context, NCCL, cuDNN, fragmentation)",
        f"  {'to have':26}{memory.total / GB:8.2f} GB ({rest})",
    ]
    if memory.host:
        what = " and ".join(
            name
            for name, size in (
                ("reference policy", memory.reference),
                ("optimizer state", memory.offloaded),
            )
            if size
        )
        lines.append(
            f"  {'host, all ranks of a node':26}{plan.host_bytes_per_node / GB:8.2f} GB ({what})"
        )
    if memory.saving:
        size = plan.saving_bytes_per_node / GB
        lines.append(f"  {'host, during a checkpoint':26}{size:8.2f} GB more (optimizer state)")
    lines.append(f"  {'one checkpoint on disk':26}{plan.checkpoint_bytes / GB:8.2f} GB")
    return lines


def _rollout(plan: Plan, espo: EspoConfig, rollout: RolloutConfig) -> list[str]:
    args, passes, flops = plan.args, plan.passes, plan.flops
    assert flops is not None
    completions = espo.completions_per_rollout
    views = completions * views_per_completion(espo)
    dp = args.data_parallel_size
    prompt = args.seq_length - rollout.completion_length
    # The first update needs no old ELBO.
    objective = objective_of(espo)
    frozen = espo.updates_per_rollout - 1 if objective.compares_with_old else 0
    frozen += espo.updates_per_rollout if espo.kl_coef > 0.0 else 0
    shares = {
        "generation": flops.generation,
        "old ELBO": flops.old_elbo,
        "reference ELBO": flops.ref_elbo,
        "updates": flops.update,
    }
    return [
        f"Rollout ({espo.task}): {espo.prompts_per_rollout} prompts x {espo.group_size} = "
        f"{completions} completions, {completions // dp} on a data-parallel rank; "
        f"{completions * rollout.completion_length:,} tokens of {rollout.completion_length} each "
        f"after at most {prompt} of prompt, {rollout.denoising_steps} denoising steps",
        f"Updates: {espo.updates_per_rollout} x {views} views ({num_draws(espo)} draws, "
        f"{_masks(espo)}) = {passes.num_batches} micro-batches of {passes.rows} rows on a "
        f"rank, {espo.gradient}; {frozen} gradient-free ELBO passes before them",
        f"Operations of a rollout with its updates: {flops.total:.3e} ("
        + ", ".join(f"{name} {100 * part / flops.total:.1f}%" for name, part in shares.items())
        + f"), {flops.total / args.world_size:.2e} on a GPU: "
        f"{flops.total / args.world_size / PEAK_FLOPS:.1f} s at an H100's bf16 peak, which no run "
        "reaches",
        f"Run: {espo.num_rollouts} rollouts, {plan.num_steps} optimizer steps, "
        f"{espo.num_rollouts * flops.total:.3e} operations",
    ]


def _masks(espo: EspoConfig) -> str:
    """Say what the draws of an objective are."""
    masks = objective_of(espo).masks(espo)
    what = masks.estimator if isinstance(masks, ElboMasks) else f"{masks.per_draw} views each"
    return what if espo.objective == "espo" else f"{what}, objective {espo.objective}"


def _pairs(plan: Plan, dpo: DpoConfig) -> list[str]:
    args, passes, rows = plan.args, plan.passes, plan.rows
    pairs, views = args.global_batch_size, 2 * dpo.views_per_completion
    described = "Rows: the data not being read, as long as --seq-length"
    if rows is not None:
        padding = 100 * (1 - rows.mean_length / rows.mean_width)
        described = (
            f"Rows: {rows.num_examples:,} pairs, rows of {rows.mean_length:.0f} tokens on average, "
            f"the longest of {rows.longest}; {padding:.1f}% of what is computed is padding"
        )
    seconds = plan.step_flops / args.world_size / PEAK_FLOPS
    run = f"{plan.num_steps} optimizer steps, {plan.num_steps * plan.step_flops:.3e} operations"
    if dpo.epochs and rows is None:
        run = f"{dpo.epochs:g} epochs; how many steps they are the data decides"
    return [
        described,
        f"Step: {pairs} pairs x {views} views ({dpo.num_mc} draws of {dpo.elbo_estimator} for each "
        f"completion) = {passes.num_batches} micro-batches of {passes.rows} rows on a "
        f"data-parallel rank, {dpo.gradient}; one pass of the reference before it",
        f"Operations of a step: {plan.step_flops:.3e}: {seconds:.1f} s at an H100's bf16 peak, "
        "which no run reaches",
        f"Run: {run}",
    ]


def _steps(plan: Plan) -> list[str]:
    args, passes, rows = plan.args, plan.passes, plan.rows
    tokens = args.global_batch_size * args.seq_length
    positions = f"{args.seq_length} positions = {tokens:,} tokens"
    described = []
    if rows is not None:
        tokens = round(args.global_batch_size * rows.mean_length)
        padding = 100 * (1 - rows.mean_length / rows.mean_width)
        positions = f"{rows.mean_length:.0f} tokens on average = {tokens:,} tokens"
        described = [
            f"Rows: {rows.num_examples:,} examples, the longest row {rows.longest} tokens; "
            f"{padding:.1f}% of what is computed is padding, at --seq-length {args.seq_length} it "
            f"would be {100 * (1 - rows.mean_length / args.seq_length):.1f}%"
        ]
    elif args.sft_train_data is not None:
        positions = f"at most {positions}, the data not being read"
    seconds = plan.step_flops / args.world_size / PEAK_FLOPS
    return [
        *described,
        f"Step: {args.global_batch_size} rows x {positions}, "
        f"{passes.num_batches} micro-batches of {passes.rows} rows on a data-parallel rank",
        f"Operations of a step: {plan.step_flops:.3e}: {seconds:.1f} s at an H100's bf16 peak, "
        "which no run reaches",
        _run(plan, tokens),
    ]


def _run(plan: Plan, tokens: int) -> str:
    """What a whole run of so many tokens a step takes, as far as its steps are known."""
    if plan.args.sft_epochs and plan.rows is None:
        return f"Run: {plan.args.sft_epochs:g} epochs; how many steps they are the data decides"
    return (
        f"Run: {plan.num_steps} optimizer steps, {plan.num_steps * tokens:,} tokens, "
        f"{plan.num_steps * plan.step_flops:.3e} operations"
    )
