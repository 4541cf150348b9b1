"""Everything that is changed in Megatron-Core, each with its reason. Seen in version 0.19.2.

A name that a change needs is looked up by :func:`_part`, which says in a sentence when Megatron has
it no more. Nothing here is copied from Megatron: its functions are wrapped or left out.
"""

import functools
import importlib
import importlib.metadata
import logging
import queue
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch

from megatron_espo.errors import UserError

SEEN_IN = "0.19.2"


def _part(module: str, name: str) -> Any:
    """Find what is to be changed.

    Args:
        module: a module of Megatron-Core.
        name: of something in it, or of an attribute of a class in it, with a dot.

    Returns:
        What has the name.

    Raises:
        UserError: this Megatron-Core has it no more.
    """
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(
                f"megatron-core {importlib.metadata.version('megatron-core')} has no {module}."
                f"{name}, which megatron_espo changes; install megatron-core {SEEN_IN}."
            )
        found = getattr(found, part)
    return found


def _replace(module: str, name: str, replacement: Any) -> None:
    """Put something in the place of what a module of Megatron-Core has under a name."""
    _part(module, name)
    setattr(importlib.import_module(module), name, replacement)


def _nothing(*args: object, **kwargs: object) -> None:
    """Do nothing."""


class _WandbOfTheRun:
    """Weights & Biases for Megatron's timers, which ask whether a writer is this module."""

    def __eq__(self, writer: object) -> bool:
        return writer is not None and writer is sys.modules.get("wandb")

    __hash__ = object.__hash__


def import_without_wandb() -> None:
    """Import Megatron-Core, but not Weights & Biases, which is loaded with --wandb-project alone.

    Megatron's timers import it at every start, which takes half a second, to compare it with the
    writer that they are given.
    """
    if "wandb" in sys.modules:
        importlib.import_module("megatron.core.timers")
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core.timers")
    finally:
        del sys.modules["wandb"]
    _replace("megatron.core.timers", "wandb", _WandbOfTheRun())


def skip_compiled_helpers() -> None:
    """Skip the build of the data-set helpers where the compiled module imports.

    Megatron's start-up runs ``make`` on them, although the wheel ships them compiled and without a
    Makefile.
    """
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError:
        return
    _replace("megatron.core.datasets.utils", "compile_helpers", _nothing)


def report_in_this_process() -> None:
    """Let the writers of a checkpoint report through a queue of this process.

    Megatron starts a server process for it, which imports everything anew. Without --async-save the
    writers are threads of this process.
    """
    strategy = "megatron.core.dist_checkpointing.strategies.filesystem_async"
    _replace(strategy, "_results_queue", queue.Queue())


def expect_parts_of_checkpoints() -> None:
    """Say nothing of a checkpoint's folder that is not empty when Megatron begins to write into it.

    The state of an ESPO run is in it by then. What is left of a save that was broken off there is
    written over; the tracker file names a checkpoint only when it is whole.
    """
    module = "megatron.core.dist_checkpointing.serialization"
    _part(module, "logger").addFilter(_says_nothing_of_parts)


def _says_nothing_of_parts(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Overwriting old incomplete")


def around_each_save(context: Callable[[], AbstractContextManager[None]]) -> None:
    """Write each checkpoint of Megatron's training loop inside a context.

    Args:
        context: makes it.
    """
    save = _part("megatron.training.training", "save_checkpoint")

    @functools.wraps(save)
    def save_inside(*positional: Any, **named: Any) -> Any:
        with context():
            return save(*positional, **named)

    _replace("megatron.training.training", "save_checkpoint", save_inside)


def run_without_cuda() -> None:
    """Leave out what Megatron asks of CUDA alone, where there is none.

    The states of random generators are the CPU's, the start-up goes on without a device, and no
    fused kernels are compiled and timed.
    """
    rng = "megatron.core.tensor_parallel.random"

    def get_state(*args: object, **kwargs: object) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: object, **kwargs: object) -> None:
        torch.set_rng_state(state)

    _replace(rng, "_get_cuda_rng_state", get_state)
    _replace(rng, "_set_cuda_rng_state", set_state)
    seed = _part(rng, "model_parallel_cuda_manual_seed")
    training = "megatron.training.training"
    initialize = _part(training, "initialize_megatron")

    @functools.wraps(initialize)
    def initialize_without_cuda(*args: Any, **kwargs: Any) -> Any:
        kwargs["allow_no_cuda"] = True
        result = initialize(*args, **kwargs)
        # Megatron seeds the tensor-parallel tracker only where it counts CUDA devices.
        from megatron.training import get_args

        seed(get_args().seed)
        return result

    _replace(training, "initialize_megatron", initialize_without_cuda)
    _replace(training, "set_jit_fusion_options", _nothing)
    _count_on_the_host()
    _exchange_uneven_parts()
    _share_groups()


def _share_groups() -> None:
    """Let groups of the same ranks be one.

    Megatron makes some two dozen groups a start-up, of a process alone as well as of all. With gloo
    each has three threads, one of which wakes up a hundred times a second for as long as the group
    lives (findings/gloo_threads_of_groups.sh). What NCCL gains from groups of their own, streams
    that overlap, gloo does not have.
    """
    module = "megatron.core.parallel_state"
    create = _part(module, "create_group")
    # By ranks and time-out, of the default group that they belong to.
    made: dict[Any, Any] = {}

    @functools.wraps(create)
    def create_or_share(
        ranks: Any = None, timeout: Any = None, backend: Any = None, *rest: Any, **named: Any
    ) -> Any:
        if ranks is None or backend is not None:
            # Megatron ends groups of another backend one by one.
            return create(ranks, timeout, backend, *rest, **named)
        world = torch.distributed.group.WORLD
        if made.get("world") is not world:
            made.clear()
            made["world"] = world
        key = (*ranks, timeout)
        if key not in made:
            made[key] = create(ranks, timeout, backend, *rest, **named)
        return made[key]

    _replace(module, "create_group", create_or_share)


def _exchange_uneven_parts() -> None:
    """Exchange parts of different lengths, as NCCL does and gloo does not.

    Ranks that hold parts of the same experts gather each other's tokens, and get back the sums.
    """
    module = "megatron.core.tensor_parallel.mappings"
    gather = _part(module, "_gather_along_first_dim")
    scatter = _part(module, "_reduce_scatter_along_first_dim")

    @functools.wraps(gather)
    def gather_uneven(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *rest: Any, **named: Any
    ) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, *rest, **named)
        filled = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        filled[: len(input_)] = input_
        parts = [torch.empty_like(filled) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, filled, group=group)
        sizes = zip(parts, output_split_sizes, strict=True)
        return torch.cat([part[:size] for part, size in sizes])

    @functools.wraps(scatter)
    def scatter_uneven(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *rest: Any, **named: Any
    ) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, *rest, **named)
        total = input_.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].contiguous()

    _replace(module, "_gather_along_first_dim", gather_uneven)
    _replace(module, "_reduce_scatter_along_first_dim", scatter_uneven)


def _count_on_the_host() -> None:
    """Give the counts of tokens of each expert as they are given after a copy from a device.

    Megatron makes lists for its collectives from the copy alone; a tensor that was on the host all
    along stays one, which they refuse.
    """
    module = "megatron.core.transformer.moe.token_dispatcher"
    move = _part(module, "maybe_move_tensor_to_cpu")

    @functools.wraps(move)
    def move_and_convert(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = move(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    _replace(module, "maybe_move_tensor_to_cpu", move_and_convert)


def repair_distributed_optimizer() -> None:
    """Let the distributed optimizer be resumed with PyTorch's Adam.

    With Apex or Transformer Engine the count of steps belongs to parameter groups. Without them it
    is part of every parameter's state: Megatron reads it at loading, before there is a state,
    looks for it among the sharded tensors, where it is not, and gives all parameters one tensor,
    to which each of them then adds its own step.
    """
    module = "megatron.core.optimizer.distrib_optimizer"
    optimizer = _part(module, "DistributedOptimizer")
    if _part(module, "HAVE_APEX_OR_TE") or hasattr(optimizer, "_is_repaired"):
        return
    for name in ("state_dict", "load_state_dict", "_set_main_param_and_optimizer_states"):
        _part(module, f"DistributedOptimizer.{name}")
    optimizer._is_repaired = True
    state_dict, load_state_dict = optimizer.state_dict, optimizer.load_state_dict
    set_states = optimizer._set_main_param_and_optimizer_states

    @functools.wraps(state_dict)
    def state_dict_from_the_start(self: Any) -> Any:
        if not self.optimizer.state:
            # As PyTorch's optimizer begins at its first step.
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        **{key: torch.zeros_like(parameter) for key in self.optimizer_state_keys},
                    }
        return state_dict(self)

    @functools.wraps(load_state_dict)
    def load_state_dict_with_own_steps(self: Any, loaded: Any) -> None:
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @functools.wraps(set_states)
    def set_states_but_steps(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        set_states(self, parameter, {"step": None, **tensors})

    optimizer.state_dict = state_dict_from_the_start
    optimizer._set_main_param_and_optimizer_states = set_states_but_steps
    optimizer.load_state_dict = load_state_dict_with_own_steps


def repair_strict_loading() -> None:
    """Let checkpoints be loaded with other values of --dist-ckpt-strictness than the default.

    They compare the checkpoint's tensors with the model's. For that Megatron makes empty tensors
    from what PyTorch stored of each, handing all of it to ``torch.empty``: PyTorch 2.15 stores
    strides, too, which that function does not take.
    """
    from torch.distributed.checkpoint.metadata import TensorProperties

    if "strides" not in TensorProperties.__dataclass_fields__:
        return
    module = "megatron.core.dist_checkpointing.strategies.torch"
    load = _part(module, "TorchDistLoadShardedStrategy.load_tensors_metadata")
    reader = _part(module, "_get_filesystem_reader")
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def load_without_strides(self: Any, checkpoint_dir: Any, metadata: Any = None) -> Any:
        if metadata is None:
            metadata = reader(checkpoint_dir).read_metadata()
        for stored in metadata.state_dict_metadata.values():
            vars(getattr(stored, "properties", SimpleNamespace())).pop("strides", None)
        return load(self, checkpoint_dir, metadata)

    _part(module, "TorchDistLoadShardedStrategy").load_tensors_metadata = load_without_strides


# What tells parameter groups apart but is of the schedule, which a run may change.
_RATES = ("max_lr", "min_lr", "start_wd", "end_wd")


def repair_changed_rates() -> None:
    """Let an optimizer's state be loaded by a run with another learning rate.

    Megatron finds a group's saved counterpart by all that was set for the group, the rates of the
    schedule among it: with another --lr or --min-lr it finds none. And of what it loads a group
    keeps the rates, so that the schedule would go on with the saved ones.
    """
    plain, sharded = (
        "megatron.core.optimizer.optimizer",
        "megatron.core.optimizer.distrib_optimizer",
    )
    keys = _part(plain, "param_group_identifier_keys")
    pair = _part(plain, "MegatronOptimizer._filter_and_reorder_param_groups")
    load = _part(sharded, "DistributedOptimizer.load_state_dict")
    if hasattr(pair, "__wrapped__"):
        return
    names = [name for name in keys if name not in _RATES]

    def identifier(group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group.get(name, group.get(f"pre_{name}")) for name in names)

    def with_own_rates(ours: list[Any], saved: list[Any]) -> list[Any]:
        found = {identifier(group): group for group in ours}
        if len(found) < len(ours):
            return saved  # groups that nothing but their rates tells apart: Megatron's own way
        return [
            {k: v for k, v in group.items() if k not in _RATES}
            | {k: v for k, v in found.get(identifier(group), group).items() if k in _RATES}
            for group in saved
        ]

    @functools.wraps(pair)
    def pair_by_what_stays(current_groups: list[Any], state_dict_groups: list[Any]) -> Any:
        return pair(current_groups, with_own_rates(current_groups, state_dict_groups))

    @functools.wraps(load)
    def load_with_own_rates(self: Any, state_dict: dict[str, Any]) -> None:
        inner = state_dict.get("optimizer")
        if isinstance(inner, dict) and "param_groups" in inner:
            groups = with_own_rates(self.optimizer.param_groups, inner["param_groups"])
            state_dict = state_dict | {"optimizer": inner | {"param_groups": groups}}
        load(self, state_dict)

    _part(plain, "MegatronOptimizer")._filter_and_reorder_param_groups = staticmethod(
        pair_by_what_stays
    )
    _part(sharded, "DistributedOptimizer").load_state_dict = load_with_own_rates


def rescale_schedule(old: int, new: int) -> None:
    """Let the schedule go on at the same step after the number of samples in a step has changed.

    Args:
        old: samples of a step in the checkpoint to load.
        new: samples of a step from now on.
    """
    module = "megatron.training.training"
    build = _part(module, "get_optimizer_param_scheduler")
    if old == new:
        return

    @functools.wraps(build)
    def build_rescaled(optimizer: Any) -> Any:
        scheduler = build(optimizer)
        load = scheduler.load_state_dict

        def load_rescaled(state: dict[str, Any]) -> None:
            load({**state, "num_steps": state["num_steps"] * new // old})

        scheduler.load_state_dict = load_rescaled
        return scheduler

    _replace(module, "get_optimizer_param_scheduler", build_rescaled)
