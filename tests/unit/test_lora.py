"""LoRA in one process: settings, what is frozen, what begins where, and what knows a base again."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron_state import new_groups
from test_float_logits import H, N, R, hidden_states, make_head
from torch import Tensor

from megatron_espo import megatron_patches
from megatron_espo.adapters import attach
from megatron_espo.adapters.adapter import Adapter, Packing
from megatron_espo.adapters.attach import adapters_of, without_adapters
from megatron_espo.adapters.projections import targets_of
from megatron_espo.checkpoint.weights_mark import fingerprint
from megatron_espo.config import LoraConfig
from megatron_espo.errors import UserError
from megatron_espo.model.cpu import matmul
from megatron_espo.model.float_logits import use_float_logits
from megatron_espo.model.provider import model_provider
from megatron_espo.passes.pipeline import RowBatch, run_model
from megatron_espo.rl.reference import AdapterBase, reference_policy
from megatron_espo.startup import adapters as startup
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.training.espo import _settle_mixing

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, SEVEN),
        (["all-linear", "lm_head"], (*SEVEN, "lm_head")),
        # LLaDA's names of the same.
        (["attn_out", "ff_proj", "ff_out", "q_proj"], ("q_proj", "o_proj", "gate_proj",
                                                       "down_proj")),
        (["up_proj", "v_proj", "k_proj", "q_proj", "v_proj"], ("q_proj", "k_proj", "v_proj",
                                                               "up_proj")),
    ],
)  # fmt: skip
def test_targets_are_known_by_every_familys_names(
    names: list[str] | None, expected: tuple[str, ...]
) -> None:
    assert targets_of(names) == expected


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"rank": 8}, 1.0),
        ({"rank": 128, "alpha": 64.0}, 0.5),
        ({"rank": 16, "alpha": 8.0, "rslora": True}, 2.0),
        ({"rank": 5, "rslora": True}, math.sqrt(5)),
    ],
)
def test_scales(settings: dict[str, Any], scale: float) -> None:
    lora = LoraConfig(**settings)
    lora.validate()
    assert lora.scale == pytest.approx(scale, rel=1e-15)


ARGS = {
    "swiglu": True, "quick_geglu": False, "untie_embeddings_and_output_weights": True,
    "pipeline_model_parallel_size": 1, "fp8": None, "fp8_recipe": "delayed", "lora_rank": 4,
    "fp8_param_gather": False,
    "espo_reference_mix_interval": None, "load": None, "pretrained_checkpoint": None,
    "lora_base": None,
}  # fmt: skip


def arguments(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**(ARGS | changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora_rank": 0}, "--lora-rank 0 must be at least 1"),
        ({"lora_alpha": -1.0}, "--lora-alpha -1.0 must be a positive number"),
        ({"lora_rank": None, "lora_alpha": 2.0}, "--lora-alpha has no effect without --lora-rank"),
        ({"lora_rank": None, "lora_rslora": True}, "--lora-rslora has no effect without"),
        ({"lora_targets": ["wte"]}, "--lora-targets wte: no projection is called so; choose from"),
        ({"lora_targets": ["gate"], "swiglu": False}, "gate_proj: this model has no gate"),
        ({"lora_targets": ["head"], "untie_embeddings_and_output_weights": False},
         "this model's head is its embedding"),
        ({"lora_targets": ["lm_head"], "pipeline_model_parallel_size": 2},
         "only the last pipeline stage would have anything to train"),
        ({"fp8_param_gather": True}, "--fp8-param-gather keeps trained weights in FP8"),
        ({"fp8": "e4m3"}, "--fp8-recipe delayed carries scales of the base"),
    ],
)  # fmt: skip
def test_settings_without_sense_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")):
        startup.check_adapters(arguments(**changes))
    startup.check_adapters(arguments())


def test_a_mix_of_the_reference_is_refused() -> None:
    args = arguments(espo_reference_mix_interval=64)
    with pytest.raises(UserError, match="--espo-reference-mix-interval 64: with --lora-rank"):
        _settle_mixing(args)
    for rank, given, settled in ((4, None, 0), (4, 0, 0), (None, None, 64), (None, 3, 3)):
        args = arguments(lora_rank=rank, espo_reference_mix_interval=given)
        _settle_mixing(args)
        assert args.espo_reference_mix_interval == settled


def stored(**changes: Any) -> startup.Stored:
    flag = changes.pop("flag", "--load")
    return startup.Stored(flag, "runs/x", arguments(**changes))


@pytest.mark.parametrize(
    ("ours", "theirs", "sentence"),
    [
        ({}, {"lora_rank": None}, "--load runs/x holds a whole model; to train adapters on it"),
        ({"lora_rank": None}, {}, "--load runs/x holds LoRA adapters of rank 4; pass --lora-rank"),
        ({"lora_rank": None}, {"flag": "--pretrained-checkpoint"}, "merge them into their base"),
        ({"lora_rank": 8}, {}, "their rank is 4 there and 8 here"),
        ({"lora_alpha": 8.0}, {}, "alpha, --lora-rslora. is 1.0 there and 2.0 here"),
        ({"lora_targets": ["q_proj", "down"]}, {},
         "targets is q_proj k_proj v_proj o_proj gate_proj up_proj down_proj there and "
         "q_proj down_proj here"),
    ],
)  # fmt: skip
def test_checkpoints_of_something_else_are_refused(
    ours: dict[str, Any], theirs: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        startup.check_stored_adapters(arguments(**ours), stored(**theirs))


def test_the_same_adapters_in_other_words_are_taken_up() -> None:
    ours = arguments(lora_alpha=4.0, lora_targets=list(reversed(SEVEN)))
    startup.check_stored_adapters(ours, stored())
    startup.check_stored_adapters(ours, stored(flag="--pretrained-checkpoint", lora_rank=None))


@pytest.fixture(scope="module")
def built(tokenizer: str) -> Any:
    """A model without adapters, and the same weights with them."""
    flags = (
        "--preset tiny --num-layers 2 --group-query-attention --num-query-groups 2 --seq-length 16 "
        "--micro-batch-size 2 --train-iters 1 --lr 0 --mask-token-id 256 --seed 5"
    ).split()
    args = initialize_arguments([*flags, "--tokenizer-model", tokenizer], lambda args: None)
    args.lora_targets = ["all-linear", "lm_head"]
    new_groups()
    models = []
    for rank in (None, 3):
        args.lora_rank = rank
        model_parallel_cuda_manual_seed(7)
        torch.manual_seed(7)
        models.append(model_provider())
    models[1].load_state_dict(models[0].state_dict(), strict=False)
    return models


def logits(model: Any) -> Tensor:
    tokens = torch.arange(16).view(2, 8) * 7
    rows, positions = torch.arange(2).repeat_interleave(8), torch.arange(8).repeat(2)
    batch = RowBatch(tokens, torch.tensor([8, 5]), rows, positions)
    return run_model(model, batch, lambda logits, _: logits, False)


def test_adapters_begin_as_the_base_and_off_are_the_base_to_the_bit(built: Any) -> None:
    plain, adapted = built
    torch.manual_seed(2)
    assert torch.equal(logits(plain), logits(adapted))
    for adapter in adapters_of([adapted]):
        for name, parameter in adapter.named_parameters():
            assert parameter.any() == name.endswith("_a"), name
            if name.endswith("_b"):
                torch.nn.init.normal_(parameter)
    assert not torch.equal(logits(plain), logits(adapted))
    reference = reference_policy([adapted])
    assert isinstance(reference, AdapterBase)
    with torch.no_grad():
        with_update = logits(adapted)
        with reference.in_model():
            assert torch.equal(logits(plain), logits(adapted))
        assert torch.equal(logits(adapted), with_update)
    # The same with gradients as without: ESPO's ratio begins at 1.
    assert torch.equal(logits(adapted).detach(), with_update)


def test_only_adapters_are_trained_and_saved(built: Any) -> None:
    plain, adapted = built
    logits(adapted).square().sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in adapted.named_parameters() if ".adapter." in name}
    assert len(trained) == 2 * (2 * len(SEVEN) + 1)
    metadata = {"dp_cp_group": adapted.pg_collection.dp_cp}
    saved = adapted.sharded_state_dict(metadata=metadata)
    assert saved.keys() == trained
    assert attach.base_state(adapted).keys() == plain.sharded_state_dict(metadata=metadata).keys()
    # What a checkpoint of either part lacks is not missed, and nothing else is let go.
    values = {name: torch.ones_like(adapted.get_parameter(name)) for name in saved}
    assert not adapted.load_state_dict(values).unexpected_keys
    values.pop(next(iter(values)))
    with pytest.raises(RuntimeError, match="Missing key"):
        adapted.load_state_dict(values)


class OneOf:
    """A tensor-parallel group as one of its ranks sees it."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize("splits_rows", [True, False])
def test_initial_values_do_not_depend_on_the_layout(splits_rows: bool) -> None:
    name = "q_proj" if splits_rows else "o_proj"

    def drawn(size: int, number: int = 1) -> Tensor:
        parts = []
        for rank in range(size):
            group: Any = OneOf(rank, size)
            columns = 12 if splits_rows else 12 // size
            packing = Packing({name: 8 // size if splits_rows else 8}, 1, columns, splits_rows)
            adapter = Adapter(
                [name], packing, 3, 1.0, torch.float32, torch.device("cpu"), group, False
            )
            attach._initialize(adapter, 5, number, group)
            parts.append(adapter.get_parameter(f"{name}_a").detach())
        if splits_rows:
            assert all(torch.equal(part, parts[0]) for part in parts)
            return parts[0]
        return torch.cat(parts, dim=1)

    whole = drawn(1)
    assert all(torch.equal(drawn(size), whole) for size in (2, 4))
    assert not torch.equal(drawn(1, number=2), whole)
    # PEFT's: uniform within 1 / sqrt(inputs).
    assert 0.8 / math.sqrt(12) < whole.abs().max() < 1 / math.sqrt(12)


def test_a_frozen_head_gives_the_same_logits_and_gradient_and_has_none(one_rank: object) -> None:
    trained, frozen = (make_head(one_rank, torch.bfloat16) for _ in range(2))
    frozen.weight.requires_grad_(False)
    results = []
    for head in (trained, frozen):
        use_float_logits(head)
        states = hidden_states(torch.bfloat16)
        output = head(states)[0]
        assert output.shape == (R, 1, N)
        output.square().sum().backward()
        results.append((output.detach(), states.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert trained.weight.grad.shape == (N, H) and frozen.weight.grad is None


def test_a_frozen_weight_keeps_no_input() -> None:
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6)
    for train in (False, True):
        output: Any = matmul.linear(hidden, weight.clone().requires_grad_(train))
        kept = [tensor for tensor in output.grad_fn.saved_tensors if tensor is not None]
        assert len(kept) == 1 + train
        output.sum().backward()


def save(folder: Path, weights: dict[str, Tensor], state: float = 0.0) -> str:
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing import save as save_sharded

    megatron_patches.report_in_this_process()  # as a run does: no server process
    folder.mkdir()
    tensors = {**weights, "optimizer.exp_avg": torch.full((50,), state)}
    described = {
        key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in tensors.items()
    }
    save_sharded(described, str(folder))
    return str(folder)


def test_a_base_is_known_again_by_its_weights(one_rank: dist.ProcessGroup, tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"decoder.a": torch.randn(40, 30), "head": torch.randn(9)}
    first = fingerprint(save(tmp_path / "first", weights))
    assert len(first) == 32
    # Again, with another optimizer state, elsewhere.
    assert fingerprint(save(tmp_path / "again", weights, state=1.0)) == first
    trained = {key: tensor + 1e-3 for key, tensor in weights.items()}
    other = [trained, {**weights, "head": trained["head"]}, {"decoder.a": weights["decoder.a"]},
             {**weights, "head": weights["head"].double()}]  # fmt: skip
    marks = {fingerprint(save(tmp_path / str(i), w)) for i, w in enumerate(other)}
    assert len(marks) == len(other) and first not in marks
    with pytest.raises(UserError, match="cannot read this checkpoint"):
        fingerprint(str(tmp_path))


def test_the_base_is_found_and_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def whole(name: str) -> str:
        (tmp_path / name / "release").mkdir(parents=True)
        (tmp_path / name / "latest_checkpointed_iteration.txt").write_text("release")
        return str(tmp_path / name)

    base, moved, other = whole("base"), whole("moved"), whole("other")
    marks = {base: "b", moved: "b", other: "o"}
    monkeypatch.setattr(startup, "fingerprint", lambda folder: marks[str(Path(folder).parent)])

    def settled(found: Sequence[startup.Stored], **changes: Any) -> argparse.Namespace:
        args = arguments(pretrained_checkpoint="x", **changes)
        startup.settle_base(args, found)
        assert args.pretrained_checkpoint is None and not args.perform_initialization
        return args

    start = startup.Stored("--pretrained-checkpoint", base, arguments(lora_rank=None))
    args = settled([start])
    assert (args.lora_base, args.lora_base_mark, args.lora_start) == (base, "release", None)
    assert args.lora_base_fingerprint == "b"
    # A checkpoint of adapters names its base, which may have moved.
    resumed = startup.Stored("--load", "run", args)
    assert settled([resumed]).lora_base == base
    assert settled([resumed], lora_base=moved).lora_base == moved
    with pytest.raises(UserError, match=r"with other weights\); pass --lora-base with"):
        settled([resumed], lora_base=other)
    # One to start from.
    folder = whole("adapters")
    begun = settled([startup.Stored("--pretrained-checkpoint", folder, args)])
    assert begun.lora_base == base and begun.lora_start == f"{folder}/release"
    with pytest.raises(UserError, match="--lora-rank trains adapters of a base; pass"):
        settled([])
    with pytest.raises(UserError, match="--lora-base nowhere: no checkpoint is there"):
        settled([], lora_base="nowhere")


def test_without_adapters_comes_back_after_an_error(built: Any) -> None:
    with pytest.raises(KeyError), without_adapters([built[1]]):
        assert not any(adapter.active for adapter in adapters_of([built[1]]))
        raise KeyError
    assert all(adapter.active for adapter in adapters_of([built[1]]))
