"""Objectives of reinforcement learning, one short file each: docs/objectives.md."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from megatron_espo.config import EspoConfig
from megatron_espo.errors import UserError
from megatron_espo.objectives.base import Given, Loss, Objective, loss_gradient, setting
from megatron_espo.objectives.bgpo import Bgpo
from megatron_espo.objectives.block_just_grpo import BlockJustGrpo
from megatron_espo.objectives.bridge import Bridge
from megatron_espo.objectives.cj_grpo import CjGrpo
from megatron_espo.objectives.coupled_grpo import CoupledGrpo
from megatron_espo.objectives.credit import Credit
from megatron_espo.objectives.diffu_grpo import DiffuGrpo
from megatron_espo.objectives.ebpo import Ebpo
from megatron_espo.objectives.espo import Espo
from megatron_espo.objectives.gdpo import Gdpo
from megatron_espo.objectives.gdsd import Gdsd
from megatron_espo.objectives.just_grpo import JustGrpo
from megatron_espo.objectives.mean_field import MeanField
from megatron_espo.objectives.ospo import Ospo
from megatron_espo.objectives.rspo import Rspo
from megatron_espo.objectives.spg import Spg
from megatron_espo.objectives.stable_drl import StableDrl
from megatron_espo.objectives.token_elbo import TokenElbo
from megatron_espo.objectives.trace_rl import TraceRl
from megatron_espo.objectives.wd1 import Wd1
from megatron_espo.own_code import load_own

__all__ = [
    "BUILT_IN",
    "Credit",
    "Given",
    "Loss",
    "Objective",
    "check_objective",
    "chosen_gradient",
    "load_objective",
    "loss_gradient",
    "num_draws",
    "objective_of",
    "setting",
    "views_per_completion",
]

BUILT_IN: Mapping[str, type[Objective]] = {
    "espo": Espo,
    "token_elbo": TokenElbo,
    "mean_field": MeanField,
    "diffu_grpo": DiffuGrpo,
    "coupled_grpo": CoupledGrpo,
    "wd1": Wd1,
    "gdsd": Gdsd,
    "spg": Spg,
    "rspo": Rspo,
    "bridge": Bridge,
    "gdpo": Gdpo,
    "stable_drl": StableDrl,
    "bgpo": Bgpo,
    "just_grpo": JustGrpo,
    "block_just_grpo": BlockJustGrpo,
    "cj_grpo": CjGrpo,
    "trace_rl": TraceRl,
    "ebpo": Ebpo,
    "ospo": Ospo,
}

_DEFAULTS = EspoConfig()
# Settings that some objectives do not use.
_SHARED = (
    "clip_eps_low", "clip_eps_high", "kl_coef", "kl_estimator", "elbo_estimator", "num_mc",
)  # fmt: skip


@lru_cache
def load_objective(name: str, settings: tuple[str, ...] = ()) -> Objective:
    """Return what --espo-objective names, with its settings.

    Args:
        name: a built-in name; FILE.py or a module with an ``objective``, or ``FILE.py:name`` and
            ``module.name``; a subclass of Objective, or an instance of one.
        settings: "NAME=VALUE" (--espo-objective-args).

    Returns:
        The objective.

    Raises:
        UserError: there is no such objective or setting.
    """
    flag = f"--espo-objective {name}"
    found: object = BUILT_IN.get(name)
    if found is None:
        unknown = UserError(
            f"{flag}: no such objective; use one of {', '.join(BUILT_IN)}, a FILE.py with an "
            "objective, or my_module.my_objective"
        )
        found = load_own(name, "--espo-objective", "objective", unknown)
        found = getattr(found, "objective", found)
    objective = found() if inspect.isclass(found) and issubclass(found, Objective) else found
    if not isinstance(objective, Objective):
        raise UserError(
            f"{flag}: is no objective; derive it from megatron_espo.objectives.Objective and call "
            "it objective (docs/objectives.md)"
        )
    return dataclasses.replace(objective, **_values(objective, name, settings))


def _values(objective: Objective, name: str, settings: tuple[str, ...]) -> dict[str, float | int]:
    fields = {field.name: field for field in dataclasses.fields(objective)}
    known = {key: getattr(objective, key) for key in fields}
    values = {}
    for given in settings:
        key, equals, text = given.partition("=")
        if not equals or key not in known:
            has = f"its settings are {', '.join(known)}" if known else "it has none"
            raise UserError(
                f"--espo-objective-args {given}: no setting of --espo-objective {name}, {has}; "
                "write NAME=VALUE."
            )
        try:
            values[key] = type(known[key])(text)
        except ValueError:
            raise UserError(
                f"--espo-objective-args {given}: {text} is no {type(known[key]).__name__}."
            ) from None
        low, high = fields[key].metadata.get("range", (-math.inf, math.inf))
        if not low <= values[key] <= high or math.isinf(values[key]):
            raise UserError(f"--espo-objective-args {given}: must lie in [{low:g}, {high:g}].")
    return values


def objective_of(espo: EspoConfig) -> Objective:
    """Return the objective of a run.

    Args:
        espo: its settings.

    Raises:
        UserError: see :func:`load_objective`.
    """
    return load_objective(espo.objective, tuple(espo.objective_args or ()))


def num_draws(espo: EspoConfig) -> int:
    """Monte-Carlo draws of a completion: --espo-num-mc, or 1 where more would be alike."""
    return espo.num_mc if "num_mc" in objective_of(espo).honours else 1


def views_per_completion(espo: EspoConfig) -> int:
    """Model rows behind one completion's loss: all views of all its draws."""
    return num_draws(espo) * objective_of(espo).masks(espo).per_draw


def chosen_gradient(espo: EspoConfig, rows_per_batch: int) -> Literal["joint", "two_pass"]:
    """Say what --espo-gradient is with micro-batches of so many views."""
    if espo.gradient != "auto":
        return espo.gradient
    whole = rows_per_batch % views_per_completion(espo) == 0
    return "joint" if whole and objective_of(espo).scope != "group" else "two_pass"


def check_objective(espo: EspoConfig) -> EspoConfig:
    """Check a run's settings against its objective.

    Args:
        espo: valid settings.

    Returns:
        Them, without the default KL penalty where the objective has none.

    Raises:
        UserError: naming the flag.
    """
    objective, name = objective_of(espo), f"--espo-objective {espo.objective}"
    if "kl_coef" not in objective.honours and espo.kl_coef == _DEFAULTS.kl_coef:
        espo = dataclasses.replace(espo, kl_coef=0.0)
    for flag in _SHARED:
        value, idle = getattr(espo, flag), {"kl_coef": (0.0,), "num_mc": (1, 2)}
        without = idle.get(flag, (getattr(_DEFAULTS, flag),))
        if flag not in objective.honours and value not in without:
            raise UserError(
                f"--espo-{flag.replace('_', '-')} {value} has no effect with {name}; leave it "
                f"out or pass {without[0]}."
            )
    if espo.kl_estimator == "k2_unbiased" and "k2_unbiased" not in objective.honours:
        raise UserError(
            f"--espo-kl-estimator k2_unbiased multiplies draws of a whole ELBO, which {name} has "
            "not; use k2."
        )
    if objective.credit() is not None and not objective.per_token:
        raise UserError(
            f"{name}: splits advantages over tokens (credit) and has no terms of tokens; set "
            "per_token = True and take given.token_advantages (docs/objectives.md)."
        )
    if espo.gradient == "joint" and objective.scope == "group":
        raise UserError(
            f"--espo-gradient joint: with {name} a completion's loss depends on its group, which "
            "no micro-batch holds; use two_pass."
        )
    return espo
