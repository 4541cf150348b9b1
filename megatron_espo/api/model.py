"""One model in this process: its texts in, its texts and likelihoods out.

Several models may be loaded side by side. Each holds its own weights and settings; what Megatron
keeps for the whole process is only needed while one is built.
"""

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_espo.checkpoint.tracker import has_checkpoint
from megatron_espo.commands.inference import load_model, prepare_arguments
from megatron_espo.config import RolloutConfig
from megatron_espo.conversion.convert import convert_to_hugging_face
from megatron_espo.conversion.families import FAMILIES
from megatron_espo.conversion.hf_cache import converted_checkpoint
from megatron_espo.data.encoding import ChatPrompt, PromptEncoder, decode_completion, encode
from megatron_espo.data.tokenizer import FastTokenizer, load_tokenizer
from megatron_espo.diffusion.noise import ElboEstimator
from megatron_espo.errors import UserError
from megatron_espo.generation.sampler import generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.monitor.denoising import Recorder, pieces_of
from megatron_espo.monitor.frames import check_frames_path, save_frames
from megatron_espo.rl.elbo import estimate_elbo
from megatron_espo.startup.setup import start_anew

type Prompt = ChatPrompt | Sequence[int]
"""A text to go on from, chat messages ("role", "content"), or token ids."""

_BLOCK = 32


class Sample(NamedTuple):
    """A completion, and what it took.

    Attributes:
        text: the completion up to its end, special tokens left out.
        token_ids: all its tokens, those after the end included.
        num_evaluations: model evaluations it took part in.
        confidence: mean probability of its tokens when they were committed.
    """

    text: str
    token_ids: list[int]
    num_evaluations: int
    confidence: float


class Likelihood(NamedTuple):
    """Lower bounds of log p(completion | prompt), in nats, without gradients, on the host.

    Attributes:
        elbo: float32 ``[n]``, the mean over the draws.
        standard_error: float32 ``[n]``, of the mean; nan with one draw.
        draws: float32 ``[n, m]``.
        num_tokens: int64 ``[n]``, tokens of the completions.
    """

    elbo: Tensor
    standard_error: Tensor
    draws: Tensor
    num_tokens: Tensor

    @property
    def per_token(self) -> Tensor:
        """The bound per token: float32 ``[n]``."""
        return self.elbo / self.num_tokens


def load(
    source: str | os.PathLike[str],
    *,
    lora: str | os.PathLike[str] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    iteration: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    flags: Sequence[str] = (),
) -> "Model":
    """Load a model into this process; may be called again, for a second one beside the first.

    Args:
        source: Hugging Face folder, or name on the hub, of a LLaDA, Dream or iLLaDA model, which is
            converted once and kept; or the ``--save`` folder of a run, with adapters or without.
        lora: PEFT folder, or name on the hub, to merge into a Hugging Face model.
        dtype: type of the weights; None keeps that of the checkpoint.
        iteration: which checkpoint of a run; None takes the latest.
        cache: where converted models are kept; None takes ``~/.cache/megatron_espo``.
        flags: further flags, as ``tools/generate.py`` takes them.

    Returns:
        The model, on the GPU if there is one.

    Raises:
        UserError: one sentence on what is wrong with the folder or a flag.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "load() builds a model of one process; under torchrun use tools/generate.py and "
            "tools/evaluate.py."
        )
    path, is_run = os.fspath(source), has_checkpoint(os.fspath(source))
    if is_run and lora is not None:
        raise UserError(
            f"lora {os.fspath(lora)}: {path} is the folder of a run; load the adapters of a run by "
            "its own folder, or convert them with tools/convert_hf.py from-peft."
        )
    if not is_run and iteration is not None:
        raise UserError(f"iteration {iteration}: {path} is not the folder of a run; leave it out.")
    checkpoint = path
    if not is_run:
        adapter = None if lora is None else os.fspath(lora)
        checkpoint = converted_checkpoint(
            path, None if cache is None else os.fspath(cache), adapter
        )

    def prepare(args: argparse.Namespace) -> None:
        prepare_arguments(args)
        if dtype is not None:
            args.bf16, args.fp16 = dtype == "bfloat16", dtype == "float16"

    chosen = [] if iteration is None else ["--ckpt-step", str(iteration)]
    start_anew()
    try:
        handle, args = load_model(["--load", checkpoint, *chosen, *flags], prepare)
    finally:
        start_anew()
    return Model(handle, args, checkpoint, None if is_run else path)


@dataclass(frozen=True, eq=False)
class Model:
    """A masked-diffusion model and its tokenizer; made by :func:`load`.

    Attributes:
        handle: the model as the rest of the package takes it.
        args: the settings that it was built with.
        checkpoint: the Megatron checkpoint's folder.
        source: the Hugging Face folder or name that it came from, if any.
    """

    handle: DiffusionModel
    args: argparse.Namespace
    checkpoint: str
    source: str | None

    @property
    def tokenizer(self) -> FastTokenizer:
        """The Hugging Face tokenizer."""
        return load_tokenizer(self.args.tokenizer_model)

    @property
    def max_length(self) -> int:
        """Most tokens of a prompt and its completion."""
        return int(self.args.seq_length)

    def sample(
        self,
        prompts: Sequence[Prompt],
        *,
        num_samples: int = 1,
        seed: int = 0,
        on_step: Callable[[Tensor], None] | None = None,
        **sampling: Any,
    ) -> list[Sample]:
        """Sample completions.

        The same seed gives the same completions, whatever else is sampled beside them.

        Args:
            prompts: n prompts.
            num_samples: completions of each.
            seed: of the draws.
            on_step: called after every denoising step with the completions so far, int64
                ``[n * num_samples, l]`` with the mask token where nothing is committed yet.
            **sampling: settings of :class:`RolloutConfig` (``completion_length``, ``temperature``,
                ``threshold``, ``cache``, ...). Without one the completion has 256 tokens (or what
                is left of the model's length), blocks have up to 32, a step commits one token, and
                the likeliest is taken (temperature 0).

        Returns:
            The completions of the first prompt, then those of the second, and so on.

        Raises:
            UserError: a setting or a prompt does not fit.
            TypeError: there is no such setting.
        """
        encoded = [ids for ids in self._encode_all(prompts) for _ in range(num_samples)]
        longest = max((len(ids) for ids in encoded), default=0)
        config = self._sampling(sampling, self.max_length - longest)
        if longest + config.completion_length > self.max_length:
            raise UserError(
                f"a prompt of {longest} tokens and completion_length {config.completion_length} "
                f"are more than the {self.max_length} tokens of the model; shorten one of them."
            )
        numbers = torch.arange(len(encoded))
        found = generate(self.handle, encoded, numbers, config, seed, "generate", on_step)
        stops, tokenizer = self.handle.stop_token_ids, self.tokenizer
        return [
            Sample(decode_completion(tokenizer, ids, stops), ids, evaluations, confidence)
            for ids, evaluations, confidence in zip(
                found.completions.tolist(),
                found.num_evaluations.tolist(),
                found.mean_confidence.tolist(),
                strict=True,
            )
        ]

    def generate(self, prompts: Sequence[Prompt], **settings: Any) -> list[str]:
        """Sample completions and return their texts; see :meth:`sample`."""
        return [sample.text for sample in self.sample(prompts, **settings)]

    def chat(self, messages: str | Sequence[Mapping[str, str]], **settings: Any) -> str:
        """Answer a conversation in the tokenizer's chat format.

        Args:
            messages: the user's message, or all turns ("role", "content") so far.
            **settings: see :meth:`sample`.

        Returns:
            The assistant's next turn.

        Raises:
            UserError: the tokenizer has no chat format, or as of :meth:`sample`.
        """
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        (text,) = self.generate([turns], **settings)
        return text

    def animate(
        self,
        prompt: Prompt,
        path: str | os.PathLike[str],
        *,
        width: int | None = None,
        **settings: Any,
    ) -> str:
        """Draw a completion as it fills in.

        Args:
            prompt: what is completed.
            path: ``NAME.gif`` for an animation, ``NAME.png`` for a sheet of six moments, or a
                folder for a picture per step.
            width: characters of a line, such as 4 for a sudoku of 4 x 4; None takes what fits.
            **settings: see :meth:`sample`; one completion is drawn.

        Returns:
            The completion's text.

        Raises:
            UserError: the path cannot be written, or as of :meth:`sample`.
        """
        target = Path(path)
        check_frames_path(target)
        recorder: Recorder | None = None

        def watch(tokens: Tensor) -> None:
            nonlocal recorder
            if recorder is None:
                recorder = Recorder(1, tokens.size(1), self.handle.mask_token_id)
            recorder.on_step(tokens)

        (found,) = self.sample([prompt], on_step=watch, **settings)
        assert recorder is not None
        stops, tokenizer = self.handle.stop_token_ids, self.tokenizer
        story = [(f.step, pieces_of(f, tokenizer, stops)) for f in recorder.frames[0]]
        save_frames(target, prompt if isinstance(prompt, str) else "", story, width)
        return found.text

    @torch.no_grad()
    def elbo(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | Sequence[int]],
        *,
        num_mc: int = 8,
        estimator: ElboEstimator = "coupled",
        seed: int = 0,
        length: int | None = None,
        batch_size: int = 32,
    ) -> Likelihood:
        """Estimate log p(completion | prompt) from below (LLaDA, arXiv 2502.09992, eq. 6).

        A pair's estimate depends on the seed and on its place in the list, on nothing beside it.

        Args:
            prompts: n prompts.
            completions: n texts or lists of token ids, each at least one token.
            num_mc: Monte-Carlo draws m of the masks.
            estimator: how masks are drawn: "coupled" (two complementary masks a draw),
                "exact_count" or "bernoulli".
            seed: of the masks.
            length: fill completions with end-of-sequence tokens up to this many tokens, as the
                rollouts of training are; None scores the tokens that are given and nothing else.
            batch_size: rows of a model pass, at most.

        Returns:
            The bounds with their standard errors.

        Raises:
            UserError: prompts and completions do not fit together, or are too long.
        """
        if num_mc < 1 or batch_size < 1:
            raise UserError(f"num_mc {num_mc} and batch_size {batch_size} must be at least 1.")
        _check_list(completions, "completions")
        encoded = self._encode_all(prompts)
        if len(encoded) != len(completions):
            raise UserError(
                f"{len(encoded)} prompts and {len(completions)} completions; give one completion "
                "for each prompt."
            )
        targets = [self._completion_ids(text, i, length) for i, text in enumerate(completions)]
        for number, (prompt, target) in enumerate(zip(encoded, targets, strict=True)):
            if len(prompt) + len(target) > self.max_length:
                raise UserError(
                    f"prompt and completion {number} have {len(prompt) + len(target)} tokens and "
                    f"{self.max_length} fit; shorten them."
                )
        lengths = torch.tensor([len(target) for target in targets], dtype=torch.int64)
        draws = torch.empty(len(targets), num_mc)
        # A pass holds completions of one length.
        for size in lengths.unique().tolist():
            places = (lengths == size).nonzero().flatten()
            draws[places] = estimate_elbo(
                self.handle,
                [encoded[i] for i in places.tolist()],
                torch.tensor([targets[i] for i in places.tolist()]),
                estimator=estimator,
                num_mc=num_mc,
                seed=seed,
                sample_ids=places,
                rows_per_batch=batch_size,
            ).draws
        error = draws.std(dim=1) / math.sqrt(num_mc)
        return Likelihood(draws.mean(dim=1), error, draws, lengths)

    def export(
        self,
        folder: str | os.PathLike[str],
        *,
        like: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> None:
        """Write a folder that the model's published Hugging Face code loads.

        Args:
            folder: to make; must not exist.
            like: folder or hub name of the model whose config, tokenizer and code are copied, or
                the name of a family ("llada", "dream", "illada"). None takes what it was loaded
                from; of a run it must be given.
            dtype: convert the weights; None keeps them.

        Raises:
            UserError: one sentence on what is wrong; ``folder`` does not exist then.
        """
        like = like or self.source
        if like is None:
            raise UserError(
                f"{self.checkpoint} is the folder of a run; pass like, the model whose code is to "
                f"load the folder, or a family ({', '.join(FAMILIES)})."
            )
        family = like if like in FAMILIES else None
        step = self.args.ckpt_step
        convert_to_hugging_face(
            self.checkpoint,
            os.fspath(folder),
            template=None if family else like,
            family=family,
            iteration=step,
            dtype=dtype,
        )

    def _sampling(self, given: Mapping[str, Any], room: int) -> RolloutConfig:
        """Complete and check sampling settings; their names are those of the dataclass."""
        settings = {"temperature": 0.0, **given}
        blocks = self.handle.blocks
        size = None if blocks is None else blocks.size
        longest = max(min(256, room), 1)
        length = settings.setdefault("completion_length", longest - longest % (size or 1))
        if isinstance(length, int) and length > 0:
            # As few blocks of at most 32 tokens as divide it.
            block = max(k for k in range(1, _BLOCK + 1) if length % k == 0)
            settings.setdefault("block_length", size or block)
            settings.setdefault("denoising_steps", length)
        config = RolloutConfig(**settings)
        try:
            config.validate(self.handle.logit_shift, self.handle.pad_multiple, size)
        except UserError as error:
            raise UserError(
                re.sub(r"--rollout-([a-z-]+)", lambda m: m[1].replace("-", "_"), str(error))
            ) from error
        return config

    def _encode_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        _check_list(prompts, "prompts")
        args = self.args
        encoder = PromptEncoder(
            self.tokenizer, args.prompt_special_tokens, args.mask_token_id, args.stop_token_ids
        )
        encoded = []
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, str) and all(isinstance(part, int) for part in prompt):
                ids = self._checked_ids(prompt, f"prompt {number}")  # type: ignore[arg-type]
            else:
                try:
                    ids = encoder.encode(prompt)  # type: ignore[arg-type]
                except UserError as error:
                    raise UserError(f"prompt {number} {error}.") from error
            if not ids and self.handle.logit_shift:
                raise UserError(
                    f"prompt {number} is empty, and this model predicts each token from the "
                    "position before it; give at least one token."
                )
            encoded.append(ids)
        return encoded

    def _completion_ids(
        self, completion: str | Sequence[int], number: int, length: int | None
    ) -> list[int]:
        """Turn a completion into ids, filled up if asked for."""
        name = f"completion {number}"
        ids = (
            encode(self.tokenizer, completion)
            if isinstance(completion, str)
            else self._checked_ids(completion, name)
        )
        if self.handle.mask_token_id in ids:
            raise UserError(f"{name} holds the mask token; take it out.")
        if length is not None:
            if len(ids) > length:
                raise UserError(f"{name} has {len(ids)} tokens, more than length {length}.")
            ids += [self.handle.eos_token_id] * (length - len(ids))
        if not ids:
            raise UserError(f"{name} is empty; give at least one token.")
        return ids

    def _checked_ids(self, ids: Sequence[int], name: str) -> list[int]:
        """Check that token ids lie in the vocabulary."""
        size = self.handle.vocab_size
        if wrong := [i for i in ids if not 0 <= i < size]:
            raise UserError(f"{name}: token id {wrong[0]} lies outside the {size} of the model.")
        return list(ids)


def _check_list(values: object, name: str) -> None:
    if isinstance(values, str):
        raise UserError(f"{name} is one text; pass a list of them.")
