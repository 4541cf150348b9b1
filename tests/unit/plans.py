"""Makes many plans in one process and prints them as JSON (run by test_dry_run).

Process groups are torch's "fake" ones, which a process of tests that has real ones cannot have.
"""

import contextlib
import io
import json
import sys
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory
from megatron.training.training import get_model

from megatron_espo import device
from megatron_espo.commands.launch import complete_flags
from megatron_espo.dry_run import command as dry_run
from megatron_espo.model.provider import model_provider
from megatron_espo.plan.memory import Memory
from megatron_espo.plan.parameters import _fake_groups
from megatron_espo.training import dpo, espo, pretrain

device.prepare()


def plan(
    flags: list[str],
    recipes: tuple[str, ...] = ("llada_8b", "gsm8k"),
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Plan a run; what it prints, its numbers, or why it was refused."""
    printed = io.StringIO()
    entry = pretrain if {"pretrain_8b", "sft_8b", "adapt_8b"}.intersection(recipes) else espo
    entry = dpo if "dpo_8b" in recipes else entry
    argv = [*complete_flags(recipes, flags), "--dry-run"]
    argv = [word for word in argv if word not in without]
    try:
        with contextlib.redirect_stdout(printed):
            made = dry_run.dry_run(argv, entry.prepare_arguments, entry.__name__)
    except ValueError as error:
        return {"refused": str(error), "printed": printed.getvalue()}
    assert made is not None
    memory = made.peak
    return {
        "printed": printed.getvalue(),
        "parameters": made.num_parameters,
        "stages": [stage.total for stage in made.stages],
        "memory": numbers(memory),
        "by_stage": [numbers(memory) for memory in made.memory],
        "theory": compute_weight_and_optimizer_memory(made.args),
    }


def numbers(memory: Memory) -> dict[str, float]:
    """All that a plan says of a GPU's memory."""
    names = ("total", "peak", "lasting", "host")
    return vars(memory) | {name: getattr(memory, name) for name in names}


def megatron(flags: list[str]) -> dict[str, float]:
    """Build Megatron's buffers and optimizer of one rank in earnest; their bytes."""
    made = dry_run.dry_run(
        [*complete_flags(["llada_8b", "gsm8k"], flags), "--dry-run"],
        espo.prepare_arguments,
        espo.__name__,
    )
    assert made is not None
    args = made.args
    vars(args).update(device.CPU_ARGUMENT_DEFAULTS)
    with _fake_groups(args, 0):
        model_parallel_cuda_manual_seed(1)
        chunks = get_model(model_provider, ModelType.encoder_or_decoder)
        names = OptimizerConfig.__dataclass_fields__
        config = OptimizerConfig(**{n: getattr(args, n) for n in names if hasattr(args, n)})
        optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)
        for parameter in chunks[0].parameters():
            parameter.main_grad.fill_(1e-3)
        optimizer.step()
        buffers = chunks[0].buffers
        inner = getattr(optimizer, "chained_optimizers", [optimizer])
        states = [s for o in inner for s in o.optimizer.state.values()]
        moments = sum(
            t.nbytes for s in states for t in s.values() if torch.is_tensor(t) and t.dim()
        )
        masters = sum(
            p.nbytes
            for o in inner
            for group in o.optimizer.param_groups
            for p in group["params"]
            if p.dtype == torch.float32
        )
        return {
            "weights": sum(p.nbytes for p in chunks[0].parameters()),
            "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
            "optimizer": moments + masters,
        } | {f"planned_{k}": vars(made.peak)[k] for k in ("weights", "gradients", "optimizer")}


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    results = {}
    for name, (kind, *arguments) in wanted.items():
        results[name] = megatron(*arguments) if kind == "megatron" else plan(*arguments)
    print("RESULTS" + json.dumps(results))
