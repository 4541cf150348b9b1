"""An ESPO update of adapters beside one of all weights: time, interleaved, and peak memory.

python -m benchmarks.lora --rank 16 --rounds 5

Each side is a process of its own, with a model of the same shape, its optimizer and its reference
policy; they take turns. One CPU core each, float32, random weights.
"""

import argparse
import json
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.measure import spread
from benchmarks.models import SHAPES, Shape

MID = Shape(4096, 1024, 12, 4095)
"""167 million weights: mid-size for a CPU, small for LLaDA."""
COMPLETIONS, PROMPT, LENGTH = 4, 64, 128


def _serve(pipe: Connection, shape: Shape, rows: int, rank: int | None) -> None:
    """Build one side and make an update whenever asked; answers with seconds, then with bytes."""
    from megatron.core.enums import ModelType
    from megatron.training import training as megatron_training

    from megatron_espo.config import EspoConfig
    from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer
    from megatron_espo.diffusion.noise import elbo_views
    from megatron_espo.model.provider import model_provider
    from megatron_espo.passes.batch import pack_sequences, view_batches
    from megatron_espo.random import stream
    from megatron_espo.rl.reference import reference_policy
    from megatron_espo.rl.update import accumulate_gradient
    from megatron_espo.startup.arguments import initialize_arguments
    from megatron_espo.startup.setup import diffusion_model, initialize_process_groups
    from megatron_espo.training.own_loop import connect_schedule

    torch.set_num_threads(1)
    imports = _peak()
    with TemporaryDirectory() as folder:
        save_tokenizer(byte_tokenizer(), Path(folder, "tokenizer"))
        flags = (
            f"--tokenizer-model {folder}/tokenizer --seq-length 4096 --micro-batch-size 1 "
            "--train-iters 100 --lr 1e-4"
        ).split()
        args = initialize_arguments([*shape.flags(), *flags], lambda args: None)
        # No checkpoint is under these adapters: the base is as random as the other side.
        args.rerun_mode = "disabled"  # as in a run of ESPO
        args.lora_rank, args.lora_alpha = rank, None if rank is None else float(rank)
        initialize_process_groups(args)
        megatron_training.initialize_megatron()
        chunks, optimizer, _ = megatron_training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder, model_provider, checkpointing_context={}
        )
        connect_schedule(chunks, optimizer)
        model = diffusion_model(chunks)
    reference = reference_policy(chunks)
    espo = EspoConfig(prompts_per_rollout=2, group_size=2, num_mc=1)
    ids = torch.arange(COMPLETIONS)
    views = elbo_views("coupled", stream(1, "benchmark"), ids, ids, COMPLETIONS, LENGTH, 1)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(200, (COMPLETIONS, PROMPT + LENGTH), generator=generator)
    sequences = pack_sequences(
        tokens[:, :PROMPT].tolist(), tokens[:, PROMPT:], model.pad_token_id, model.shapes
    )
    batches = view_batches(sequences, views, model.mask_token_id, model.vocab_size, rows)
    advantages = torch.tensor([1.0, -1.0] * (COMPLETIONS // 2))
    pipe.send(sum(p.numel() for chunk in chunks for p in chunk.parameters() if p.requires_grad))
    while pipe.recv():
        started = time.perf_counter()
        for chunk in chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        accumulate_gradient(
            model, batches, views, None, None, advantages, LENGTH, espo, COMPLETIONS
        )
        assert optimizer.step()[0]
        pipe.send(time.perf_counter() - started)
    del reference
    pipe.send((_peak(), imports))


def _peak() -> int:
    """The most memory that this process had so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(shape: Shape, rank: int, rounds: int, rows: int) -> dict[str, dict[str, object]]:
    """Let both sides make updates in turn.

    Args:
        shape: the model.
        rank: of the adapters, on all projections but the head.
        rounds: updates of each side after one that is not counted.
        rows: views of a micro-batch.

    Returns:
        For each side trained weights, seconds of its updates, and its process's peak memory
        at the end and after its imports.
    """
    context = multiprocessing.get_context("spawn")
    sides, processes = {}, []
    for name, own in (("all weights", None), (f"LoRA, rank {rank}", rank)):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, shape, rows, own))
        process.start()
        processes.append(process)
        sides[name] = ours
    trained = {name: pipe.recv() for name, pipe in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, pipe in sides.items():
            pipe.send(True)
            seconds[name].append(pipe.recv())
    for pipe in sides.values():
        pipe.send(False)
    found = {
        name: {"trained": trained[name], "seconds": seconds[name][1:], "peaks": pipe.recv()}
        for name, pipe in sides.items()
    }
    for process in processes:
        process.join()
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rows", type=int, default=2, help="views of a micro-batch: a completion's"
    )
    parser.add_argument("--shape", choices=["mid", *SHAPES], default="mid")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    options = parser.parse_args()
    shape = MID if options.shape == "mid" else SHAPES[options.shape]
    found = measure(shape, options.rank, options.rounds, options.rows)
    if options.out is not None:
        options.out.write_text(json.dumps(found))
    print("| | trained weights | seconds of an update | peak memory | of it imports |")
    print("|---" * 5 + "|")
    for name, side in found.items():
        seconds: object = side["seconds"]
        peaks: object = side["peaks"]
        assert isinstance(seconds, list) and isinstance(peaks, tuple)
        end, imports = (f"{peak / 1e9:.2f} GB" for peak in peaks)
        print(f"| {name} | {side['trained']:,} | {spread(seconds)} | {end} | {imports} |")


if __name__ == "__main__":
    main()
