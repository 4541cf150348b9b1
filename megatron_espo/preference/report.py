"""What preference optimization reports of its pairs."""

from collections.abc import Mapping

from torch import Tensor

from megatron_espo.monitor.metrics import Columns, gather_columns, statistics
from megatron_espo.monitor.tensorboard import LAYOUT, Chart
from megatron_espo.objectives import Loss
from megatron_espo.parallel.layout import Layout
from megatron_espo.passes.batch import Sequences
from megatron_espo.rl.scalars import Made, optimizer_scalars

CHARTS: dict[str, dict[str, Chart]] = {
    "Preference": {
        "loss": ("Multiline", ["policy/loss", "eval/loss"]),
        "accuracy": ("Multiline", ["preference/accuracy", "eval/accuracy"]),
        "margin": ("Margin", [f"preference/margin/{end}" for end in ("mean", "min", "max")]),
        "rewards": ("Multiline", ["preference/reward_chosen", "preference/reward_rejected"]),
        "gradient norm": ("Multiline", ["policy/grad_norm"]),
        "learning rate": ("Multiline", ["policy/learning_rate"]),
        "warnings": ("Multiline", ["warnings/.*"]),
    },
    "ELBO": {"per token": ("Multiline", ["elbo/per_token/.*"])},
    **{name: LAYOUT[name] for name in ("Performance", "Hardware")},
}
"""How TensorBoard groups the charts of such a run."""


def pair_columns(terms: Loss, draws: Tensor, sequences: Sequences, layout: Layout) -> Columns:
    """Gather what there is to say of each pair of the data-parallel ranks.

    Args:
        terms: loss terms of this rank's completions, chosen and rejected in turn.
        draws: float32 ``[2 k, m]``, their ELBO draws in nats.
        sequences: the completions.
        layout: process groups.

    Returns:
        Columns, equal on all ranks, pairs in the order of the ranks.
    """
    lengths = sequences.completion_lengths
    assert lengths is not None
    chosen, rejected = terms.statistics["reward"].double().view(-1, 2).unbind(dim=1)
    elbo = (draws.mean(dim=1) / lengths).view(-1, 2)
    margin = chosen - rejected
    columns = {
        "loss": terms.loss[::2],
        "margin": margin,
        # Policy and reference agree before the first step: a tie is worth a half.
        "correct": (margin > 0).double() + (margin == 0).double() / 2,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "elbo_chosen": elbo[:, 0],
        "elbo_rejected": elbo[:, 1],
    }
    return gather_columns({name: part.tolist() for name, part in columns.items()}, layout)


def step_scalars(columns: Columns, made: Made) -> dict[str, float]:
    """Summarise an optimizer step.

    Args:
        columns: from :func:`pair_columns`.
        made: the step.

    Returns:
        Named numbers, equal on all ranks.
    """
    return {
        "policy/loss": float(columns["loss"].mean()),
        **optimizer_scalars(made),
        "preference/accuracy": float(columns["correct"].mean()),
        **statistics(columns, "margin", "preference/margin"),
        "preference/reward_chosen": float(columns["reward_chosen"].mean()),
        "preference/reward_rejected": float(columns["reward_rejected"].mean()),
        "elbo/per_token/chosen": float(columns["elbo_chosen"].mean()),
        "elbo/per_token/rejected": float(columns["elbo_rejected"].mean()),
    }


def held_out_scalars(columns: Columns) -> dict[str, float]:
    """Summarise held-out pairs."""
    return {
        "eval/loss": float(columns["loss"].mean()),
        "eval/accuracy": float(columns["correct"].mean()),
        "eval/margin": float(columns["margin"].mean()),
        "eval/reward_chosen": float(columns["reward_chosen"].mean()),
        "eval/reward_rejected": float(columns["reward_rejected"].mean()),
    }


def console_line(step: int, total: int, scalars: Mapping[str, float], seconds: float) -> str:
    """Write a step's line for the console.

    Args:
        step: optimizer steps done.
        total: of the run.
        scalars: of the step.
        seconds: that it took.

    Returns:
        The line, without the time left.
    """
    return (
        f"step {step}/{total} | loss {scalars['policy/loss']:.4f} | "
        f"accuracy {100 * scalars['preference/accuracy']:.1f}% | "
        f"margin {scalars['preference/margin/mean']:.3f} (chosen "
        f"{scalars['preference/reward_chosen']:.3f}, rejected "
        f"{scalars['preference/reward_rejected']:.3f}) | grad {scalars['policy/grad_norm']:.3f} | "
        f"{seconds:.2f}s"
    )
