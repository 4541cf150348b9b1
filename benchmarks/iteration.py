"""Times a whole ESPO iteration against a straightforward implementation, end to end.

A rollout, its rewards, the ELBOs of the sampling and of the reference policy, and the inner updates
with a KL penalty, through the optimizer: on this project's side what training runs, on the other
side the same passes in plain PyTorch on transformers' Llama (benchmarks/straightforward.py) with
PyTorch's AdamW. Both hold the same weights and use the same threads. Before anything is timed, both
learn from one rollout with the same masks: ELBOs, and the weights after all its updates, must
agree. Then they take turns, each with its own samples: the likeliest tokens, unless --temperature
says otherwise, because random numbers for every logit cost the other side most of its time.

    python -m benchmarks.iteration --shape large-vocabulary
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.iteration_sides import (
    PHASES,
    SEED,
    SIZES,
    Sizes,
    Straightforward,
    build,
    our_iteration,
)
from benchmarks.measure import (
    as_json,
    interleaved,
    keep_freed_memory,
    largest_difference,
    machine,
    print_table,
    ratios,
    spread,
)
from benchmarks.models import SHAPES, Shape, llama_oracle, llama_weights
from megatron_espo.diffusion.noise import elbo_views
from megatron_espo.monitor.flops import forward_flops, rollout_flops, training_flops
from megatron_espo.objectives.advantages import leave_one_out
from megatron_espo.random import stream
from megatron_espo.rl.run import Trainer

# Relative to the largest entry, and of the norm of what training changed: sums in another order,
# through the updates.
ELBO_TOLERANCE, WEIGHT_TOLERANCE = 1e-4, 2e-2


def check_equal(trainer: Trainer, theirs: Straightforward, shape: Shape) -> dict[str, float]:
    """Let both sides learn from this project's first rollout.

    Returns:
        The largest difference of an ELBO, relative to the largest; and that of the weights after
        all updates, as a share of what the updates changed.

    Raises:
        AssertionError: they do not agree.
    """
    espo, kept, sizes = trainer.espo, [], theirs.sizes
    before = llama_weights(trainer.model, shape)
    last = espo.updates_per_rollout - 1
    our_iteration(
        replace(trainer, is_due=lambda step: step == last, save=lambda state: kept.append(state)), 0
    )
    record = kept[0].rollout
    assert record is not None
    rewards = torch.tensor(record["rewards"], dtype=torch.float64).view(-1, sizes.group)
    advantages = leave_one_out(rewards).flatten().float()
    assert bool((advantages != 0).any()), "all rewards are equal"
    n = espo.completions_per_rollout
    ids = torch.arange(n)
    masks = [
        elbo_views(
            "coupled", stream(SEED, "elbo", 0, place), ids, ids, n, sizes.completion, sizes.draws
        ).mask_indices
        for place in range(espo.updates_per_rollout)
    ]
    old, reference = theirs.learn(record["completions"], advantages, masks)
    found = {
        "old ELBO": largest_difference(record["elbo_old"], old),
        "reference ELBO": largest_difference(record["elbo_ref"], reference),
        "weights": _share_of_change(before, llama_weights(trainer.model, shape), theirs.llama),
    }
    for name, difference in found.items():
        most = WEIGHT_TOLERANCE if name == "weights" else ELBO_TOLERANCE
        assert difference < most, f"{name}: {difference:.1e} of the largest"
    return found


def _share_of_change(
    before: Mapping[str, Tensor], ours: Mapping[str, Tensor], llama: LlamaForCausalLM
) -> float:
    apart = changed = 0.0
    for name, theirs in llama.state_dict().items():
        apart += float((ours[name] - theirs).double().square().sum())
        changed += float((theirs - before[name]).double().square().sum())
    return math.sqrt(apart / changed)


def operations(trainer: Trainer, sizes: Sizes) -> dict[str, float]:
    """Count an iteration of each side; the straightforward one computes all logits."""
    assert trainer.dashboard.dimensions is not None
    model, positions = trainer.dashboard.dimensions, sizes.prompt + sizes.completion
    completions = sizes.prompts * sizes.group
    views, every = 2 * sizes.draws * completions, positions
    frozen = (2 * sizes.updates - 1) * forward_flops(model, views, positions, views * every)
    learning = sizes.updates * training_flops(model, views, positions, views * every)
    rollout = sizes.steps * forward_flops(model, completions, positions, completions * every)
    ours = rollout_flops(model, positions, trainer.espo, trainer.rollout)
    return {"straightforward": rollout + frozen + learning, "this project": ours.total}


def measure(name: str, sizes: Sizes, pairs: int, temperature: float) -> dict[str, Any]:
    """Compare the two sides.

    Args:
        name: of the shape.
        sizes: of the iteration.
        pairs: interleaved rounds.
        temperature: of the rollouts that are timed.

    Returns:
        Seconds and ratios, in all and by phase.
    """
    shape = SHAPES[name]
    trainer = build(shape, sizes)
    theirs = Straightforward(llama_oracle(trainer.model, shape), trainer, shape, sizes)
    differences = check_equal(trainer, theirs, shape)
    trainer = replace(trainer, rollout=replace(trainer.rollout, temperature=temperature))
    phases: dict[str, list[dict[str, float]]] = {"straightforward": [], "this project": []}
    number = iter(range(1, 1000))
    sides: dict[str, Callable[[], Any]] = {
        "straightforward": lambda: phases["straightforward"].append(theirs.iteration(temperature)),
        "this project": lambda: phases["this project"].append(our_iteration(trainer, next(number))),
    }
    seconds, _ = interleaved(sides, pairs)
    slow, fast = seconds["straightforward"], seconds["this project"]
    counted = operations(trainer, sizes)
    allowed = counted["straightforward"] / counted["this project"]
    found = ratios(slow, fast)
    ours = phases["this project"][1:]
    learning = [sum(each[phase] for phase in PHASES[2:]) for each in ours]
    other = phases["straightforward"][1:]
    return {
        "machine": machine(),
        "sizes": vars(sizes) | {"temperature": temperature},
        "largest differences": differences,
        "seconds": {side: spread(times) for side, times in seconds.items()},
        "times as fast": found,
        "operations allow": allowed,
        "share reached": found.median / allowed,
        "rollout": ratios([e["rollout"] for e in other], [e["rollout"] for e in ours]),
        "ELBOs and updates": ratios([e["learning"] for e in other], learning),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure from the command line.

    Args:
        argv: flags; those of the process if None.

    Returns:
        What was measured.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="large-vocabulary", help="the model")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--temperature", type=float, default=0.0, help="of timed rollouts")
    parser.add_argument("--threads", type=int, default=2, help="of either side")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args(argv)
    if argv is None:
        keep_freed_memory()
    torch.set_num_threads(options.threads)
    report = measure(options.shape, SIZES[options.shape], options.pairs, options.temperature)
    print(json.dumps({"machine": report["machine"], "sizes": report["sizes"]}))
    columns = ("times as fast", "operations allow", "share reached", "rollout", "ELBOs and updates")
    cells = [
        f"{report[column]:.2f}" if isinstance(report[column], float) else str(report[column])
        for column in columns
    ]
    own, plain = (str(report["seconds"][side]) for side in ("this project", "straightforward"))
    print_table(
        ["shape", "straightforward, s", "this project, s", *columns],
        [[options.shape, plain, own, *cells]],
    )
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1, default=as_json) + "\n")
    return report


if __name__ == "__main__":
    main()
