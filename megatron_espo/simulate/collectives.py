"""What a simulated rank does where the others would take part.

Collectives return at once: every rank is taken to hold what this one holds. Their order, group by
group, is what the ranks of a job must agree on: ``compare`` looks at it.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten

from megatron_espo.dry_run.record import Collective
from megatron_espo.simulate import private
from megatron_espo.simulate.ledger import Ledger, place_of_call, size_of

# c10d's operations by what they are. The size of a collective is that of its largest tensor.
KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "barrier": "barrier",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
    "gather_": "gather",
    "scatter_": "scatter",
    "reduce_": "reduce",
    "monitored_barrier_": "barrier",
}
# Those that return their outputs beside the handle.
_WITH_OUTPUTS = (
    *("allreduce_", "broadcast_", "allgather_", "_allgather_base_", "reduce_scatter_"),
    *("_reduce_scatter_base_", "alltoall_", "scatter_"),
)
_GPUS_PER_NODE = "gpus_per_node"


class Collectives:
    """Answers for the other ranks and keeps the record.

    Attributes:
        gloo: names of the groups on the host.
    """

    def __init__(self, ledger: Ledger) -> None:
        """Remember where to write.

        Args:
            ledger: the rank's books.
        """
        self._ledger = ledger
        self._labels: dict[str, str] = {}
        self._keys: dict[str, str] = {}
        self._made: dict[tuple[int, ...], int] = {}
        self.gloo: set[str] = set()

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Take the place of a c10d operation."""
        name = str(func.overloadpacket).split(".")[-1]
        if name not in KINDS:
            raise NotImplementedError(f"collective {name} is not simulated")
        flat = tree_flatten((args, kwargs))[0]
        group = private.group_of(flat)
        tensors = [t for t in flat if isinstance(t, Tensor)]
        kind = KINDS[name]
        size = 0 if kind == "barrier" else _size(args)
        dtype = "" if kind == "barrier" or not tensors else str(tensors[0].dtype)[6:]
        peer = f" {args[2]}" if kind in ("send", "recv") else ""
        self.note(group, kind + peer, size, dtype)
        if kind != "barrier" and not self._on_host(group):
            self._check(kind, tensors)
        self._answer(name, args, group)
        return _result(name, args)

    def note(self, group: Any, kind: str, size: int, dtype: str = "") -> None:
        """Write a collective down.

        Args:
            group: process group.
            kind: a value of KINDS, with the peer's rank for sends and receives.
            size: bytes.
            dtype: element type.
        """
        ledger = self._ledger
        ledger.tell()
        label, ranks = self.label(group), dist.get_process_group_ranks(group)
        entry = ledger.phase.collectives.setdefault(
            f"{kind.split()[0]}/{label}/{len(ranks)}", [0, 0]
        )
        entry[0] += 1
        entry[1] += size
        if not self._on_host(group):
            node = ledger.rank.facts[_GPUS_PER_NODE]
            seconds = ledger.ceilings.collective(
                kind.split()[0],
                len(ranks),
                size,
                one_node=len({rank // node for rank in ranks}) == 1,
            )
            spent = ledger.phase.communication
            spent[label] = spent.get(label, 0.0) + seconds
        ledger.rank.trace.append(Collective(self.key(group), kind, size, dtype, place_of_call(3)))

    def key(self, group: Any) -> str:
        """Name a group so that all its ranks name it alike: its ranks, and which of these it is."""
        name = group.group_name
        if name not in self._keys:
            ranks = tuple(dist.get_process_group_ranks(group))
            number = self._made.get(ranks, 0)
            self._made[ranks] = number + 1
            listed = ",".join(map(str, ranks))
            self._keys[name] = f"{'host ' if name in self.gloo else ''}{listed}#{number}"
        return self._keys[name]

    def label(self, group: Any) -> str:
        """Name a group for people: tp, pp, cp, dp, world or its number of ranks."""
        name = group.group_name
        if name in self.gloo:
            return "host"
        if name not in self._labels:
            label = _megatron_label(name)
            if label is None:
                return "world" if group.size() == dist.get_world_size() else "group"
            self._labels[name] = label
        return self._labels[name]

    def _on_host(self, group: Any) -> bool:
        return group.group_name in self.gloo

    def _check(self, kind: str, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if not private.is_fake_cuda(tensor):
                self._ledger.complain(f"a host tensor in NCCL's {kind}")
            elif not tensor.is_contiguous():
                self._ledger.complain(f"a tensor with gaps in NCCL's {kind}")

    def _answer(self, name: str, args: Any, group: Any) -> None:
        """Fill the results with what this rank holds; unknown where it must come from another."""
        if name == "allgather_":
            for outputs, own in zip(args[0], args[1], strict=True):
                for output in outputs:
                    output.copy_(own)
        elif name == "_allgather_base_":
            if getattr(args[1], "known", None) is not None or not private.is_fake(args[1]):
                size = group.size()
                args[0].view(size, -1).copy_(args[1].reshape(1, -1).expand(size, -1))
            elif private.is_fake(args[0]):
                args[0].known = None
        elif name == "_reduce_scatter_base_" and private.is_fake(args[0]):
            args[0].known = None
        elif KINDS[name] == "recv":
            for tensor in args[0]:
                if private.is_fake(tensor):
                    tensor.known = None


def _size(args: Any) -> int:
    totals = [
        sum(size_of(t) for t in tree_flatten(argument)[0] if isinstance(t, Tensor))
        for argument in args
        if isinstance(argument, Tensor | list | tuple)
    ]
    return max(totals, default=0)


def _result(name: str, args: Any) -> Any:
    work = private.finished_work()
    return (args[0], work) if name in _WITH_OUTPUTS else work


def _megatron_label(name: str) -> str | None:
    from megatron.core import parallel_state as mpu

    for label, group in (
        ("tp", mpu._TENSOR_MODEL_PARALLEL_GROUP),
        ("pp", mpu._PIPELINE_MODEL_PARALLEL_GROUP),
        ("cp", mpu._CONTEXT_PARALLEL_GROUP),
        ("dp", mpu._DATA_PARALLEL_GROUP),
        ("dp-cp", mpu._DATA_PARALLEL_GROUP_WITH_CP),
        ("model", mpu._MODEL_PARALLEL_GROUP),
        ("tp-cp", mpu._TENSOR_AND_CONTEXT_PARALLEL_GROUP),
        ("ends", mpu._EMBEDDING_GROUP),
    ):
        groups = group if isinstance(group, list) else [group]
        if any(g is not None and getattr(g, "group_name", None) == name for g in groups):
            return label
    return None
