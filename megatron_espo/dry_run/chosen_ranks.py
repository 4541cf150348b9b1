"""Which ranks of a job are simulated."""

import argparse

from megatron_espo.config import SimulateConfig
from megatron_espo.errors import UserError

# All ranks of a job of up to so many are compared.
_ALL = 16


def chosen_ranks(args: argparse.Namespace, config: SimulateConfig) -> list[int]:
    """Say which ranks are simulated.

    Args:
        args: the planned run.
        config: --simulate-*.

    Returns:
        Their numbers, ascending.

    Raises:
        UserError: one of them is not of the run.
    """
    world = args.world_size
    if config.ranks is not None:
        ranks = sorted({int(rank) for rank in config.ranks.split(",")})
        if ranks[-1] >= world:
            raise UserError(f"--simulate-ranks {config.ranks}: the run has ranks 0 to {world - 1}.")
        return ranks
    if not config.compare:
        return stage_ranks(args)
    if world <= _ALL:
        return list(range(world))
    inner = args.tensor_model_parallel_size * args.context_parallel_size
    copies = args.data_parallel_size
    wanted = {0, 1, copies - 1}
    stride = inner * args.pipeline_model_parallel_size if args.use_tp_pp_dp_mapping else inner
    return [rank for rank in range(world) if rank // stride % copies in wanted]


def stage_ranks(args: argparse.Namespace) -> list[int]:
    """The first ranks of the first, middle and last pipeline stage."""
    stages, between = args.pipeline_model_parallel_size, _between_stages(args)
    return sorted({between * stage for stage in (0, stages // 2, stages - 1)})


def _between_stages(args: argparse.Namespace) -> int:
    """Ranks from one pipeline stage to the next."""
    if args.use_tp_pp_dp_mapping:
        return int(args.tensor_model_parallel_size * args.context_parallel_size)
    return int(args.world_size // args.pipeline_model_parallel_size)


def stage_of(args: argparse.Namespace, rank: int) -> int:
    """The pipeline stage of a rank."""
    return int(rank // _between_stages(args) % args.pipeline_model_parallel_size)
