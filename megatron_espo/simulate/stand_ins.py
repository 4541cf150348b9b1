"""What a simulated job reads and does not have: problems, rows, rewards, checkpoints.

All of it is a function of the data-parallel rank and of a place, so that ranks that work on the
same samples get the same, and others get other prompts, lengths and ends.
"""

import hashlib
from typing import Any

import torch
from megatron.core.dist_checkpointing import serialization, state_dict_utils
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import fully_parallel
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from torch import Tensor
from torch.utils.data import Dataset

from megatron_espo.checkpoint.weights_mark import fingerprint as real_fingerprint
from megatron_espo.config import RolloutConfig
from megatron_espo.dry_run.job import SIMULATED_BASE
from megatron_espo.errors import UserError
from megatron_espo.random import randint, stream
from megatron_espo.simulate.ledger import Ledger, size_of
from megatron_espo.tasks.base import Example, Score

# Stand-in problems and rows of a data set.
_PROBLEMS = 512
_SEED = 20260727


def draw(purpose: str, owner: int, number: int, count: int, low: int, high: int) -> Tensor:
    """Draw whole numbers, the same ones for the same purpose, owner and number.

    Args:
        purpose: what they decide.
        owner: data-parallel rank.
        number: which draw.
        count: how many.
        low: smallest.
        high: largest.

    Returns:
        int64 ``[count]``.
    """
    key = stream(_SEED, f"simulate/{purpose}", owner, number)
    return randint(key, torch.zeros(1, dtype=torch.int64), count, low, high)[0]


def step_map(config: RolloutConfig, by_block: bool) -> Tensor:
    """Make up when tokens were committed: from left to right, by as many steps as there may be.

    Args:
        config: sampling settings.
        by_block: whether a block may begin inside the prompt: then all of them take the same steps.

    Returns:
        int64 ``[l]``, see `generation.sampler.Generation`.
    """
    places, steps = torch.arange(config.completion_length), config.steps_per_block
    if by_block:
        places = places % config.block_length
    return places * steps // config.block_length


class StandInTask:
    """A task with made-up problems and a reward that is a function of the completion."""

    name = "simulated"

    def read(self, path: str) -> list[Example]:
        """Make up problems; the file is not read."""
        return [Example(prompt=f"problem {i}", answer={"number": i}) for i in range(_PROBLEMS)]

    def score(self, example: Example, completion: str) -> Score:
        """Judge a completion by its hash: 0, a half or 1."""
        digest = hashlib.blake2b(completion.encode("utf-8", "replace"), digest_size=1).digest()
        reward = digest[0] % 3 / 2
        return Score(reward, reward == 1.0, {})

    def segments(self, example: Example, completion: str) -> list[tuple[int, int]]:
        """Say that there are no parts: what they would cost is not part of a simulation."""
        return []

    def score_segments(self, example: Example, completion: str, kept: object) -> list[float]:
        """Score no parts."""
        return []


class StandInRows(Dataset[dict[str, Tensor]]):
    """Rows for pre-training, or for fine-tuning with prompts and completions of mixed lengths."""

    def __init__(self, count: int, seq_length: int, with_prompts: bool, split: Any) -> None:
        """Make up rows.

        Args:
            count: rows.
            seq_length: tokens of a row.
            with_prompts: whether rows are prompts with completions.
            split: Megatron's name of the set.
        """
        self.split = split
        self._count, self._length, self._with_prompts = count, seq_length, with_prompts

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row in the form of the real data sets."""
        row = {
            "tokens": draw("row", 0, index, self._length, 0, 200),
            "sample_id": torch.tensor(int(index)),
        }
        if self._with_prompts:
            prompt = int(draw("prompt", 0, index, 1, 1, self._length // 2))
            row["prompt_length"] = torch.tensor(prompt)
            row["completion_length"] = torch.tensor(self._length - prompt)
        return row


def mark_of_base(folder: str) -> str:
    """Stand in for the fingerprint of a base that has no weights."""
    try:
        return real_fingerprint(folder)
    except UserError:
        return SIMULATED_BASE


def replace_checkpoint_files(ledger: Ledger) -> None:
    """Let Megatron's checkpoints begin and end at the state dict: no weights are read or written.

    Sharded tensors that would be read are allocated as Megatron's reader does; what would be
    written is counted.

    Args:
        ledger: gets the bytes, as fact ``saved_bytes``.
    """

    def load(self: Any, sharded: Any, folder: Any, *rest: Any) -> Any:
        return _loaded(sharded)

    def save(self: Any, sharded: Any, folder: Any, *rest: Any, **named: Any) -> None:
        written = sum(
            size_of(part.data)
            for part in _parts(sharded)
            if isinstance(part, ShardedTensor) and part.data is not None
        )
        ledger.rank.facts["saved_bytes"] = ledger.rank.facts.get("saved_bytes", 0) + written

    def one_rank(sharded: Any, **_: Any) -> Any:
        """Metadata of all ranks would need them all: each is checked by itself."""
        metadata = [part.without_data() for part in _parts(sharded)]
        torch.distributed.all_gather_object([None], None)
        return metadata, [metadata]

    torch_strategy.TorchDistLoadShardedStrategy.load = load
    torch_strategy.TorchDistSaveShardedStrategy.save = save
    serialization.determine_global_metadata = one_rank
    for module in (state_dict_utils, fully_parallel):
        module.validate_sharding_integrity = lambda *args, **kwargs: None
        module.determine_global_metadata = one_rank
    serialization.validate_integrity_and_strict_load = lambda sharded, *rest, **named: (
        sharded,
        set(),
        set(),
    )


def _loaded(sharded: Any) -> Any:
    if isinstance(sharded, dict):
        return {key: _loaded(value) for key, value in sharded.items()}
    if isinstance(sharded, list | tuple):
        return type(sharded)(_loaded(value) for value in sharded)
    if isinstance(sharded, ShardedTensor):
        if sharded.data is not None:
            return sharded.data
        device = torch.device("cuda", 0)
        return torch.empty(sharded.local_shape, dtype=sharded.dtype, device=device)
    if isinstance(sharded, ShardedObject):
        return sharded.data
    return sharded


def _parts(sharded: Any) -> list[Any]:
    if isinstance(sharded, dict):
        return [part for value in sharded.values() for part in _parts(value)]
    if isinstance(sharded, list | tuple):
        return [part for value in sharded for part in _parts(value)]
    return [sharded] if isinstance(sharded, ShardedTensor | ShardedObject) else []
