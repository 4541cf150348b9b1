"""Generation from the command line: prompts, or a conversation in the terminal."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.text import Text

from megatron_espo.command_line import Parser, parse_own
from megatron_espo.commands.inference import (
    add_checkpoint_arguments,
    checkpoint_flags,
    load_model,
    prepare_arguments,
)
from megatron_espo.config import RolloutConfig
from megatron_espo.data.encoding import PromptEncoder, decode_completion
from megatron_espo.data.tokenizer import FastTokenizer, load_tokenizer
from megatron_espo.dry_run.planned import is_dry_run
from megatron_espo.dry_run.simulation import simulate_inference
from megatron_espo.errors import UserError
from megatron_espo.generation.sampler import generate
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.monitor.denoising import LiveView, Recorder, pieces_of
from megatron_espo.monitor.frames import check_frames_path, save_frames
from megatron_espo.startup.arguments import config_from_args

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C breaks an answer off."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of generation."""
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--prompt",
        nargs="+",
        help="prompts to complete; without it they are typed in, or read line by line from a pipe",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="prompts are a user's messages, written in the tokenizer's chat format",
    )
    parser.add_argument(
        "--plain", action="store_true", help="no drawing in place, even on a terminal"
    )
    parser.add_argument(
        "--delay", type=float, default=0.0, help="seconds to wait after each drawn step"
    )
    parser.add_argument(
        "--save-frames",
        type=Path,
        help="picture of the completion filling in: NAME.gif, NAME.png (a sheet) or a folder",
    )
    parser.add_argument(
        "--frames-width",
        type=int,
        help="characters of a line in these pictures, such as 4 for a sudoku of 4 x 4",
    )


def main(argv: Sequence[str]) -> None:
    """Complete prompts; flags that are not of :func:`add_arguments` are Megatron's.

    Args:
        argv: flags.
    """
    parser = Parser(add_help=False)
    add_arguments(parser)
    if "--help" in argv or "-h" in argv:
        parser.print_help()
        print("\nand the flags of training, the --rollout-* group among them:\n")
    options, rest = parse_own(parser, argv)
    if options.save_frames is not None:
        check_frames_path(options.save_frames)
        if options.prompt is None or len(options.prompt) != 1:
            raise UserError("--save-frames shows one completion; give one --prompt.")
    if options.frames_width is not None and (
        options.frames_width < 1 or options.save_frames is None
    ):
        raise UserError(
            f"--frames-width {options.frames_width}: a line of --save-frames has 1 or more "
            "characters; pass both or leave it out."
        )
    if not options.delay >= 0.0:
        raise UserError(f"--delay {options.delay} must be 0 or more seconds.")
    if is_dry_run(rest):
        simulate_inference("megatron_espo.commands.generate", argv, rest, prepare_arguments)
        return
    model, args = load_model([*checkpoint_flags(options), *rest])
    tokenizer = load_tokenizer(args.tokenizer_model)
    session = Session(
        model,
        tokenizer,
        PromptEncoder(
            tokenizer, args.prompt_special_tokens, args.mask_token_id, args.stop_token_ids
        ),
        config_from_args(RolloutConfig, args),
        args.seed,
        args.seq_length,
        Console(highlight=False, soft_wrap=True),
        options,
    )
    if options.prompt is not None:
        session.complete(options.prompt)
    else:
        session.converse()


def _from_first_rank[Value](value: Value) -> Value:
    """Give what rank 0 has to all ranks."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


@dataclass
class Session:
    """A model, a terminal and what was said so far.

    Attributes:
        model: answers; in evaluation mode.
        tokenizer: turns texts into its ids and back.
        encoder: makes ids of prompts.
        config: sampling settings.
        seed: of the run.
        seq_length: most tokens of prompt and completion.
        console: where rank 0 writes.
        options: flags of :func:`add_arguments`.
        messages: the turns of a chat.
        num_sampled: completions so far; each has draws of its own.
    """

    model: DiffusionModel
    tokenizer: FastTokenizer
    encoder: PromptEncoder
    config: RolloutConfig
    seed: int
    seq_length: int
    console: Console
    options: argparse.Namespace
    messages: list[dict[str, str]] = field(default_factory=list)
    num_sampled: int = 0

    @property
    def _shows(self) -> bool:
        return dist.get_rank() == 0

    @property
    def _live(self) -> bool:
        """Whether to draw in place: on a terminal that can move its cursor."""
        terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        return self._shows and terminal and not self.options.plain

    def complete(self, prompts: Sequence[str]) -> None:
        """Complete prompts side by side and print them.

        Args:
            prompts: texts.

        Raises:
            UserError: one does not fit, is empty where the model wants none that is, or spells a
                special token that it may not.
        """
        room = self.seq_length - self.config.completion_length
        encoded = []
        for number, prompt in enumerate(prompts, start=1):
            encoded.append(ids := self._encode(prompt, f"--prompt {number}"))
            if len(ids) > room:
                raise UserError(
                    f"--prompt {number} has {len(ids)} tokens and {room} fit; raise --seq-length "
                    "or lower --rollout-completion-length."
                )
        shown = [f"{prompt}\n" if self.options.chat else prompt for prompt in prompts]
        texts = self._sample(encoded, shown)
        if self._shows:
            for prompt, text in zip(shown, texts, strict=True):
                self.console.print(Text(prompt).append(text, style="bold"))

    def converse(self) -> None:
        """Answer what is typed in, or the lines of a pipe, until its end."""
        typed = _from_first_rank(sys.stdin.isatty())
        if self._shows and typed:
            what = "a message" if self.options.chat else "a text to go on from"
            self.console.print(Text(f"Type {what}. {_HELP}", style="dim"))
        while (line := self._read(typed)) is not None:
            if line.strip() in ("/exit", "/quit"):
                return
            if line.strip() == "/reset":
                self.messages.clear()
                continue
            if not line.strip():
                continue
            try:
                self._answer(line, typed)
            except KeyboardInterrupt:
                if dist.get_world_size() > 1:
                    raise  # the other ranks wait in the middle of a step
                self.console.print(Text("(broken off)", style="dim"))

    def _answer(self, line: str, typed: bool) -> None:
        if self.options.chat:
            self.messages.append({"role": "user", "content": line})
        try:
            prompt = self._fitting(line)
        except UserError as error:
            if not typed:
                raise  # of a pipe no line is left out
            self._refuse(str(error))
            return
        if prompt is None:
            return
        try:
            (text,) = self._sample([prompt], ["" if self.options.chat else line])
        except KeyboardInterrupt:
            if self.options.chat:
                self.messages.pop()
            raise
        if self.options.chat:
            self.messages.append({"role": "assistant", "content": text})
        if self._shows:
            start = "" if self.options.chat else line
            self.console.print(Text(start).append(text, style="bold"))

    def _fitting(self, line: str) -> list[int] | None:
        """Encode what is to be completed; a chat that is too long loses its oldest turns."""
        room = self.seq_length - self.config.completion_length
        while True:
            ids = self._encode(line, "this line")
            if len(ids) <= room:
                return ids
            if len(self.messages) < 3:
                self._refuse(f"{len(ids)} tokens are too long: {room} fit.")
                return None
            del self.messages[:2]
            if self._shows:
                self.console.print(Text("(the oldest turn no longer fits)", style="dim"))

    def _encode(self, text: str, name: str) -> list[int]:
        """Encode a prompt: a text to go on from, a message, or in a conversation its turns."""
        try:
            if self.options.chat:
                turns = self.messages or [{"role": "user", "content": text}]
                ids = self.encoder.encode(turns)
            else:
                ids = self.encoder.encode(text)
        except UserError as error:
            raise UserError(f"{name} {error}.") from error
        if not ids and self.model.logit_shift:
            raise UserError(
                f"{name} is empty, and a model with --logit-shift predicts each token from the "
                "position before it; give at least one token."
            )
        return ids

    def _refuse(self, why: str) -> None:
        """Say why a line is not answered, and forget it."""
        if self._shows:
            self.console.print(Text(why, style="red"))
        if self.options.chat:
            self.messages.pop()

    def _read(self, typed: bool) -> str | None:
        """Read a line on rank 0 and give it to all; None at the end."""
        line: str | None = None
        if self._shows:
            if typed:
                import readline  # noqa: F401  (arrow keys and history)
            with contextlib.suppress(EOFError, KeyboardInterrupt):
                line = input("> ") if typed else input()
        return _from_first_rank(line)

    def _sample(self, encoded: Sequence[Sequence[int]], shown: Sequence[str]) -> list[str]:
        """Sample a completion for each prompt, drawing it where there is a terminal."""
        model, config = self.model, self.config
        numbers = torch.arange(len(encoded)) + self.num_sampled
        self.num_sampled += len(encoded)
        recorder: Recorder | None = None
        with contextlib.ExitStack() as stack:
            on_step = None
            if self._live:
                view = stack.enter_context(
                    LiveView(
                        self.console,
                        shown,
                        config.completion_length,
                        config.denoising_steps,
                        model.mask_token_id,
                        self.tokenizer,
                        model.stop_token_ids,
                        self.options.delay,
                    )
                )
                recorder, on_step = view.recorder, view.on_step
            elif self.options.save_frames is not None and self._shows:
                recorder = Recorder(len(encoded), config.completion_length, model.mask_token_id)
                on_step = recorder.on_step
            result = generate(model, encoded, numbers, config, self.seed, "generate", on_step)
        if self.options.save_frames is not None and recorder is not None:
            story = [
                (frame.step, pieces_of(frame, self.tokenizer, model.stop_token_ids))
                for frame in recorder.frames[0]
            ]
            count = save_frames(
                self.options.save_frames, shown[0], story, self.options.frames_width
            )
            print(f"{self.options.save_frames}: {count} frames", file=sys.stderr)
        if self._shows and self.options.prompt is not None:
            print(
                f"{result.num_evaluations.double().mean():.1f} model evaluations per completion, "
                f"{result.tokens_per_step.mean():.2f} tokens per evaluation, "
                f"mean confidence {result.mean_confidence.mean():.3f}",
                file=sys.stderr,
            )
        return [
            decode_completion(self.tokenizer, ids, model.stop_token_ids)
            for ids in result.completions.tolist()
        ]
