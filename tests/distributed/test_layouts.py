"""The same ELBOs, gradients, tokens and losses in every layout as on one rank."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar
from unittest import mock
from weakref import WeakSet

import pytest
import torch
import torch.distributed as dist
from conftest import WORLD, Built, build_layout
from layouts import CASES, Case, record
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import training as megatron_training
from torch import Tensor

from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.generation import cut, sampler
from megatron_espo.generation.sampler import generate
from megatron_espo.passes.batch import pack_sequences
from megatron_espo.passes.shapes import Shapes, few_widths, round_up
from megatron_espo.passes.state import KeyValueCache
from megatron_espo.plan.memory import Passes, cache_memory
from megatron_espo.random import stream, uniform
from megatron_espo.rl.elbo import cut_views, draw_views, elbo_of_views, estimate_elbo
from megatron_espo.rl.update import accumulate_gradient
from megatron_espo.supervised import forward_step as supervised
from megatron_espo.supervised.forward_step import forward_step

TOLERANCE = 1e-5
N, LENGTH = 8, 8


@dataclass(frozen=True)
class Expected:
    """What one rank computes."""

    elbo: Tensor
    tokens: dict[str, Tensor]
    espo: dict[str, Tensor]
    espo_norm: float
    few: dict[str, Tensor]
    few_norm: float
    losses: dict[bool, float]
    loss_gradients: dict[bool, dict[str, Tensor]]


@dataclass(frozen=True)
class Sampled:
    """Tokens of a rollout, and the bytes of the caches that it kept at the same time."""

    tokens: Tensor
    cache_bytes: int


@dataclass(frozen=True)
class Compared:
    """A layout, its name, and what one rank computes with the same model."""

    name: str
    case: Case
    built: Built
    expected: Expected
    _sampled: dict[str, Sampled] = field(default_factory=dict)

    def samplers(self) -> dict[str, RolloutConfig]:
        """Settings that this layout is compared with."""
        multiple = self.built.model.pad_multiple
        every = samplers(self.case.shift, self.case.few_samplers, multiple)
        if self.case.tp == 1:
            every = {n: c for n, c in every.items() if n not in OF_THE_VOCABULARY}
        # With context parallelism refused: a cache holds all positions of its rows.
        return {n: c for n, c in every.items() if self.case.cp == 1 or c.cache == "none"}

    def sampled(self, name: str) -> Sampled:
        """A rollout, sampled once for all tests of this layout."""
        if name not in self._sampled:
            CountedCache.most = 0
            with mock.patch.object(sampler, "KeyValueCache", CountedCache):
                tokens = tokens_of(self.built, SAMPLERS[name])
            self._sampled[name] = Sampled(tokens, CountedCache.most)
        return self._sampled[name]


@pytest.fixture(scope="session")
def references(
    tokenizer_folder: str, checkpoints: dict[bool, str], adapters: list[str]
) -> dict[str, Expected]:
    """What one rank computes: plain, with the logit shift, and with adapters."""
    flags = model_flags(checkpoints, adapters)
    return {kind: reference(tokenizer_folder, flags[kind], kind == "shift") for kind in flags}


def model_flags(checkpoints: dict[bool, str], adapters: list[str]) -> dict[str, list[str]]:
    """What each kind of model is started with."""
    return {
        "plain": ["--pretrained-checkpoint", checkpoints[False]],
        "shift": ["--pretrained-checkpoint", checkpoints[True], "--logit-shift"],
        "lora": adapters,
    }


def kind_of(case: Case) -> str:
    return "lora" if case.lora else "shift" if case.shift else "plain"


def reference(tokenizer_folder: str, flags: list[str], shift: bool) -> Expected:
    solo = build_layout(tokenizer_folder, 1, 1, tuple(flags), solo=True)
    losses, gradients = {}, {}
    for sft in (False, True):
        losses[sft] = pretrain_loss(solo, pretrain_batches(solo, 4, sft))
        gradients[sft] = gradients_of(solo)
    elbo = elbo_of(solo)
    tokens = shared_by_ranks(samplers(shift), lambda name: tokens_of(solo, SAMPLERS[name]))
    espo, norm, _ = espo_gradient(solo, "joint", 8)
    few, few_norm, _ = espo_gradient(solo, "two_pass", 8, mostly_without_gradient)
    return Expected(elbo, tokens, espo, norm, few, few_norm, losses, gradients)


def shared_by_ranks(names: Iterable[str], compute: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Let each rank compute its part of what all need: alone, they would all compute the same."""
    mine = {name: compute(name) for name in list(names)[dist.get_rank() :: WORLD]}
    parts: list[dict[str, Tensor]] = [{}] * WORLD
    dist.all_gather_object(parts, mine)
    return {name: tokens for part in parts for name, tokens in part.items()}


def dashes(name: str) -> str:
    return name.replace(" ", "-")


@pytest.fixture(scope="module", params=CASES, ids=dashes)
def compared(
    request: Any,
    references: dict[str, Expected],
    tokenizer_folder: str,
    checkpoints: dict[bool, str],
    adapters: list[str],
) -> Compared:
    case = CASES[request.param]
    own = model_flags(checkpoints, adapters)[kind_of(case)]
    flags = (*own, *case.flags, "--context-parallel-size", str(case.cp))
    built = build_layout(tokenizer_folder, case.tp, case.pp, flags)
    return Compared(request.param, case, built, references[kind_of(case)])


def prompts_and_completions() -> tuple[list[list[int]], Tensor]:
    """Prompts of different lengths, and completions."""
    numbers = (uniform(stream(3, "test-tokens"), torch.arange(N), 32) * 250).long()
    prompts = [numbers[i, : 5 + i].tolist() for i in range(N)]
    return prompts, numbers[:, 16 : 16 + LENGTH]


def own_rows(built: Built) -> slice:
    """This data-parallel rank's share of the N sequences."""
    share = N // built.model.layout.dp_size
    return slice(built.model.layout.dp_rank * share, (built.model.layout.dp_rank + 1) * share)


def assert_close(
    case: str, column: str, actual: Tensor | float, expected: Tensor | float, what: str = ""
) -> None:
    """Compare the largest difference with the largest entry; remembered for the table."""
    ours, theirs = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12)).item()
    record(case, column, error)
    assert error < TOLERANCE, f"{column} {what}: relative difference {error:.2e}"


def elbo_of(built: Built) -> Tensor:
    prompts, completions = prompts_and_completions()
    rows = own_rows(built)
    ids = torch.arange(N)[rows]
    for chunk in built.model.chunks:
        chunk.eval()
    return torch.cat(
        [
            # One sequence at a time on data-parallel ranks: strata cover the call's sequences.
            estimate_elbo(
                built.model,
                [prompts[i]],
                completions[i : i + 1],
                num_mc=2,
                seed=5,
                sample_ids=ids[k : k + 1],
                rows_per_batch=4,
            ).draws
            for k, i in enumerate(ids.tolist())
        ]
    )


def test_elbo_does_not_depend_on_layout(compared: Compared) -> None:
    built = compared.built
    wanted = compared.expected.elbo[own_rows(built)]
    assert_close(compared.name, "elbo", elbo_of(built), wanted)


def tokens_of(built: Built, config: RolloutConfig, widths: tuple[int, ...] = ()) -> Tensor:
    prompts, _ = prompts_and_completions()
    rows = own_rows(built)
    for chunk in built.model.chunks:
        chunk.eval()
    # One token in six ends a completion, for early stops.
    stops = tuple(range(0, 250, 6))
    model = replace(built.model, stop_token_ids=stops, eos_token_id=257, widths=widths)
    return generate(model, prompts[rows], torch.arange(N)[rows], config, 11, "test").completions


# Several micro-batches where rows leave, enter or are cached one by one; whole ones are enough for
# the other settings, and ranks talk as often as there are passes. Two steps of four tokens a block.
SAMPLERS = {
    "low_confidence": RolloutConfig(16, 8, 4, 1.0, "low_confidence", micro_batch_size=3),
    "greedy": RolloutConfig(16, 16, 4, 0.0, "low_confidence", micro_batch_size=8),
    "random": RolloutConfig(16, 8, 8, 0.7, "random", micro_batch_size=8),
    "guidance": RolloutConfig(16, 8, 4, 1.0, "low_confidence", 1.5, micro_batch_size=8),
    "origin": RolloutConfig(16, 8, 4, 1.0, "origin", micro_batch_size=8),
    "entropy": RolloutConfig(16, 8, 4, 0.9, "entropy", micro_batch_size=8),
    "topk_margin": RolloutConfig(16, 8, 4, 0.9, "topk_margin", micro_batch_size=8),
    "entropy, top-p": RolloutConfig(16, 8, 4, 0.9, "entropy", micro_batch_size=8, top_p=0.8),
    "topk_margin, top-k": RolloutConfig(16, 8, 4, 1.2, "topk_margin", top_k=9, micro_batch_size=8),
    "guidance, top-p": RolloutConfig(
        16, 8, 4, 1.0, "low_confidence", 1.5, top_p=0.7, micro_batch_size=8
    ),
    "prefix, top-p": RolloutConfig(
        16, 8, 4, cache="prefix", micro_batch_size=4, top_p=0.6, top_k=30
    ),
    "maskgit_plus": RolloutConfig(16, 8, 4, 0.9, "maskgit_plus", micro_batch_size=8),
    "threshold": RolloutConfig(16, 8, threshold=0.5, early_stop=True, micro_batch_size=3),
    "prefix": RolloutConfig(16, 8, 4, cache="prefix", early_stop=True, micro_batch_size=4),
    # So low that about every other window commits something and the rest leave it to a whole pass.
    "dual, factor": RolloutConfig(16, 4, factor=1.95, cache="dual", micro_batch_size=3),
    "dual, early stop": RolloutConfig(
        16, 8, 8, cache="dual", cache_refresh_steps=2, early_stop=True, micro_batch_size=3
    ),
}


# Where a layout samples as another one does (only what trains differs), these two say enough.
FEW_SAMPLERS = ("low_confidence", "greedy")
# And these ask the whole vocabulary: that it is in parts is tensor parallelism's alone.
OF_THE_VOCABULARY = (
    "origin",
    "entropy",
    "topk_margin",
    "entropy, top-p",
    "topk_margin, top-k",
    "guidance, top-p",
    "maskgit_plus",
)


def samplers(shift: bool, few: bool = False, multiple: int = 1) -> dict[str, RolloutConfig]:
    """Choose the samplers to compare.

    Guidance masks the prompt, which a model with shifted logits never saw, and its windows of 5 or
    9 positions cannot be split for sequence parallelism: both are refused.
    """

    def allowed(config: RolloutConfig) -> bool:
        try:
            config.validate(shift, multiple)
        except ValueError:
            return False
        return True

    return {
        name: config
        for name, config in SAMPLERS.items()
        if allowed(config) and (not few or name in FEW_SAMPLERS)
    }


@pytest.mark.parametrize(
    "compared", ["tp 2, pp 2", "cp 2, dp 2"], ids=dashes, indirect=True, scope="module"
)
def test_groups_of_the_same_ranks_are_one(compared: Compared) -> None:
    """And each is of the ranks that the layout's sizes say."""
    case, rank = compared.case, dist.get_rank()
    groups = {
        "tp": mpu.get_tensor_model_parallel_group(),
        "pp": mpu.get_pipeline_model_parallel_group(),
        "cp": mpu.get_context_parallel_group(),
        "dp": mpu.get_data_parallel_group(),
        "dp, cp": mpu.get_data_parallel_group(with_context_parallel=True),
        "tp, pp": mpu.get_model_parallel_group(),
        "experts": mpu.get_expert_model_parallel_group(),
    }
    ranks = {name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items()}
    sizes = {name: len(members) for name, members in ranks.items()}
    dp = WORLD // (case.tp * case.pp * case.cp)
    alone = {"tp": case.tp, "pp": case.pp, "cp": case.cp, "dp": dp}
    assert sizes == {**alone, "dp, cp": dp * case.cp, "tp, pp": case.tp * case.pp, "experts": 1}
    assert all(rank in members for members in ranks.values())
    assert len({id(group) for group in groups.values()}) == len(set(ranks.values()))


def test_tokens_do_not_depend_on_layout(compared: Compared) -> None:
    for name in compared.samplers():
        actual = compared.sampled(name).tokens
        same = actual == compared.expected.tokens[name][own_rows(compared.built)]
        record(compared.name, "tokens", same.double().mean().item())
        assert same.all(), name


# The other cases sample as one of these does, or attend without graphs.
OF_FEW_SHAPES = [name for name, case in CASES.items() if case.cp == 1 and not case.few_samplers]


@pytest.mark.parametrize("compared", OF_FEW_SHAPES, ids=dashes, indirect=True, scope="module")
@pytest.mark.parametrize("name", ["low_confidence", "threshold"])
def test_tokens_do_not_depend_on_few_shapes(compared: Compared, name: str) -> None:
    """As on GPUs: pipeline stages hand each other passes of several shapes in a step."""
    built, case = compared.built, compared.case
    config = replace(SAMPLERS[name], micro_batch_size=3)
    multiple, shapes, run = built.model.pad_multiple, [], sampler.forward_only

    def counted(chunks: Any, batches: Any, *args: Any, **named: Any) -> Any:
        shapes.append({tuple(batch.tokens.shape) for batch in batches})
        return run(chunks, batches, *args, **named)

    # Passes that cost next to nothing, so that even these short rows part.
    with mock.patch.object(sampler, "forward_only", counted), mock.patch.object(cut, "PASS", 1):
        actual = tokens_of(built, config, few_widths(17, 40, multiple))
    assert (actual == compared.expected.tokens[name][own_rows(built)]).all()
    assert case.pp == 1 or max(len(seen) for seen in shapes) > 1


class CountedCache(KeyValueCache):
    """Counts the bytes of all caches that are alive at the same time."""

    alive: ClassVar[WeakSet[Any]] = WeakSet()
    most: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.alive.add(self)

    def store(self, *arguments: Any) -> None:
        super().store(*arguments)
        held = [part.nbytes for c in self.alive for pair in c._layers.values() for part in pair]
        CountedCache.most = max(self.most, sum(held))


def test_planned_caches_are_those_that_the_sampler_keeps(compared: Compared) -> None:
    """Of this rank's heads, layers, and micro-batches in flight."""
    built = compared.built
    rows = own_rows(built)
    # The longest prompt of the rows has 4 + rows.stop tokens.
    positions = round_up(4 + rows.stop + 16, built.model.pad_multiple)
    for name, config in compared.samplers().items():
        if config.cache != "none":
            passes = Passes(1, positions, 0, 1, config, rows.stop - rows.start)
            assert compared.sampled(name).cache_bytes == cache_memory(built.args, passes) > 0


def test_samplers_and_models_differ(references: dict[str, Expected]) -> None:
    """Equal tokens show something only if the tokens depend on the settings."""
    seen = [str(t.tolist()) for expected in references.values() for t in expected.tokens.values()]
    assert len(set(seen)) == len(seen) == 3 * len(SAMPLERS) - 2


def gradients_of(built: Built) -> dict[str, Tensor]:
    """All gradients on this rank's stage, whole (gathered over tensor-parallel shards)."""
    group, result = built.model.layout.tp, {}
    if built.args.use_distributed_optimizer:
        gather_gradient_shards(built)
    for chunk in unwrap_model(list(built.model.chunks)):
        # Layers carry their place in the whole model; module names count within the stage.
        numbers = {
            f"decoder.layers.{i}.": f"decoder.layers.{layer.layer_number - 1}."
            for i, layer in enumerate(chunk.decoder.layers)
        }
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue  # a base under adapters
            prefix = next((p for p in numbers if name.startswith(p)), None)
            if prefix is not None:
                name = numbers[prefix] + name.removeprefix(prefix)
            shards = group
            if (match := re.search(r"local_experts\.(\d+)", name)) is not None:
                name = name.replace(match[0], f"experts.{own_experts(chunk)[int(match[1])]}")
                shards = chunk.pg_collection.expt_tp
            gradient = parameter.main_grad.detach().clone()
            if getattr(parameter, "tensor_model_parallel", False) and shards.size() > 1:
                parts = [torch.empty_like(gradient) for _ in range(shards.size())]
                dist.all_gather(parts, gradient, group=shards)
                if name.endswith("linear_fc1.weight"):
                    halves = [part.chunk(2) for part in parts]
                    parts = [h[0] for h in halves] + [h[1] for h in halves]
                gradient = torch.cat(parts, dim=parameter.partition_dim)
            result[name] = gradient
    return result


def own_experts(chunk: Any) -> range:
    """The numbers of the experts that lie on this rank, of every mixture."""
    group, count = chunk.pg_collection.ep, chunk.config.num_moe_experts
    share = count // group.size()
    return range(group.rank() * share, (group.rank() + 1) * share)


def gather_gradient_shards(built: Built) -> None:
    """Bring the shards of a reduce-scatter together: a rank's buffers hold its own sums only."""
    for chunk in built.model.chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)


@dataclass(frozen=True)
class Given:
    """What an update of this rank's sequences is given besides its masks: ``[n, m]`` and ``[n]``.

    The reference's ELBOs are None without a KL penalty.
    """

    elbo_old: Tensor
    elbo_ref: Tensor | None
    advantages: Tensor


def with_penalty(base: Tensor, rows: slice) -> Given:
    noise = uniform(stream(9, "elbos"), torch.arange(N), 5)[rows].float()
    old, ref = base + noise[:, :2] - 0.5, base + 4 * noise[:, 2:4]
    return Given(old, ref, (noise[:, 4] - 0.5) * 4)


def mostly_without_gradient(base: Tensor, rows: slice) -> Given:
    """Two sequences without an advantage, and two that are clipped, on one rank each of four."""
    advantages = torch.tensor([0.0, 0.0, 1.0, -1.0, 2.0, -0.5, 0.7, -1.2])[rows]
    ratios = torch.tensor([1.0, 0.3, 1.5, 0.5, 1.1, 0.9, 1.05, 1.4])[rows]
    return Given(base - LENGTH * ratios.log()[:, None], None, advantages)


def espo_gradient(
    built: Built,
    mode: str,
    rows_per_batch: int,
    give: Callable[[Tensor, slice], Given] = with_penalty,
    leave_out: bool = False,
) -> tuple[dict[str, Tensor], float, int]:
    """Gradients, their norm, and how many sequences of this rank had no backward pass."""
    prompts, completions = prompts_and_completions()
    rows = own_rows(built)
    config = EspoConfig(gradient=mode, num_mc=2, kl_coef=0.05, prompts_per_rollout=4, group_size=2)
    ids = torch.arange(N)[rows]
    sequences = pack_sequences(
        prompts[rows],
        completions[rows],
        built.model.pad_token_id,
        Shapes(built.model.pad_multiple * 2),
    )
    key = stream(5, "elbo")
    views = draw_views(built.model, sequences, "coupled", key, ids, ids, N, config.num_mc)
    recut = partial(cut_views, built.model, sequences, views, rows_per_batch)
    batches = recut()
    for chunk in built.model.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    built.optimizer.zero_grad()
    # The same for all settings of an update.
    if not built.elbos:
        built.elbos.append(elbo_of_views(built.model, batches, views))
    base = built.elbos[0]
    old, ref, advantages = (getattr(give(base, rows), field.name) for field in fields(Given))
    found = accumulate_gradient(
        built.model, batches, views, old, ref, advantages, LENGTH, config, N,
        recut if leave_out else None,
    )  # fmt: skip
    for draws in (found.draws, *([] if found.again is None else [found.again])):
        torch.testing.assert_close(draws, base, rtol=1e-5, atol=1e-4)
    gradients = gradients_of(built)
    # The norm alone: a step would change the weights that later tests compare with.
    built.optimizer.prepare_grads()
    norm = float(built.optimizer.get_grad_norm())
    built.optimizer.zero_grad()
    return gradients, norm, found.left_out


@pytest.mark.parametrize("mode", ["auto", "two_pass"])
def test_espo_gradient_does_not_depend_on_layout(compared: Compared, mode: str) -> None:
    views = max(compared.case.views, 4) if mode == "auto" else compared.case.views
    if compared.built.model.layout.pp_size == 1 and views == 4:
        views = 8  # ranks talk as often as there are micro-batches
    actual, norm, left_out = espo_gradient(compared.built, mode, views)
    assert compared.expected.espo_norm > 0.01 and left_out == 0
    assert_close(compared.name, "norm", norm, compared.expected.espo_norm)
    assert_gradients_close(compared, actual, compared.expected.espo)


@pytest.mark.parametrize("mode", ["auto", "two_pass"])
def test_sequences_without_gradient_are_left_out_in_every_layout(
    compared: Compared, mode: str
) -> None:
    """Of four data-parallel ranks two have nothing left; the schedule's numbers differ."""
    built, layout = compared.built, compared.built.model.layout
    views = max(compared.case.views, 4) if mode == "auto" else compared.case.views
    actual, norm, left_out = espo_gradient(built, mode, views, mostly_without_gradient, True)
    assert_close(compared.name, "norm", norm, compared.expected.few_norm)
    assert_gradients_close(compared, actual, compared.expected.few)
    n = N // layout.dp_size
    rounds = layout.pp_size if len(built.model.chunks) > 1 else 1
    # Before a pass only the advantages are known, and pipeline stages are not told of a ratio.
    known = [0, 1] if mode == "auto" else [0, 1, 2, 3]
    known = [i for i in known if i in range(N)[own_rows(built)]]
    least = n - max(round_up(n - len(known), rounds), rounds)
    if mode == "auto" and layout.pp_size == 1:
        # All but a rank's last micro-batch, which holds its shortest sequence.
        clipped = [i for i in (2, 3) if i in range(N)[own_rows(built)]]
        most = least + len(clipped)
        assert most - 1 <= left_out <= most
    else:
        assert left_out == least


def assert_gradients_close(
    compared: Compared, actual: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    assert actual and actual.keys() <= expected.keys()
    for name, gradient in actual.items():
        if name.endswith(("word_embeddings.weight", "output_layer.weight", "lm_head_b")):
            assert not gradient[262:].any(), "gradient on padded vocabulary"
        assert_close(compared.name, "gradient", gradient[:262], expected[name][:262], name)


def pretrain_rows(extra_sft: bool) -> dict[str, Tensor]:
    """Eight rows; of fine-tuning with 3 to 37 of 40 positions."""
    tokens = (uniform(stream(4, "rows"), torch.arange(N), 40) * 250).long()
    data = {"tokens": tokens, "sample_id": torch.arange(N)}
    if extra_sft:
        lengths = torch.tensor([20, 2, 35, 11, 7, 29, 16, 5])
        data |= {"prompt_length": torch.arange(N) % 5, "completion_length": lengths}
    return data


def pretrain_batches(built: Built, micro: int, extra_sft: bool) -> list[dict[str, Tensor]]:
    """This data-parallel rank's rows as they come."""
    data = {name: value[own_rows(built)] for name, value in pretrain_rows(extra_sft).items()}
    share = N // built.model.layout.dp_size
    return [
        {name: value[i : i + micro] for name, value in data.items()} for i in range(0, share, micro)
    ]


def batches_by_length(built: Built, micro: int) -> list[dict[str, Tensor]]:
    """Fine-tuning's rows the longest first, each rank taking its turn, as a training has them."""
    data, layout = pretrain_rows(True), built.model.layout
    order = (data["prompt_length"] + data["completion_length"]).argsort(descending=True)
    turns = order.split(micro)[layout.dp_rank :: layout.dp_size]
    return [{name: value[turn] for name, value in data.items()} for turn in turns]


def pretrain_loss(
    built: Built,
    batches: list[dict[str, Tensor]],
    step: Callable[..., Any] = forward_step,
) -> float:
    """The reported loss over eight rows, through Megatron's schedule."""
    micro = batches[0]["tokens"].size(0)
    chunks = list(built.model.chunks)
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    built.args.random_length_probability = 0.3
    iterators = [iter(batches) for _ in chunks]
    reports = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=40,
        micro_batch_size=micro,
        forward_only=False,
    )
    sums = torch.zeros(2, dtype=torch.float64)
    if built.model.layout.is_last_stage:
        sums = torch.stack([report["lm loss"].double() for report in reports]).sum(0)
    if built.model.layout.dp_size > 1:
        dist.all_reduce(sums, group=built.model.layout.dp)
    if built.model.layout.pp_size > 1:
        dist.all_reduce(sums, group=built.model.layout.pp)
    return float(sums[0] / sums[1])


@pytest.mark.parametrize("sft", [False, True], ids=["pretrain", "sft"])
def test_pretraining_does_not_depend_on_layout(compared: Compared, sft: bool) -> None:
    batches = pretrain_batches(compared.built, compared.case.micro, sft)
    actual = pretrain_loss(compared.built, batches)
    assert_close(compared.name, "loss", actual, compared.expected.losses[sft])
    gradients = gradients_of(compared.built)
    assert_gradients_close(compared, gradients, compared.expected.loss_gradients[sft])


def test_cut_rows_train_as_padded_ones(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows by length, micro-batches as wide as their longest; pipeline stages tell the shapes."""
    built, data = compared.built, pretrain_rows(True)
    batches = batches_by_length(built, compared.case.micro)
    monkeypatch.setattr(get_model_config(built.model.chunks[0]), "variable_seq_lengths", True)
    monkeypatch.setattr(built.args, "log_throughput", True)
    widths, noise = set(), supervised.noise_batch

    def noise_batch(*args: Any) -> Any:
        made = noise(*args)
        widths.add(made[0].tokens.size(1))
        return made

    monkeypatch.setattr(supervised, "noise_batch", noise_batch)
    shapes = Shapes(built.model.pad_multiple)
    actual = pretrain_loss(built, batches, partial(forward_step, shapes=shapes))
    assert_close(compared.name, "loss", actual, compared.expected.losses[True])
    gradients = gradients_of(built)
    assert_gradients_close(compared, gradients, compared.expected.loss_gradients[True])
    assert max(widths) <= 40 and (len(batches) == 1 or len(widths) > 1)
    # What Megatron counts operations by.
    lengths = (data["prompt_length"] + data["completion_length"]).double()
    counted = megatron_training.consume_seqlen_stats_in_iteration()
    assert counted == (lengths.sum().item(), lengths.square().sum().item())
