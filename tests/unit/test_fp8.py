"""What FP8 needs of shapes and flags."""

import argparse
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_espo.commands.launch import complete_flags
from megatron_espo.model.fp8 import (
    OPEN_PICKLES,
    STATELESS_RECIPES,
    check_arguments,
    check_device,
    check_policy_arguments,
    check_stored,
    fp8_phase,
    sequence_multiple,
)
from megatron_espo.startup.arguments import plan_arguments
from megatron_espo.training.espo import prepare_arguments

LLADA = {
    "fp8": "hybrid", "fp8_recipe": "tensorwise", "bf16": True,
    "fp8_param_gather": False, "tensor_model_parallel_size": 8, "num_attention_heads": 32,
    "group_query_attention": False, "num_query_groups": 1, "kv_channels": 128,
    "hidden_size": 4096, "ffn_hidden_size": 12288, "save": None, "load": None,
}  # fmt: skip
DREAM = LLADA | {
    "tensor_model_parallel_size": 4, "num_attention_heads": 28, "group_query_attention": True,
    "num_query_groups": 4, "hidden_size": 3584, "ffn_hidden_size": 18944,
}  # fmt: skip


def arguments(base: dict[str, Any] = LLADA, **changes: Any) -> Any:
    return SimpleNamespace(**(base | changes))


@given(
    recipe=st.sampled_from(STATELESS_RECIPES),
    split=st.sampled_from((1, 2, 4, 8)),
    rows=st.integers(1, 64),
    tiles=st.integers(1, 5),
)
def test_padded_rows_fit_on_every_rank(recipe: str, split: int, rows: int, tiles: int) -> None:
    positions = tiles * sequence_multiple(recipe, split, rows)
    assert positions % split == 0
    needed = 32 if recipe == "mxfp8" else 16
    # Any number of rows, such as those of the last micro-batch.
    assert all((positions // split * b) % needed == 0 for b in (1, 3, rows))
    if recipe == "blockwise" and split > 1:
        assert (positions // split * rows) % 128 == 0


def test_padding_is_the_least_that_fits() -> None:
    assert sequence_multiple(None, 1) == 1
    assert sequence_multiple(None, 4) == 4
    assert sequence_multiple("tensorwise", 1, 3) == 16
    assert sequence_multiple("tensorwise", 8) == 128
    assert sequence_multiple("mxfp8", 2) == 64
    assert sequence_multiple("blockwise", 1, 1) == 16
    assert sequence_multiple("blockwise", 2, 4) == 64
    assert sequence_multiple("blockwise", 2, 32) == 32


@pytest.mark.parametrize("recipe", STATELESS_RECIPES)
@pytest.mark.parametrize("base", [LLADA, DREAM], ids=["llada", "dream"])
def test_published_shapes_fit_up_to_their_largest_layout(base: dict[str, Any], recipe: str) -> None:
    check_arguments(arguments(base, fp8_recipe=recipe))


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"ffn_hidden_size": 12288 + 64}, "--ffn-hidden-size"),
        ({"hidden_size": 4104}, "--hidden-size"),
        ({"num_attention_heads": 4, "kv_channels": 24}, "--num-attention-heads"),
        ({"bf16": False}, "--bf16"),
    ],
)
def test_unfit_shapes_and_flags_are_refused(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        check_arguments(arguments(**changes))
    check_arguments(arguments(fp8=None, **changes))


def test_the_size_that_does_not_fit_is_the_one_that_is_named() -> None:
    """The hidden dimension is whole on every tensor-parallel rank, the others are split."""
    with pytest.raises(ValueError, match=r"--hidden-size gives a layer dimension of 4104; .* 16\."):
        check_arguments(arguments(hidden_size=4104, tensor_model_parallel_size=2))
    with pytest.raises(ValueError, match=r"dimension of 12304; .* 32 on 2 tensor-parallel ranks"):
        check_arguments(arguments(ffn_hidden_size=12304, tensor_model_parallel_size=2))


def test_mxfp8_needs_more_than_the_others() -> None:
    half = {"tensor_model_parallel_size": 1, "ffn_hidden_size": 1008}
    check_arguments(arguments(**half))
    with pytest.raises(ValueError, match="multiple of 32"):
        check_arguments(arguments(fp8_recipe="mxfp8", **half))


@pytest.mark.parametrize(
    ("changes", "phases", "reason"),
    [
        ({"fp8_recipe": "delayed"}, "both", "ratios of unchanged weights would differ from 1"),
        ({"fp8_recipe": "custom"}, "both", "use one of tensorwise, blockwise, mxfp8"),
        ({"fp8_param_gather": True}, "both", "--fp8-param-gather"),
        ({"fp8": None}, "rollout", "--espo-fp8-phases rollout needs --fp8-format"),
    ],
)
def test_policies_need_stateless_scaling_of_weights_in_higher_precision(
    changes: dict[str, Any], phases: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        check_policy_arguments(arguments(**changes), phases)
    for fine in ("both", "rollout", "elbo"):
        check_policy_arguments(arguments(), fine)  # type: ignore[arg-type]


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("layers", ["transformer_engine", "local"])
def test_gradients_are_fused_on_gpus_where_the_layers_can(
    monkeypatch: pytest.MonkeyPatch, installed: bool, layers: str
) -> None:
    """Transformer Engine's layers always can; Megatron's need an extension of apex."""
    find = importlib.util.find_spec

    def spec(name: str) -> Any:
        return installed or None if name == "fused_weight_gradient_mlp_cuda" else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", spec)

    def planned(*more: str) -> bool:
        flags = ["llada_8b", "gsm8k"], ["--transformer-impl", layers, *more]
        args = plan_arguments(complete_flags(*flags), prepare_arguments, 8)
        return bool(args.gradient_accumulation_fusion)

    assert planned() is (installed or layers == "transformer_engine")
    assert not planned("--no-gradient-accumulation-fusion")


def test_phase_switches_every_config_and_gives_it_back_after_an_error() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1))
    configs = [SimpleNamespace(fp8="hybrid"), SimpleNamespace(fp8="e4m3")]
    for module, config in zip(model, configs, strict=True):
        module.config = config  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError), fp8_phase([model], "rollout", "elbo"):
        assert [config.fp8 for config in configs] == [None, None]
        raise ZeroDivisionError
    assert [config.fp8 for config in configs] == ["hybrid", "e4m3"]
    for phases in ("both", "rollout"):
        with fp8_phase([model], "rollout", phases):  # type: ignore[arg-type]
            assert [config.fp8 for config in configs] == ["hybrid", "e4m3"]


@pytest.mark.parametrize("flag", ["save", "load"])
def test_delayed_scaling_is_refused_where_its_checkpoints_could_not_be_read(
    monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.delenv(OPEN_PICKLES, raising=False)
    check_arguments(arguments(fp8_recipe="delayed"))
    check_arguments(arguments(**{flag: "runs/x"}))
    run = arguments(fp8_recipe="delayed", **{flag: "runs/x"})
    with pytest.raises(ValueError, match=f"--fp8-recipe delayed .* tensorwise .* {OPEN_PICKLES}=1"):
        check_arguments(run)
    monkeypatch.setenv(OPEN_PICKLES, "1")
    check_arguments(run)


def test_checkpoints_of_delayed_scaling_are_named_before_transformer_engine_reads_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(OPEN_PICKLES, raising=False)
    engine, where = "transformer_engine", "--pretrained-checkpoint base"
    # Without FP8 the recipe is stored, too, and says nothing.
    plain = argparse.Namespace(fp8=None, fp8_recipe="delayed")
    stateless = argparse.Namespace(fp8="hybrid", fp8_recipe="tensorwise")
    delayed = argparse.Namespace(fp8="hybrid", fp8_recipe="delayed")
    for stored in (plain, stateless, argparse.Namespace()):
        check_stored(stored, engine, where)
    check_stored(delayed, "local", where)
    with pytest.raises(ValueError, match=f"^{where} was trained with --fp8-recipe delayed"):
        check_stored(delayed, engine, where)
    monkeypatch.setenv(OPEN_PICKLES, "1")
    check_stored(delayed, engine, where)


@pytest.mark.parametrize("name", ["quantization", "fp8"])
def test_recipes_are_asked_for_by_the_name_that_transformer_engine_has(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    manager = SimpleNamespace(
        is_fp8_available=lambda: (True, ""),
        is_mxfp8_available=lambda: (False, "needs 10.0."),
        is_fp8_block_scaling_available=lambda: (True, ""),
    )
    module = f"transformer_engine.pytorch.{name}"
    for package in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
        sys.modules[package].__path__ = []
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setattr(sys.modules[module], "FP8GlobalStateManager", manager, raising=False)
    check_device("tensorwise")
    with pytest.raises(ValueError, match=r"--fp8-recipe mxfp8 does not run on this GPU: needs 10"):
        check_device("mxfp8")
