"""Recipes: flag files that the command line overrides, with the published settings."""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training.arguments import add_megatron_arguments

from megatron_espo.commands.launch import complete_flags, missing_ranks, warn_of_restarts
from megatron_espo.config import DiffusionConfig, EspoConfig, RolloutConfig
from megatron_espo.diffusion.block_noise import grown_size
from megatron_espo.model.presets import expand_preset
from megatron_espo.objectives import check_objective, views_per_completion
from megatron_espo.recipes import RECIPES, expand_recipes, last_value, read_flags
from megatron_espo.startup.arguments import add_arguments, config_from_args

TASKS = ("gsm8k", "math", "countdown", "sudoku", "code")
MODELS = ("llada_8b", "dream_7b")
MIXTURES = ("llada2_mini", "llada_moe_7b")


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def parse(parser: argparse.ArgumentParser, *argv: str) -> argparse.Namespace:
    return parser.parse_args(expand_preset(complete_flags(["llada_8b", "gsm8k"], argv)))


# G, draws, steps, beta, clip range, rate, weight decay, gradient clip (arXiv 2512.03759).
PUBLISHED = {
    "gsm8k": (6, 2, 256, 1e-3, 0.2, 3e-6, 0.01, 0.2),
    "math": (16, 2, 256, 1e-3, 0.2, 3e-6, 0.01, 0.2),
    "countdown": (6, 2, 128, 3e-3, 0.0, 3e-6, 0.01, 0.2),
    "sudoku": (6, 2, 128, 1e-2, 0.2, 3e-6, 0.01, 0.2),
    "code": (10, 2, 256, 1e-2, 0.2, 1e-6, 0.1, 0.8),
}


@pytest.mark.parametrize("task", TASKS)
def test_recipes_hold_the_published_settings(task: str, parser: argparse.ArgumentParser) -> None:
    args = parse(parser, "--recipe", task)
    espo, rollout = config_from_args(EspoConfig, args), config_from_args(RolloutConfig, args)
    espo.validate()
    rollout.validate()
    assert espo.task == task and espo.clip_eps_low == espo.clip_eps_high
    assert PUBLISHED[task] == (
        espo.group_size, espo.num_mc, rollout.denoising_steps, espo.kl_coef, espo.clip_eps_low,
        args.lr, args.weight_decay, args.clip_grad,
    )  # fmt: skip
    assert (espo.prompts_per_rollout, espo.updates_per_rollout) == (16, 8)
    assert (espo.elbo_estimator, espo.kl_estimator) == ("coupled", "k2")
    assert (espo.reference_mix, espo.reference_mix_interval) == (0.6, 64)
    assert (espo.objective, espo.advantage) == ("espo", "leave-one-out")
    assert (rollout.completion_length, rollout.block_length, rollout.temperature) == (256, 32, 1.0)
    assert args.seq_length - rollout.completion_length == 400
    assert (args.adam_beta1, args.adam_beta2, args.lr_decay_style) == (0.9, 0.99, "constant")
    assert args.bf16


# G, prompts, updates, draws, beta, estimator, clip range, advantage, rate, weight decay: d1's
# train.yaml, wd1's train.yaml, SPG's gsm_base_spg_mix, GDSD's run_gdsd_llada_gsm8k.sh and
# train_gdsd.yaml, DiffuCoder's config_coupled_code.yaml, JustGRPO's train.py, CJ-GRPO's train.yaml
# and gsm_run.sh, dLLM-RL's rl_llada.yaml, NeMo-RL's
# just_grpo-sudoku6x6-4n8g-megatron-inference-long.yaml, DARE's run_ebpo_llada2_mini.sh, OSPO's
# ospo_prop_config.yaml.
OBJECTIVES = {
    "diffu_grpo": (6, 16, 12, 1, 0.04, "k3", 0.5, "centred", 3e-6, 0.1),
    "wd1": (6, 8, 12, 1, 0.0, "k2", 0.2, "centred", 3e-6, 0.1),
    "spg": (6, 16, 4, 2, 0.0, "k2", 0.2, "centred", 3e-6, 0.1),
    "gdsd": (16, 20, 8, 2, 1e-3, "k2", 4e-4, "leave-one-out", 3e-6, 0.01),
    "just_grpo": (16, 64, 1, 2, 0.0, "k2", 0.2, "std", 5e-6, 0.0),
    "coupled_grpo": (10, 8, 2, 1, 0.01, "k3", 0.5, "leave-one-out", 1e-6, 0.1),
    "cj_grpo": (6, 16, 12, 2, 0.04, "k3", 0.5, "centred", 3e-6, 0.1),
    "trace_rl": (8, 32, 1, 2, 0.0, "k2", 0.2, "std", 1e-6, 0.0),
    "block_just_grpo": (8, 128, 1, 2, 0.01, "k3", 0.2, "leave-one-out", 3e-7, 0.01),
    "ebpo": (8, 16, 1, 16, 0.0, "k2", 0.2, "std", 5e-7, 0.01),
    "ospo": (8, 8, 1, 2, 0.0, "k2", 0.2, "std", 5e-6, 0.05),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("task", ["gsm8k", "countdown"])
def test_recipes_of_objectives_hold_their_published_settings(
    name: str, task: str, parser: argparse.ArgumentParser
) -> None:
    args = parse(parser, "--recipe", task, "--recipe", name)
    espo = config_from_args(EspoConfig, args)
    espo.validate()
    assert check_objective(espo) == espo and espo.objective == name
    assert OBJECTIVES[name] == (
        espo.group_size, espo.prompts_per_rollout, espo.updates_per_rollout, espo.num_mc,
        espo.kl_coef, espo.kl_estimator, espo.clip_eps_low, espo.advantage, args.lr,
        args.weight_decay,
    )  # fmt: skip
    assert espo.clip_eps_low == espo.clip_eps_high
    rows = espo.completions_per_rollout // 4 * views_per_completion(espo)
    assert rows % args.micro_batch_size == 0


def rate(args: argparse.Namespace, step: int) -> float:
    """The learning rate of a step, from Megatron's scheduler."""
    weight = torch.nn.Parameter(torch.zeros(1))
    batch = args.global_batch_size
    scheduler = OptimizerParamScheduler(
        torch.optim.SGD([weight], lr=args.lr), 0.0, args.lr, args.min_lr,
        args.lr_warmup_iters * batch, args.train_iters * batch, args.lr_decay_style,
        args.weight_decay, args.weight_decay, 0, "constant",
        use_checkpoint_opt_param_scheduler=False,
        wsd_decay_steps=args.lr_wsd_decay_iters * batch, lr_wsd_decay_style=args.lr_wsd_decay_style,
    )  # fmt: skip
    scheduler.step(step * batch)
    return scheduler.optimizer.param_groups[0]["lr"]


def test_pretraining_and_fine_tuning_follow_llada(parser: argparse.ArgumentParser) -> None:
    """arXiv 2502.09992v3, sections 2.2 and 2.3."""
    pretrain, sft = (
        parser.parse_args(expand_preset(expand_recipes(["--recipe", "llada_8b", "--recipe", name])))
        for name in ("pretrain_8b", "sft_8b")
    )
    tokens = pretrain.global_batch_size * pretrain.seq_length
    assert (pretrain.global_batch_size, pretrain.seq_length) == (1280, 4096)
    assert pretrain.train_iters * tokens == pytest.approx(2.3e12, rel=1e-3)
    assert pretrain.lr_wsd_decay_iters * tokens == pytest.approx(0.3e12, rel=1e-3)
    steady = pretrain.train_iters - pretrain.lr_wsd_decay_iters
    for step, expected in (
        (1000, 2e-4), (2000, 4e-4), (steady, 4e-4), (pretrain.train_iters, 1e-5),
        (steady + pretrain.lr_wsd_decay_iters // 2, (4e-4 + 1e-5) / 2),
    ):  # fmt: skip
        assert rate(pretrain, step) == pytest.approx(expected), step
    assert sft.global_batch_size == 256
    assert sft.lr_wsd_decay_iters * 10 == sft.train_iters
    for step, expected in ((25, 1.25e-5), (50, 2.5e-5), (2700, 2.5e-5), (3000, 2.5e-6),
                           (2850, (2.5e-5 + 2.5e-6) / 2)):  # fmt: skip
        assert rate(sft, step) == pytest.approx(expected), step
    assert pretrain.weight_decay == sft.weight_decay == 0.1


def test_next_block_adaptation_follows_nbdiff(parser: argparse.ArgumentParser) -> None:
    """arXiv 2512.06776: 32 tokens within the first 2,500 of 4,000 steps."""
    args = parser.parse_args(expand_preset(expand_recipes(["--recipe", "adapt_8b"])))
    config = config_from_args(DiffusionConfig, args)
    config.validate()
    assert (config.attention_mask, config.logit_shift) == ("context-causal", True)
    assert (config.next_token_weight, args.train_iters, args.lr) == (0.5, 4000, 1e-5)
    assert (args.global_batch_size, args.seq_length) == (1024, 8192)
    sizes = [
        grown_size(
            config.block_size, config.block_growth_to, config.block_growth_factor,
            config.block_growth_interval, config.block_growth_start, step,
        )
        for step in (0, 499, 500, 2499, 2500, 3999)
    ]  # fmt: skip
    assert sizes == [1, 1, 2, 16, 32, 32]


def flags_of(name: str) -> set[str]:
    return {word for word in expand_recipes(["--recipe", name]) if word.startswith("--")}


@pytest.mark.parametrize("names", [TASKS, MODELS])
def test_a_recipe_replaces_another_of_its_kind_completely(names: tuple[str, ...]) -> None:
    assert len({frozenset(flags_of(name)) for name in names}) == 1


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixtures_recipe_replaces_the_scripts_default_model(name: str) -> None:
    assert flags_of("llada_8b") < flags_of(name)


def settled(names: Sequence[str]) -> dict[str, list[str]]:
    """What holds where recipes are named in this order, by flag."""
    found: dict[str, list[str]] = {}
    for word in expand_recipes([word for name in names for word in ("--recipe", name)]):
        if word.startswith("--"):
            found[flag := word] = []
        else:
            found[flag].append(word)
    return found


@pytest.mark.parametrize("job", ["gsm8k", "sudoku", "sft_8b"])
def test_recipes_of_different_kinds_may_be_named_in_any_order(job: str) -> None:
    for kinds in itertools.product(
        (*MODELS, *MIXTURES), ("", "lora", "lora_dream", "lora_80gb", "lora_24gb")
    ):
        orders = [settled(order) for order in itertools.permutations(filter(None, (job, *kinds)))]
        assert all(order == orders[0] for order in orders), kinds
    assert settled(["llada2_mini", job])["--tensor-model-parallel-size"] == ["1"]
    assert settled(["llada_8b", job])["--tensor-model-parallel-size"] == ["2"]


def test_a_models_recipe_samples_as_its_published_runs_in_any_order(
    parser: argparse.ArgumentParser,
) -> None:
    published = {
        "llada_8b": (32, "low_confidence", 1.0, "train"),
        "dream_7b": (256, "entropy", 0.95, "freeze"),
    }
    for model, wanted in published.items():
        for recipes in ((model, "gsm8k"), ("gsm8k", model)):
            args = parse(parser, *(word for name in recipes for word in ("--recipe", name)))
            config_from_args(RolloutConfig, args).validate(args.logit_shift)
            assert wanted == (
                args.rollout_block_length, args.rollout_remasking, args.rollout_top_p,
                args.padding_embedding,
            )  # fmt: skip


def test_the_command_line_wins_over_recipes(parser: argparse.ArgumentParser) -> None:
    args = parse(parser, "--recipe", "sudoku", "--recipe=dream_7b", "--espo-group-size", "4")
    assert (args.espo_task, args.espo_group_size, args.preset) == ("sudoku", 4, "dream_7b")
    assert (args.hidden_size, args.pretrained_checkpoint) == (3584, "checkpoints/dream-7b")
    assert args.save == args.load == "runs/sudoku-dream_7b"
    assert args.tensorboard_dir == "runs/sudoku-dream_7b/tensorboard"
    args = parse(parser, "--preset", "tiny", "--save", "out")
    assert (args.hidden_size, args.save, args.load) == (64, "out", "out")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.flags")), ids=lambda path: path.stem)
def test_recipes_hold_flags_that_exist_and_are_given_once(
    path: Path, parser: argparse.ArgumentParser
) -> None:
    own = [word.split("=")[0] for word in read_flags(path) if word.startswith("--")]
    assert len(own) == len(set(own)), "a flag twice"
    parser.parse_args(expand_preset(expand_recipes(["--recipe", str(path)])))


def test_defaults_of_a_recipe_give_way_to_whatever_else_is_said(tmp_path: Path) -> None:
    (tmp_path / "base.flags").write_text("--lr 1 --seed 1")
    (tmp_path / "middle.flags").write_text(f"--defaults {tmp_path}/base.flags\n--seed 2 --bf16")
    outer = tmp_path / "outer.flags"
    outer.write_text(f"--defaults={tmp_path}/middle.flags\n--save a")
    argv = expand_recipes(["--seed", "3", "--recipe", str(outer), "--load", "b"])
    assert argv == [*"--lr 1 --seed 1 --seed 2 --bf16 --seed 3 --save a --load b".split()]


def test_recipe_files_take_comments_quotes_and_other_recipes(tmp_path: Path) -> None:
    (tmp_path / "inner.flags").write_text("--lr 1 # a rate\n\n# --seed 4\n")
    outer = tmp_path / "outer.flags"
    outer.write_text(f"--save 'a b'\n--recipe {tmp_path}/inner.flags\n--bf16 --lr 2\n")
    argv = expand_recipes(["--seed", "3", "--recipe", str(outer), "--lr", "5"])
    assert argv == ["--seed", "3", "--save", "a b", "--lr", "1", "--bf16", "--lr", "2", "--lr", "5"]
    assert (last_value(argv, "--lr"), last_value(argv, "--bf17")) == ("5", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--recipe {path}", "names itself"),
        ("lr 3", "line 1: lr is no flag"),
        ("--bf16\n--save 'a", "line 2: No closing quotation"),
        ("--recipe gsm9k", r"gsm9k: no such recipe or file; .* gsm8k"),
        ("--recipe", "no such recipe or file"),
        ("--defaults gsm9k", "--defaults gsm9k: no such recipe or file"),
    ],
)
def test_wrong_recipes_are_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.flags"
    path.write_text(text.format(path=path))
    with pytest.raises(ValueError, match=message):
        expand_recipes(["--recipe", str(path)])


def test_a_single_process_starts_one_rank_per_gpu() -> None:
    alone = {"GPUS_PER_NODE": "8"}
    assert missing_ranks(alone) == missing_ranks(alone | {"WORLD_SIZE": "1"}) == 8
    assert missing_ranks({"GPUS_PER_NODE": "1"}) == 0
    assert missing_ranks(alone | {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}) == 0
    assert missing_ranks(alone | {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}) == 0
    with pytest.raises(ValueError, match="pass --nproc-per-node 8 to torchrun"):
        missing_ranks(alone | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"})
    with pytest.raises(ValueError, match="GPUS_PER_NODE is 'all'"):
        missing_ranks({"GPUS_PER_NODE": "all"})


def test_restarts_over_nodes_without_fresh_stores_are_warned_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    nodes = {"RANK": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    restarts = nodes | {"TORCHELASTIC_MAX_RESTARTS": "3"}
    for quiet in (
        nodes,
        restarts | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        restarts | {"RANK": "1"},
        restarts | {"LOCAL_WORLD_SIZE": "16"},
    ):
        warn_of_restarts(quiet)
        assert not capsys.readouterr().err
    warn_of_restarts(restarts)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().err
