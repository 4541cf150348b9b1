"""Losses of objectives written out in Python floats, for one group of completions at a time.

A reference gets the log-probabilities ``now`` twice, the second time as constants, so that its
finite differences see what an objective detaches. Indices: completion i, draw m, view v, token k.
"""

import math
from dataclasses import dataclass

Table = list[list[list[list[float]]]]


@dataclass(frozen=True)
class Group:
    """One group: everything by completion, draw, view and token."""

    old: Table
    reference: Table | None
    masks: list[list[list[list[bool]]]]
    weights: list[list[list[float]]]
    advantages: list[float]
    answers: list[int]
    mean_answer: float
    length: int
    low: float
    high: float
    beta: float
    estimator: str
    steps: list[list[int]]
    # Of views by block, on top of the weights.
    token_weights: Table | None = None
    token_advantages: list[list[float]] | None = None

    @property
    def draws(self) -> range:
        return range(len(self.weights[0]))


def kl(d: float, d0: float, estimator: str) -> float:
    if estimator == "k1":
        return d0 * (d - d0) + d0
    return d * d / 2 if estimator == "k2" else math.exp(-d) - 1 + d


def clip(ratio: float, advantage: float, group: Group) -> float:
    limited = min(max(ratio, 1 - group.low), 1 + group.high)
    return -min(ratio * advantage, limited * advantage)


def total(table: Table, i: int, m: int, group: Group) -> float:
    """Weighted log-probability of a draw."""
    return sum(w * sum(view) for w, view in zip(group.weights[i][m], table[i][m], strict=True))


def mean(table: Table, i: int, group: Group) -> float:
    return sum(total(table, i, m, group) for m in group.draws) / len(group.draws)


def espo(now: Table, fixed: Table, i: int, group: Group) -> float:
    length = group.length
    ratio = math.exp((mean(now, i, group) - mean(group.old, i, group)) / length)
    loss = clip(ratio, group.advantages[i], group)
    if group.reference:
        d, d0 = (mean(t, i, group) - mean(group.reference, i, group) for t in (now, fixed))
        loss += group.beta * kl(d, d0, group.estimator) / length
    return loss


def token_ratios(
    now: Table, fixed: Table, i: int, group: Group, proxy, counted, divisor: float, draws=None
) -> float:
    loss = 0.0
    draws = group.draws if draws is None else draws
    for m in draws:
        for k in counted:

            def at(table, m=m, k=k):
                return proxy(table, i, m)[k]

            own = group.token_advantages
            advantage = group.advantages[i] if own is None else own[i][k]
            loss += clip(math.exp(at(now) - at(group.old)), advantage, group)
            if group.reference:
                d, d0 = (at(t) - at(group.reference) for t in (now, fixed))
                loss += group.beta * kl(d, d0, group.estimator)
    return loss / len(draws) / divisor


def token_elbo(now: Table, fixed: Table, i: int, group: Group) -> float:
    def proxy(table, i, m):
        return elbo_terms(table, i, group)

    every = range(group.length)
    return token_ratios(now, fixed, i, group, proxy, every, group.length, draws=[0])


def elbo_terms(table: Table, i: int, group: Group) -> list[float]:
    """The terms of an ELBO by token, a mean over draws."""
    return [
        sum(
            group.weights[i][d][v] * table[i][d][v][k]
            for d in group.draws
            for v in range(len(group.weights[i][d]))
        )
        / len(group.draws)
        for k in range(group.length)
    ]


def ospo(now: Table, fixed: Table, i: int, group: Group) -> float:
    assert group.token_advantages is not None
    length = group.length
    ratio = math.exp((mean(fixed, i, group) - mean(group.old, i, group)) / length)
    terms, same = (elbo_terms(t, i, group) for t in (now, fixed))
    loss = 0.0
    for term, constant, advantage in zip(terms, same, group.token_advantages[i], strict=True):
        loss += clip(ratio * math.exp(term - constant), advantage, group) / length
    if group.reference:
        d, d0 = (mean(t, i, group) - mean(group.reference, i, group) for t in (now, fixed))
        loss += group.beta * kl(d, d0, group.estimator) / length
    return loss


def diffu_grpo(now: Table, fixed: Table, i: int, group: Group) -> float:
    def proxy(table, i, m):
        return table[i][m][0]

    counted = range(group.answers[i])
    return token_ratios(now, fixed, i, group, proxy, counted, group.mean_answer)


def coupled_grpo(now: Table, fixed: Table, i: int, group: Group) -> float:
    def proxy(table, i, m):
        everything, one, other = table[i][m]
        _, w, u = group.weights[i][m]
        mask = group.masks[i][m][1]
        return [
            (everything[k] + (w * one[k] if mask[k] else u * other[k])) / 2
            for k in range(group.length)
        ]

    counted = range(group.answers[i])
    return token_ratios(now, fixed, i, group, proxy, counted, group.mean_answer)


def wd1(now: Table, fixed: Table, i: int, group: Group) -> float:
    size = len(group.advantages)
    up = math.exp(group.advantages[i]) / sum(map(math.exp, group.advantages))
    down = math.exp(-group.advantages[i]) / sum(math.exp(-a) for a in group.advantages)
    likelihood = sum(sum(now[i][m][0][: group.answers[i]]) for m in group.draws)
    return -size * (up - down) * likelihood / len(group.draws)


def gdsd(now: Table, fixed: Table, i: int, group: Group) -> float:
    loss, length = 0.0, group.length
    for m in group.draws:
        change = total(now, i, m, group) - total(group.old, i, m, group)
        change = min(max(change, math.log(1 - group.low)), math.log(1 + group.high))
        loss += (change / length - 10.0 * group.advantages[i]) ** 2
        if group.reference:
            d, d0 = (total(t, i, m, group) - total(group.reference, i, m, group)
                     for t in (now, fixed))  # fmt: skip
            loss += group.beta * kl(d, d0, group.estimator) / length / len(group.draws)
    return loss


def bounds(table: Table, i: int, group: Group, beta: float) -> tuple[float, float]:
    lower, upper, seen = 0.0, 0.0, 0
    n = group.answers[i]
    counts = []
    for m in group.draws:
        masked = [k for k in range(n) if group.masks[i][m][0][k]]
        counts.append(len(masked))
        lower += sum(table[i][m][0][k] for k in masked) / len(masked) / len(group.draws)
    for k in range(n):
        terms = [
            math.exp(beta * table[i][m][0][k]) * n / counts[m]
            for m in group.draws
            if group.masks[i][m][0][k]
        ]
        if terms:
            seen += 1
            upper += math.log(sum(terms) / len(group.draws)) / beta
    return lower, upper / seen


def bound(now: Table, i: int, group: Group) -> float:
    lower, upper = bounds(now, i, group, 1.5)
    return lower if group.advantages[i] > 0 else (lower + upper) / 2


def spg(now: Table, fixed: Table, i: int, group: Group) -> float:
    share = group.answers[i] / group.mean_answer
    return -group.advantages[i] * bound(now, i, group) * share


def stable_drl(now: Table, fixed: Table, i: int, group: Group) -> float:
    size = range(len(group.advantages))
    changes = [bounds(fixed, j, group, 1.5)[0] - bounds(group.old, j, group, 1.5)[0] for j in size]
    weights = [math.exp(min(c, math.log(5.0))) for c in changes]
    share = len(size) * weights[i] / sum(weights)
    return -share * group.advantages[i] * bound(now, i, group)


def rspo(now: Table, fixed: Table, i: int, group: Group) -> float:
    coefficient = group.advantages[i]
    if group.reference:
        d = [mean(fixed, j, group) - mean(group.reference, j, group)
             for j in range(len(group.advantages))]  # fmt: skip
        coefficient -= group.beta * (d[i] - sum(d) / len(d))
    return -coefficient * mean(now, i, group) / group.length


def bridge(now: Table, fixed: Table, i: int, group: Group) -> float:
    def value(table: Table) -> float:
        draws = [math.exp(total(table, i, m, group)) for m in group.draws]
        return math.log(sum(draws) / len(draws))

    ratio, advantage = math.exp((value(now) - value(group.old)) / group.length), group.advantages[i]
    loss = clip(ratio, advantage, group)
    loss = min(loss, -3.0 * advantage) if advantage < 0 else loss
    if group.reference:
        d, d0 = (value(t) - value(group.reference) for t in (now, fixed))
        loss += group.beta * kl(d, d0, group.estimator) / group.length
    return loss


def bgpo(now: Table, fixed: Table, i: int, group: Group) -> float:
    loss, advantage = 0.0, group.advantages[i]
    for m in group.draws:
        d = (total(now, i, m, group) - total(group.old, i, m, group)) / group.length
        one = clip(1 + d if advantage > 0 else math.exp(d), advantage, group)
        loss += (min(one, -3.0 * advantage) if advantage < 0 else one) / len(group.draws)
    if group.reference:
        d, d0 = (mean(t, i, group) - mean(group.reference, i, group) for t in (now, fixed))
        loss += group.beta * kl(d, d0, group.estimator) / group.length
    return loss


def exact(table: Table, i: int, m: int) -> list[float]:
    """Each token's log-probability, in the one view that predicts it."""
    return [sum(view[k] for view in table[i][m]) for k in range(len(table[i][m][0]))]


def just_grpo(now: Table, fixed: Table, i: int, group: Group) -> float:
    return token_ratios(now, fixed, i, group, exact, range(group.length), group.length)


def block_just_grpo(now: Table, fixed: Table, i: int, group: Group) -> float:
    counted = range(group.answers[i])
    return token_ratios(now, fixed, i, group, exact, counted, group.mean_answer)


def at_steps(table: Table, i: int, m: int, group: Group, merged: int) -> list[float]:
    """Each token's log-probability in the view of its step, 0 of those of no step."""
    known = sorted({s for s in group.steps[i] if s >= 0})
    return [
        table[i][m][known.index(s) // merged][k] if s >= 0 else 0.0
        for k, s in enumerate(group.steps[i])
    ]


def cj_grpo(now: Table, fixed: Table, i: int, group: Group) -> float:
    def proxy(table, i, m):
        return at_steps(table, i, m, group, 1)

    steps = {s for s in group.steps[i] if s >= 0}
    loss = 0.0
    for step in steps:
        tokens = [k for k, s in enumerate(group.steps[i]) if s == step]
        loss += token_ratios(now, fixed, i, group, proxy, tokens, len(tokens))
    return loss / len(steps)


def trace_rl(now: Table, fixed: Table, i: int, group: Group) -> float:
    def proxy(table, i, m):
        return at_steps(table, i, m, group, 2)

    counted = range(group.answers[i])
    loss = token_ratios(now, fixed, i, group, proxy, counted, group.mean_answer)
    changes = [
        proxy(now, i, m)[k] - proxy(group.old, i, m)[k] for k in counted for m in group.draws
    ]
    penalty = sum(kl(d, d, "k3") for d in changes) / len(group.draws)
    return loss + 0.01 * penalty / group.mean_answer


def ebpo(now: Table, fixed: Table, i: int, group: Group) -> float:
    assert group.token_weights is not None
    weights = group.token_weights[i]

    def elbo(table: Table) -> float:
        terms = [
            w * logp
            for m in group.draws
            for w, logp in zip(weights[m][0], table[i][m][0], strict=True)
        ]
        return sum(terms) / len(group.draws)

    loss = clip(math.exp(elbo(now) - elbo(group.old)), group.advantages[i], group)
    if group.reference:
        d, d0 = (elbo(t) - elbo(group.reference) for t in (now, fixed))
        loss += group.beta * kl(d, d0, group.estimator)
    return loss


REFERENCES = {
    "espo": espo, "mean_field": espo, "gdpo": espo, "token_elbo": token_elbo,
    "diffu_grpo": diffu_grpo, "coupled_grpo": coupled_grpo, "wd1": wd1, "gdsd": gdsd, "spg": spg,
    "stable_drl": stable_drl, "rspo": rspo, "bridge": bridge, "bgpo": bgpo,
    "just_grpo": just_grpo, "block_just_grpo": block_just_grpo, "cj_grpo": cj_grpo,
    "trace_rl": trace_rl, "ebpo": ebpo, "ospo": ospo, "ospo tokens=1": token_elbo,
}  # fmt: skip
