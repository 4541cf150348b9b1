"""Settings: defaults that hold, errors that name a real flag, presets with the published shapes."""

import argparse
import dataclasses
import re

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_espo.config import DiffusionConfig, EspoConfig, LaunchConfig, RolloutConfig, SftConfig
from megatron_espo.model.presets import PRESETS, expand_preset
from megatron_espo.startup.arguments import add_arguments, config_from_args

CONFIGS = (LaunchConfig, DiffusionConfig, SftConfig, RolloutConfig, EspoConfig)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


@pytest.mark.parametrize("config", CONFIGS)
def test_dataclasses_are_the_only_source_of_defaults(config, parser) -> None:
    assert config_from_args(config, parser.parse_args([])) == config()


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_are_documented_and_do_not_change_after_parsing(config, parser) -> None:
    prefix = {SftConfig: "sft-", RolloutConfig: "rollout-", EspoConfig: "espo-"}.get(config, "")
    for field in dataclasses.fields(config):
        action = parser._option_string_actions[f"--{prefix}{field.name.replace('_', '-')}"]
        assert action.help and "%" not in action.help.replace("%%", "")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config(), dataclasses.fields(config)[0].name, None)


def test_help_can_be_printed_and_keeps_its_per_cent_signs(parser) -> None:
    text = parser.format_help()
    assert "--espo-group-size" in text and "%%" not in text
    assert re.search(r"\d+% ", text)


def test_defaults_are_valid() -> None:
    DiffusionConfig().validate()
    RolloutConfig().validate()
    RolloutConfig().validate(logit_shift=True)
    EspoConfig().validate()


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (DiffusionConfig(mask_epsilon=0.0), "--mask-epsilon"),
        (DiffusionConfig(mask_epsilon=1.0), "--mask-epsilon"),
        (DiffusionConfig(mask_epsilon=float("nan")), "--mask-epsilon"),
        (DiffusionConfig(random_length_probability=-0.1), "--random-length-probability"),
        (DiffusionConfig(random_length_probability=1.1), "--random-length-probability"),
        (RolloutConfig(completion_length=0), "--rollout-completion-length"),
        (RolloutConfig(completion_length=250), "--rollout-block-length"),
        (RolloutConfig(denoising_steps=0), "--rollout-denoising-steps"),
        (RolloutConfig(denoising_steps=4), "--rollout-denoising-steps"),
        (RolloutConfig(denoising_steps=100), "--rollout-denoising-steps"),
        (RolloutConfig(denoising_steps=512), "--rollout-denoising-steps"),
        (RolloutConfig(temperature=-0.5), "--rollout-temperature"),
        (RolloutConfig(temperature=float("nan")), "--rollout-temperature"),
        (RolloutConfig(temperature=float("inf")), "--rollout-temperature"),
        (RolloutConfig(top_p=0.0), "--rollout-top-p"),
        (RolloutConfig(top_p=1.1), "--rollout-top-p"),
        (RolloutConfig(top_p=float("nan")), "--rollout-top-p"),
        (RolloutConfig(top_k=-1), "--rollout-top-k"),
        (RolloutConfig(temperature=0.0, top_p=0.9), "--rollout-top-p"),
        (RolloutConfig(temperature=0.0, top_k=5), "--rollout-top-k"),
        (RolloutConfig(guidance_scale=-1.0), "--rollout-guidance-scale"),
        (RolloutConfig(guidance_scale=float("nan")), "--rollout-guidance-scale"),
        (RolloutConfig(micro_batch_size=0), "--rollout-micro-batch-size"),
        (RolloutConfig(threshold=0.0), "--rollout-threshold"),
        (RolloutConfig(threshold=float("nan")), "--rollout-threshold"),
        (RolloutConfig(factor=-1.0), "--rollout-factor"),
        (RolloutConfig(factor=float("inf")), "--rollout-factor"),
        (RolloutConfig(threshold=0.9, factor=1.0), "--rollout-factor"),
        (RolloutConfig(threshold=0.9, remasking="random"), "--rollout-remasking"),
        (RolloutConfig(factor=1.0, remasking="entropy"), "--rollout-remasking"),
        (RolloutConfig(cache_refresh_steps=-1), "--rollout-cache-refresh-steps"),
        (RolloutConfig(cache_refresh_steps=2), "--rollout-cache-refresh-steps"),
        (RolloutConfig(cache="dual", guidance_scale=1.0), "--rollout-guidance-scale"),
        (RolloutConfig(cache="prefix", remasking="origin"), "--rollout-remasking"),
        (EspoConfig(group_size=1), "--espo-group-size"),
        (EspoConfig(num_rollouts=0), "--espo-num-rollouts"),
        (EspoConfig(prompts_per_rollout=0), "--espo-prompts-per-rollout"),
        (EspoConfig(updates_per_rollout=0), "--espo-updates-per-rollout"),
        (EspoConfig(num_mc=0), "--espo-num-mc"),
        (EspoConfig(clip_eps_low=-0.1), "--espo-clip-eps-low"),
        (EspoConfig(clip_eps_low=1.0), "--espo-clip-eps-low"),
        (EspoConfig(clip_eps_high=-0.1), "--espo-clip-eps-high"),
        (EspoConfig(kl_coef=-1e-3), "--espo-kl-coef"),
        (EspoConfig(kl_coef=float("nan")), "--espo-kl-coef"),
        (EspoConfig(kl_coef=float("inf")), "--espo-kl-coef"),
        (EspoConfig(eval_interval=-1), "--espo-eval-interval"),
        (EspoConfig(eval_samples=-1), "--espo-eval-samples"),
        (EspoConfig(reference_mix_interval=-1), "--espo-reference-mix-interval"),
        (EspoConfig(samples_to_log=-1), "--espo-samples-to-log"),
        (EspoConfig(kl_estimator="k2_unbiased", num_mc=1), "--espo-num-mc"),
        (EspoConfig(reference_mix=-0.1), "--espo-reference-mix"),
        (EspoConfig(reference_mix=1.1), "--espo-reference-mix"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_flags_that_exist(config, flag, parser) -> None:
    with pytest.raises(ValueError) as caught:
        config.validate()
    message = str(caught.value)
    named = re.findall(r"--[a-z0-9-]*[a-z0-9]", message)
    assert flag in named
    assert set(named) <= set(parser._option_string_actions)
    assert "\n" not in message and message.endswith(".")


def test_guidance_is_refused_only_for_models_with_shifted_logits() -> None:
    config = RolloutConfig(guidance_scale=1.5)
    config.validate(logit_shift=False)
    with pytest.raises(ValueError, match=r"--rollout-guidance-scale .*--logit-shift"):
        config.validate(logit_shift=True)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_windows_of_cached_sampling_must_fit_the_layout(cache) -> None:
    """A window is a block, and with shifted logits one position more."""
    config = RolloutConfig(block_length=32, cache=cache)
    config.validate(logit_shift=False, window_multiple=16)
    config.validate(logit_shift=True, window_multiple=1)
    RolloutConfig(block_length=32).validate(logit_shift=True, window_multiple=5)
    for shift, multiple in ((False, 3), (True, 2)):
        with pytest.raises(ValueError, match=rf"{32 + shift} positions .*--rollout-block-length"):
            config.validate(logit_shift=shift, window_multiple=multiple)


@pytest.mark.parametrize(
    "config",
    [
        DiffusionConfig(random_length_probability=0.0),
        DiffusionConfig(random_length_probability=1.0),
        RolloutConfig(completion_length=256, block_length=256, denoising_steps=1),
        RolloutConfig(completion_length=256, block_length=1, denoising_steps=256),
        RolloutConfig(temperature=0.0, micro_batch_size=1),
        # Parallel decoding does not read the steps.
        RolloutConfig(completion_length=16, block_length=16, threshold=1.5),
        RolloutConfig(factor=0.5, remasking="maskgit_plus", guidance_scale=1.0, early_stop=True),
        RolloutConfig(cache="dual", cache_refresh_steps=1, remasking="random"),
        RolloutConfig(cache="prefix", threshold=0.9),
        EspoConfig(group_size=2, num_rollouts=1, prompts_per_rollout=1, updates_per_rollout=1),
        EspoConfig(clip_eps_low=0.0, clip_eps_high=0.0, kl_coef=0.0, num_mc=1),
        EspoConfig(kl_estimator="k2_unbiased", num_mc=2, reference_mix=0.0),
        EspoConfig(reference_mix=1.0, reference_mix_interval=0),
    ],
)
def test_values_at_the_ends_of_their_ranges_are_valid(config) -> None:
    config.validate()


def test_global_batch_of_an_update_is_every_completion_of_the_rollout() -> None:
    assert EspoConfig(prompts_per_rollout=5, group_size=7).completions_per_rollout == 35


def parse(parser: argparse.ArgumentParser, *argv: str) -> argparse.Namespace:
    return parser.parse_args(expand_preset(list(argv)))


@pytest.mark.parametrize("form", [("--preset", "tiny"), ("--preset=tiny",)])
def test_a_preset_stands_for_its_flags_in_front_of_the_command_line(form) -> None:
    argv = ["--seed", "3", *form, "--num-layers", "5"]
    assert expand_preset(argv) == PRESETS["tiny"].split() + argv
    assert expand_preset(["--seed", "3"]) == ["--seed", "3"]


def test_a_flag_on_the_command_line_wins_over_the_preset(parser) -> None:
    args = parse(parser, "--num-layers", "5", "--preset", "llada_8b", "--stop-token-ids", "4")
    assert (args.num_layers, args.stop_token_ids, args.hidden_size) == (5, [4], 4096)
    assert config_from_args(DiffusionConfig, args).preset == "llada_8b"


@pytest.mark.parametrize("argv", [["--preset", "lada"], ["--preset=lada"], ["--preset"]])
def test_an_unknown_preset_is_refused_with_the_known_ones(argv) -> None:
    with pytest.raises(ValueError, match=r"^--preset .*unknown") as caught:
        expand_preset(argv)
    assert "tiny, llada_8b, dream_7b" in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_bidirectional_llama_without_dropout_or_tied_weights(name, parser) -> None:
    args = parse(parser, "--preset", name)
    assert args.position_embedding_type == "rope" and args.normalization == "RMSNorm"
    assert args.swiglu and not args.add_bias_linear
    assert args.untie_embeddings_and_output_weights
    assert args.attention_dropout == args.hidden_dropout == 0.0
    assert args.hidden_size % args.num_attention_heads == 0


def test_presets_hold_the_published_facts(parser) -> None:
    llada = parse(parser, "--preset", "llada_8b")
    assert (llada.num_layers, llada.hidden_size, llada.num_attention_heads) == (32, 4096, 32)
    assert (llada.ffn_hidden_size, llada.vocab_size) == (12288, 126464)
    assert (llada.rotary_base, llada.layernorm_epsilon) == (500000, 1e-5)
    assert not llada.group_query_attention and not llada.add_qkv_bias and not llada.logit_shift
    assert (llada.mask_token_id, llada.stop_token_ids) == (126336, [126081, 126348])

    dream = parse(parser, "--preset", "dream_7b")
    assert (dream.num_layers, dream.hidden_size, dream.num_attention_heads) == (28, 3584, 28)
    assert (dream.ffn_hidden_size, dream.vocab_size) == (18944, 152064)
    assert dream.group_query_attention and dream.num_query_groups == 4
    assert (dream.rotary_base, dream.layernorm_epsilon) == (1000000, 1e-6)
    assert dream.add_qkv_bias and dream.logit_shift
    assert (dream.mask_token_id, dream.stop_token_ids) == (151666, [151643, 151645])


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llada_8b", 8_015_581_184),
        ("dream_7b", 7_615_616_512),
        ("sdar_8b", 8_190_735_360),
        ("trado_8b", 8_190_735_360),
        ("qwen3_8b", 8_190_735_360),
        ("qwen2_7b", 7_615_616_512),
        ("llama3_8b", 8_030_261_248),
    ],
)
def test_parameters_of_a_preset_add_up_to_the_published_number(name, published, parser) -> None:
    args = parse(parser, "--preset", name)
    h, heads = args.hidden_size, args.num_attention_heads
    kv = h // heads * (args.num_query_groups if args.group_query_attention else heads)
    attention = h * h + 2 * h * kv + h * h
    biases = h + 2 * kv if args.add_qkv_bias else 0
    feed_forward = 3 * h * args.ffn_hidden_size  # gate, up, down
    norms = 2 * h + (2 * h // heads if args.qk_layernorm else 0)
    embedding_and_head = 2 * args.vocab_size * h
    layers = args.num_layers * (attention + biases + feed_forward + norms)
    assert embedding_and_head + layers + h == published
