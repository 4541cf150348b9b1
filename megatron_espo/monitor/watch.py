"""Notices what a person would want to know of at once, and says it once.

Everything here is a function of the scalars of a run, and its memory goes into checkpoints: a run
that was killed and resumed warns where an undisturbed one does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import NamedTuple

WatchState = dict[str, list[float]]
"""Values seen, by rule, the last ones last; under ``"active/NAME"`` whether it was said."""

_TOLERANCE = 1e-4
_SPREADLESS = 0.9
_RISE = 10.0
_REMEMBERED = 32
# Tokens per step against their median; a policy that learns becomes somewhat surer.
_FASTER = 1.5
# Effective share of the samples. Ratios of a run that learns well are all near 1.
_FEW = 0.5
# Fewer values have no median worth the name.
_FEWEST = 8
# Nats per token. A policy starts at the reference, so that any KL is many times the first ones;
# runs that learn well reach a few tenths.
_SMALL_KL, _LARGE_KL = 0.5, 2.0


@dataclass(frozen=True)
class Rule:
    """One thing to warn of.

    Attributes:
        name: of the scalar ``warnings/NAME``.
        scalar: what it looks at.
        holds: (value, earlier values) -> whether to warn.
        text: what to say; ``{value}`` and ``{usual}`` (the median of earlier values) are filled in.
    """

    name: str
    scalar: str
    holds: Callable[[float, Sequence[float]], bool]
    text: str


def _runs_away(value: float, earlier: Sequence[float]) -> bool:
    return len(earlier) >= _FEWEST and value > _RISE * median(earlier)


RULES = (
    Rule(
        "ratio_at_first_update",
        "policy/ratio_first_update/max_deviation",
        lambda value, earlier: value > _TOLERANCE,
        "the importance ratio at a rollout's first update is off 1 by {value:.2e}: sampling and "
        "training do not compute the same model; look for dropout, stale weights or FP8 state",
    ),
    Rule(
        "no_spread",
        "reward/zero_std_groups",
        # One rollout of few prompts may be unlucky; four in a row are not.
        lambda value, earlier: len(earlier) >= 3 and fmean([*earlier[-3:], value]) >= _SPREADLESS,
        "{value:.0%} of the groups have completions of equal reward and teach nothing: the "
        "problems are too hard or too easy, or --rollout-temperature is too low",
    ),
    Rule(
        "identical",
        "rollout/identical_completions",
        lambda value, earlier: len(earlier) >= 3 and fmean([*earlier[-3:], value]) >= _SPREADLESS,
        "{value:.0%} of the completions equal another one of their group: sampling is greedy, or "
        "the policy has lost its diversity; raise --rollout-temperature, and look at "
        "--rollout-top-p and --rollout-top-k",
    ),
    Rule(
        "tokens_per_step",
        "rollout/tokens_per_step",
        lambda value, earlier: len(earlier) >= _FEWEST and value > _FASTER * median(earlier),
        "a model evaluation commits {value:.2f} tokens, usually {usual:.2f}: under a threshold the "
        "policy learns to be sure, not to be right; raise --rollout-threshold, or sample with "
        "--rollout-denoising-steps alone",
    ),
    Rule(
        "effective_sample_size",
        "policy/effective_sample_size",
        lambda value, earlier: value < _FEW,
        "the ratios of an update are worth {value:.0%} of its samples: a few of them decide the "
        "step; lower --lr or --espo-updates-per-rollout",
    ),
    Rule(
        "elbo_variance",
        "elbo/mc_variance_per_token",
        _runs_away,
        "the variance of the ELBO estimates runs away: {value:.2e}, usually {usual:.2e}; raise "
        "--espo-num-mc or lower --lr",
    ),
    Rule(
        "kl",
        "policy/kl_per_token",
        lambda value, earlier: (
            value > _LARGE_KL or (value > _SMALL_KL and _runs_away(value, earlier))
        ),
        "the KL to the reference policy runs away: {value:.2e} nats per token, usually "
        "{usual:.2e}; lower --lr or raise --espo-kl-coef",
    ),
    Rule(
        "not_finite",
        "policy/grad_norm",
        lambda value, earlier: False,  # any rule holds for a number that is not finite
        "the gradient norm is {value}; the last good weights may be those of the last checkpoint",
    ),
)


class Warnings(NamedTuple):
    """What a look at some scalars yields.

    Attributes:
        scalars: ``warnings/NAME``, 1 where it holds and 0 where it does not.
        messages: by rule, what has begun to hold.
    """

    scalars: dict[str, float]
    messages: dict[str, str]


class Watch:
    """Looks at every report of a run; all ranks see the same numbers and agree."""

    def __init__(self, state: Mapping[str, Sequence[float]] | None = None) -> None:
        """Begin.

        Args:
            state: from :meth:`state`, when the run is resumed.
        """
        self._state: WatchState = {name: list(values) for name, values in (state or {}).items()}

    def state(self) -> WatchState:
        """Return what a checkpoint must keep."""
        return {name: list(values) for name, values in self._state.items()}

    def look(self, scalars: Mapping[str, float]) -> Warnings:
        """Check the rules whose scalar is among these.

        Args:
            scalars: a report.

        Returns:
            What holds, and what has begun to.
        """
        found: dict[str, float] = {}
        messages = {}
        for rule in RULES:
            if rule.scalar not in scalars:
                continue
            value, earlier = scalars[rule.scalar], self._state.get(rule.name, [])
            holds = not math.isfinite(value) or rule.holds(value, earlier)
            if holds and self._state.get(f"active/{rule.name}") != [1.0]:
                usual = median(earlier) if earlier else math.nan
                messages[rule.name] = rule.text.format(value=value, usual=usual)
            self._state[f"active/{rule.name}"] = [float(holds)]
            if math.isfinite(value):
                self._state[rule.name] = [*earlier, value][-_REMEMBERED:]
            found[f"warnings/{rule.name}"] = float(holds)
        return Warnings(found, messages)
