"""torch_dist checkpoints block by block: any cut is read, and gaps are seen."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as strategies
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import Tensor

from megatron_espo import megatron_patches
from megatron_espo.conversion.blocks import check_weights
from megatron_espo.conversion.mapping import Block
from megatron_espo.conversion.torch_dist import CheckpointReader, write_checkpoint
from megatron_espo.errors import UserError
from megatron_espo.model.supported import OF_RUN
from megatron_espo.startup.stored import stored_arguments

ROWS = {0: torch.arange(8.0).view(4, 2), 4: torch.arange(8.0, 14.0).view(3, 2)}
WHOLE = torch.cat([ROWS[0], ROWS[4]])


def block(start: int, rows: int, total: int = 7) -> Block:
    return Block("table", (total, 2), (start, 0), False, {f"part{start}": (rows, 2)})


def write(folder: Path, blocks: list[Block], num_states: int = 2) -> CheckpointReader:
    def read(one: Block) -> Tensor:
        return ROWS[one.offset[0]]

    folder.mkdir()
    common = {"args": SimpleNamespace(num_layers=3), "iteration": 0}
    write_checkpoint(folder, blocks, torch.float32, read, {"state": num_states}, common)
    return CheckpointReader(folder)


@pytest.mark.parametrize(("start", "rows"), [(0, 7), (0, 4), (4, 3), (2, 4), (6, 1)])
def test_any_part_of_a_tensor_is_read_from_the_blocks_that_hold_it(
    tmp_path: Path, start: int, rows: int
) -> None:
    reader = write(tmp_path / "a", [block(0, 4), block(4, 3)])
    assert torch.equal(reader.read("table", (start, 0), (rows, 2)), WHOLE[start : start + rows])
    assert torch.equal(reader.read("table", (start, 1), (rows, 1)), WHOLE[start : start + rows, 1:])


def test_what_a_checkpoint_does_not_hold_is_named(tmp_path: Path) -> None:
    reader = write(tmp_path / "a", [block(0, 4), block(4, 3)])
    with pytest.raises(ValueError, match=r"a: parts of table are missing"):
        reader.read("table", (5, 0), (3, 2))
    with pytest.raises(ValueError, match=r"a: the tensor chair is missing"):
        reader.read("chair", (0,), (1,))
    assert reader.weights() == {"table": ((7, 2), torch.float32)}
    assert reader.dtype() == torch.float32


def test_arguments_come_back(tmp_path: Path) -> None:
    write(tmp_path / "a", [block(0, 4), block(4, 3)])
    assert stored_arguments(str(tmp_path / "a")).num_layers == 3


@pytest.mark.parametrize("strictness", OF_RUN["dist_ckpt_strictness"])
def test_a_checkpoint_is_loaded_as_strictly_as_asked(
    one_rank: dist.ProcessGroup, tmp_path: Path, strictness: str
) -> None:
    """All but the first compare what the checkpoint holds with what the model asks for."""
    write(tmp_path / "a", [block(0, 4), block(4, 3)], num_states=0)

    def load(*names: str) -> dict[str, Any]:
        wanted = {n: ShardedTensor.from_rank_offsets(n, torch.zeros(7, 2)) for n in names}
        strict = StrictHandling(strictness)
        loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(tmp_path / "a"), strict=strict)
        return loaded

    assert torch.equal(load("table")["table"], WHOLE)
    if strictness.startswith("raise"):
        with pytest.raises(dist_checkpointing.core.CheckpointingException, match="chair"):
            load("table", "chair")
    elif strictness != "assume_ok_unexpected":
        assert torch.equal(load("table", "chair")["table"], WHOLE)


def test_a_version_that_reads_tensors_elsewhere_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(strategies.TorchDistLoadShardedStrategy, "load_tensors_metadata")
    with pytest.raises(UserError, match=r"install megatron-core 0\.19"):
        megatron_patches.repair_strict_loading()


def stored(**tensors: tuple[tuple[int, ...], torch.dtype]) -> Any:
    keys = {name.replace("__", "."): value for name, value in tensors.items()}
    return SimpleNamespace(folder="ckpt", weights=lambda: keys)


F32 = torch.float32
WANTED = [
    Block("output_layer.weight", (10, 4), (0, 0), False, {"head": (10, 4)}),
    Block("decoder.norm", (4,), (0,), False, {"norm": (4,)}),
]


def test_a_padded_vocabulary_fits_and_nothing_else_does() -> None:
    check_weights(stored(output_layer__weight=((16, 4), F32), decoder__norm=((4,), F32)), WANTED)
    for rows, norm in (((9, 4), (4,)), ((16, 5), (4,)), ((10, 4), (5,))):
        reader = stored(output_layer__weight=(rows, F32), decoder__norm=(norm, F32))
        with pytest.raises(ValueError, match=r"ckpt: \S+ has the shape .* config\.json asks for"):
            check_weights(reader, WANTED)
    with pytest.raises(ValueError, match=r"ckpt: the tensor decoder\.norm is missing"):
        check_weights(stored(output_layer__weight=((10, 4), F32)), WANTED)
    extra = stored(output_layer__weight=((10, 4), F32), decoder__norm=((4,), F32), more=((1,), F32))
    with pytest.raises(ValueError, match=r"ckpt: the tensor more has no place"):
        check_weights(extra, WANTED)


def test_types_that_differ_need_a_decision() -> None:
    weights = {"norm": ((1,), F32), "head": ((1,), torch.bfloat16)}
    reader = cast(CheckpointReader, SimpleNamespace(folder="ckpt", weights=lambda: weights))
    with pytest.raises(ValueError, match=r"norm is float32 and head is bfloat16; pass --dtype"):
        CheckpointReader.dtype(reader)
