"""Statistics of an evaluation: confidence intervals, pass@k, the summary of a run's records."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_espo.errors import UserError

# Half of the width of a 95% interval of the normal distribution.
_Z = 1.959963984540054


def wilson_interval(successes: float, count: int, z: float = _Z) -> tuple[float, float]:
    """Bound a success probability (Wilson's score interval, 1927).

    Unlike the normal approximation it stays within [0, 1] and has a width at 0% and 100%.

    Args:
        successes: number of successes; may be a fraction.
        count: number of trials, at least 1.
        z: normal quantile of the confidence level; the default gives 95%.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: there are no trials, or more successes than trials.
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"{successes} successes of {count} trials have no interval.")
    rate, weight = successes / count, z * z / count
    middle = (rate + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(rate * (1 - rate) / count + weight / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Estimate without bias the probability that one of k samples is correct.

    1 - C(n - c, k) / C(n, k), Chen et al. 2021 (arXiv 2107.03374, eq. 1).

    Args:
        num_samples: samples n of the problem.
        num_correct: correct ones c among them.
        k: samples one may try, at most n.

    Returns:
        The estimate.

    Raises:
        UserError: k is not between 1 and n.
    """
    if not 1 <= k <= num_samples:
        raise UserError(
            f"pass@{k} needs at least {k} samples per problem, there are {num_samples}."
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


@dataclass(frozen=True)
class Record:
    """One finished completion; a line of completions.jsonl.

    Attributes:
        length: completion length it was sampled with, in tokens.
        problem: number of the problem in the data, from 0.
        sample: number of the completion among those of its problem.
        prompt: what the model saw, as text.
        completion: text before the end of sequence.
        token_ids: all tokens.
        reward: of the task.
        correct: exact success.
        metrics: the task's other numbers.
        num_tokens: effective tokens: those before the end of sequence.
        num_evaluations: model evaluations (NFE).
        num_committed: tokens that the model decided; the rest was filled in after the end.
        confidence: their mean probability when they were committed.
        seconds: its share of the wall clock of all ranks.
    """

    length: int
    problem: int
    sample: int
    prompt: str
    completion: str
    token_ids: list[int]
    reward: float
    correct: bool
    metrics: dict[str, float]
    num_tokens: int
    num_evaluations: int
    num_committed: int
    confidence: float
    seconds: float

    @property
    def key(self) -> tuple[int, int, int]:
        """Which completion this is."""
        return self.length, self.problem, self.sample


@dataclass(frozen=True)
class Summary:
    """The result at one completion length.

    Attributes:
        accuracy: share of exact successes, the mean over problems of their samples' share.
        accuracy_low: lower end of its 95% interval (Wilson). With several samples per problem
            each problem counts as one trial, which makes the interval wider than need be.
        accuracy_high: upper end.
        reward: mean reward.
        completion_length: mean effective tokens.
        num_problems: how many problems the means are over.
        num_samples: completions per problem.
        length: tokens generated per completion.
        num_evaluations: mean model evaluations per completion.
        tokens_per_step: tokens that a model evaluation committed on average.
        confidence: mean probability of the tokens when they were committed.
        tokens_per_second: effective tokens per second of all ranks together, scoring included.
        pass_at_k: unbiased pass@k by k.
        metrics: means of the task's other numbers.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    reward: float
    completion_length: float
    num_problems: int
    num_samples: int
    length: int
    num_evaluations: float
    tokens_per_step: float
    confidence: float
    tokens_per_second: float
    pass_at_k: dict[int, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def summarize(records: Sequence[Record], ks: Sequence[int] = ()) -> Summary:
    """Summarise the completions of one length.

    Args:
        records: the same number of completions for every problem, at least one.
        ks: which pass@k to estimate.

    Returns:
        The summary; it does not depend on the order of the records.
    """
    records = sorted(records, key=lambda record: record.key)
    correct: dict[int, list[bool]] = {}
    for record in records:
        correct.setdefault(record.problem, []).append(record.correct)
    problems, samples = len(correct), len(records) // len(correct)
    assert all(len(each) == samples for each in correct.values())
    accuracy = _mean([float(record.correct) for record in records])
    low, high = wilson_interval(accuracy * problems, problems)
    tokens = sum(record.num_tokens for record in records)
    seconds = sum(record.seconds for record in records)
    names = sorted({name for record in records for name in record.metrics})
    return Summary(
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        reward=_mean([record.reward for record in records]),
        completion_length=tokens / len(records),
        num_problems=problems,
        num_samples=samples,
        length=records[0].length,
        num_evaluations=_mean([float(record.num_evaluations) for record in records]),
        tokens_per_step=sum(record.num_committed for record in records)
        / max(sum(record.num_evaluations for record in records), 1),
        confidence=_mean([record.confidence for record in records]),
        tokens_per_second=tokens / max(seconds, 1e-9),
        pass_at_k={
            k: _mean([pass_at_k(samples, sum(each), k) for each in correct.values()]) for k in ks
        },
        metrics={
            name: _mean([r.metrics[name] for r in records if name in r.metrics]) for name in names
        },
    )


def markdown_table(summaries: Sequence[Summary]) -> str:
    """Write results as a Markdown table, one row per completion length."""
    ks = sorted({k for summary in summaries for k in summary.pass_at_k})
    header = [
        "length", "evaluations", "problems", "samples", "accuracy", "95% interval", "reward",
        "effective tokens", "tokens/s", *(f"pass@{k}" for k in ks),
    ]  # fmt: skip
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for s in summaries:
        rows.append([
            f"{s.length}", f"{s.num_evaluations:.1f}", f"{s.num_problems}", f"{s.num_samples}",
            f"{100 * s.accuracy:.1f}%", f"{100 * s.accuracy_low:.1f}-{100 * s.accuracy_high:.1f}%",
            f"{s.reward:.3f}", f"{s.completion_length:.1f}", f"{s.tokens_per_second:.1f}",
            *(f"{100 * s.pass_at_k[k]:.1f}%" if k in s.pass_at_k else "" for k in ks),
        ])  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
