"""The two sides of benchmarks.iteration: what training runs, and the same in plain PyTorch."""

import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import straightforward
from benchmarks.models import Shape, random_prompts
from megatron_espo.config import EspoConfig, RolloutConfig
from megatron_espo.conversion.verification import quiet
from megatron_espo.data.tokenizer import FastTokenizer, load_tokenizer, save_tokenizer
from megatron_espo.evaluation.problems import TaskData
from megatron_espo.monitor.dashboard import Dashboard
from megatron_espo.monitor.flops import ModelDimensions
from megatron_espo.objectives.advantages import leave_one_out
from megatron_espo.rl.prompts import prompts_of_rollout
from megatron_espo.rl.reference import reference_policy
from megatron_espo.rl.run import RunState, Trainer
from megatron_espo.rl.trainer import train
from megatron_espo.startup.arguments import config_from_args, initialize_arguments
from megatron_espo.startup.setup import diffusion_model
from megatron_espo.tasks.base import Example, Score
from megatron_espo.training.espo import prepare_arguments
from megatron_espo.training.own_loop import build_parts

PHASES = ("rollout", "reward", "old_elbo", "ref_elbo", "update")
LEARNING_RATE, ADAM_BETAS, KL_COEF, SEED = 1e-4, (0.9, 0.999), 1e-3, 1


@dataclass(frozen=True)
class Sizes:
    """Sizes of an iteration.

    Attributes:
        prompts: of a rollout.
        group: completions of each.
        prompt: tokens of a prompt.
        completion: tokens of a completion.
        block: tokens of a block.
        steps: denoising steps.
        updates: optimizer steps of a rollout.
        draws: coupled pairs of masks of an ELBO.
        rows: views of a micro-batch, and rows that are sampled at once.
    """

    prompts: int = 1
    group: int = 2
    prompt: int = 64
    completion: int = 64
    block: int = 32
    steps: int = 32
    updates: int = 8
    draws: int = 2
    rows: int = 4


SIZES = {
    "large-vocabulary": Sizes(),
    "small-vocabulary": Sizes(),
    "tiny": Sizes(prompts=4, group=8, prompt=16, completion=16, block=16, steps=16, rows=32),
    "smoke": Sizes(prompt=8, completion=8, block=8, steps=4, updates=2, rows=4),
}
"""Of each shape: the demo's for its size of model, so that two cores are done with the others."""


class Hashes:
    """A task whose rewards cost nothing and differ."""

    name = "hashes"

    def read(self, path: object) -> list[Example]:
        """There is no file: prompts are random."""
        raise NotImplementedError

    def score(self, example: Example, completion: str) -> Score:
        """Reward the text by a hash of it."""
        return Score((zlib.crc32(completion.encode()) % 1000) / 1000, correct=False, metrics={})


@dataclass(frozen=True)
class Noted(Dashboard):
    """A dashboard that keeps the last of each number, and shows nothing."""

    last: dict[str, float] = field(default_factory=dict)

    def report(self, scalars: Mapping[str, float], step: int) -> None:
        """Keep numbers."""
        self.last.update(scalars)


def _words(shape: Shape) -> FastTokenizer:
    """A tokenizer in which every id is a word, so that texts differ where tokens do."""
    ids = {str(i): i for i in range(shape.vocab_size)}
    words = Tokenizer(models.WordLevel(ids, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="257")


def build(shape: Shape, sizes: Sizes) -> Trainer:
    """Build everything that training builds, with random weights and prompts."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        tokenizer = Path(folder) / "tokenizer"
        save_tokenizer(_words(shape), tokenizer)
        (Path(folder) / "none.jsonl").touch()
        argv = (
            f"--tokenizer-model {tokenizer} --seq-length {sizes.prompt + sizes.completion} "
            f"--seed {SEED} --init-method-std 0.05 --lr {LEARNING_RATE} --lr-decay-style constant "
            f"--weight-decay 0 --adam-beta1 {ADAM_BETAS[0]} --adam-beta2 {ADAM_BETAS[1]} "
            f"--clip-grad 1 --micro-batch-size {sizes.rows} "
            f"--rollout-completion-length {sizes.completion} --rollout-block-length {sizes.block} "
            f"--rollout-denoising-steps {sizes.steps} --rollout-temperature 1 "
            f"--rollout-micro-batch-size {sizes.rows} "
            f"--espo-train-data {folder}/none.jsonl --espo-num-rollouts 1000 "
            f"--espo-prompts-per-rollout {sizes.prompts} --espo-group-size {sizes.group} "
            f"--espo-updates-per-rollout {sizes.updates} --espo-num-mc {sizes.draws} "
            f"--espo-kl-coef {KL_COEF} --espo-reference-mix-interval 0 --espo-reward-workers 0"
        )
        args = initialize_arguments([*shape.flags(), *argv.split()], prepare_arguments)
        parts = build_parts(args)
        words = load_tokenizer(tokenizer)
        prompts = random_prompts(sizes.prompts, sizes.prompt, shape)
        data = TaskData([Example("", {})] * len(prompts), [tuple(prompt) for prompt in prompts])
        model = diffusion_model(parts.chunks, data.encoded)
    return Trainer(
        model=model,
        optimizer=parts.optimizer,
        scheduler=parts.scheduler,
        seed=args.seed,
        rows_per_batch=args.espo_rows_per_batch,
        dashboard=Noted(dimensions=ModelDimensions.from_args(args)),
        check_gradient=True,
        inference=parts.inference,
        is_due=lambda step: False,
        save=lambda state: None,
        evaluated=lambda step, accuracy: None,
        should_stop=lambda step: False,
        reference=reference_policy(parts.chunks),
        tokenizer=words,
        task=Hashes(),
        train_data=data,
        eval_data=None,
        espo=config_from_args(EspoConfig, args),
        rollout=config_from_args(RolloutConfig, args),
        interrupted=lambda: False,
    )


def our_iteration(trainer: Trainer, number: int) -> dict[str, float]:
    """Run a rollout and its updates with this project; returns seconds by phase."""
    espo = replace(trainer.espo, num_rollouts=number + 1)
    train(replace(trainer, espo=espo), RunState(number * espo.updates_per_rollout))
    assert isinstance(trainer.dashboard, Noted)
    return {phase: trainer.dashboard.last[f"time/{phase}"] for phase in PHASES}


class Straightforward:
    """The same iteration in plain PyTorch."""

    def __init__(
        self, llama: LlamaForCausalLM, trainer: Trainer, shape: Shape, sizes: Sizes
    ) -> None:
        """Take a policy, and a copy of it for the reference."""
        self.llama, self.shape, self.sizes = llama, shape, sizes
        self.reference = LlamaForCausalLM(llama.config).eval()
        self.reference.load_state_dict(llama.state_dict())
        self.optimizer = torch.optim.AdamW(
            llama.parameters(), LEARNING_RATE, ADAM_BETAS, weight_decay=0.0
        )
        self.task, self.tokenizer = trainer.task, trainer.tokenizer
        data = trainer.train_data
        # In the order of the first rollout, from which both sides learn.
        prompts = prompts_of_rollout(0, sizes.prompts, data.examples, data.encoded, trainer.seed)
        rows = [prompt.token_ids for prompt in prompts for _ in range(sizes.group)]
        self.prompts = torch.tensor(rows)
        self.generator = torch.Generator().manual_seed(SEED)

    def rollout(self, temperature: float) -> Tensor:
        """Sample the completions of all prompts: ``[b, l]``."""
        sizes = self.sizes
        parts = [
            straightforward.generate(
                self.llama, prompts, self.shape.mask_token_id,
                completion_length=sizes.completion, block_length=sizes.block,
                denoising_steps=sizes.steps, temperature=temperature, generator=self.generator,
            )
            for prompts in torch.split(self.prompts, sizes.rows)
        ]  # fmt: skip
        return torch.cat(parts)

    def score(self, completions: Tensor) -> Tensor:
        """Compute the advantages of completions, ``[b]``."""
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        rewards = [self.task.score(Example("", {}), text).reward for text in texts]
        table = torch.tensor(rewards, dtype=torch.float64).view(-1, self.sizes.group)
        return leave_one_out(table).flatten().float()

    def learn(
        self, completions: Tensor, advantages: Tensor, masks: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Evaluate the frozen policies and make the updates; their ELBOs, ``[u, b, m]``."""
        return straightforward.updates(
            self.llama, self.reference, self.optimizer,
            torch.cat((self.prompts, completions), dim=1), self.sizes.prompt, masks,
            self.shape.mask_token_id, advantages, KL_COEF, self.sizes.rows,
        )  # fmt: skip

    def iteration(self, temperature: float) -> dict[str, float]:
        """Run a rollout and its updates; returns seconds by phase."""
        started, sizes = time.perf_counter(), self.sizes
        completions = self.rollout(temperature)
        sampled = time.perf_counter()
        advantages = self.score(completions)
        scored = time.perf_counter()
        masks = [
            straightforward.coupled_masks(
                len(completions), sizes.draws, sizes.completion, self.generator
            )
            for _ in range(sizes.updates)
        ]
        self.learn(completions, advantages, masks)
        learning = time.perf_counter() - scored
        return {"rollout": sampled - started, "reward": scored - sampled, "learning": learning}
