"""What a mixture of experts does many times over, simulated once: the same books in less time.

* The tokens that a rank gets from the others are cut into chunks, one for each rank and expert, put
  into another order and joined. A chunk costs nothing; the whole is moved once.
* Without gradients, experts of a layer that get as many tokens do the same. Two are run; where both
  leave the same entries in the books, these are written again for each of the others.

What is written again are memory, in its order, and kernels. An expert that does anything else, such
as waiting, is run.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

from megatron_espo.simulate import private
from megatron_espo.simulate.ledger import Ledger

_HALF = (torch.bfloat16, torch.float16)
# The fact that counts experts that were not run.
REPEATED = "experts_repeated"
Entries = list[tuple[Any, ...]]
Switches = tuple[tuple[int, str, bool], ...]


@dataclass
class _Shape:
    """What experts of a layer left that got tokens of one shape.

    Attributes:
        entries: of the last one; memory by the order in which it was made.
        output: of them, the one that the result lies in.
        switches: of their parts, when the last one was done.
        agreed: whether the one before left the same.
    """

    entries: Entries | None = None
    output: int = 0
    switches: Switches = ()
    agreed: bool = False


def repeat_alike(ledger: Ledger) -> None:
    """Simulate once what is alike in a mixture of experts.

    Args:
        ledger: the rank's books.
    """
    _join_chunks()
    _repeat_experts(ledger)


def _join_chunks() -> None:
    """Let chunks that are put into another order be one chunk."""
    megatrons = moe_utils.sort_chunks_by_idxs

    @functools.wraps(megatrons)
    def sort_chunks_by_idxs(
        input: Tensor,
        split_sizes: Tensor,
        sorted_idxs: Tensor,
        probs: Tensor | None = None,
        fused: bool = False,
    ) -> Any:
        known = any(getattr(t, "known", None) is not None for t in (input, probs))
        indices = (split_sizes, sorted_idxs)
        if not (fused or known or any(map(private.is_fake, indices)) or len(split_sizes) == 0):
            split_sizes, sorted_idxs = split_sizes.sum().view(1), torch.tensor([0], device="cpu")
        return megatrons(input, split_sizes, sorted_idxs, probs, fused)

    for module in (moe_utils, token_dispatcher):
        setattr(module, "sort_chunks_by_idxs", sort_chunks_by_idxs)  # noqa: B010


def _repeat_experts(ledger: Ledger) -> None:
    """Run an expert only where it may do something new."""
    # Of the layer that is passed, by what its experts were given.
    passes: list[dict[Any, _Shape]] = []
    layer_forward, expert_forward = SequentialMLP.forward, MLP.forward

    @functools.wraps(layer_forward)
    def of_layer(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = not (torch.is_grad_enabled() or self.config.fp8 or self.config.fp4)
        if not plain or ledger.tape is not None or _has_hooks(self):
            return layer_forward(self, *args, **kwargs)
        passes.append({})
        try:
            return layer_forward(self, *args, **kwargs)
        finally:
            passes.pop()

    @functools.wraps(expert_forward)
    def of_expert(self: Any, tokens: Tensor, scale: Tensor | None = None, **kwargs: Any) -> Any:
        def run() -> Any:
            return expert_forward(self, tokens, scale, **kwargs)

        if not passes or kwargs or tokens.dtype not in _HALF:
            return run()
        scaled = None if scale is None else (scale.shape, scale.stride(), scale.dtype)
        key = (tokens.shape, tokens.stride(), tokens.dtype, scaled, _switches(self))
        shape = passes[-1].setdefault(key, _Shape())
        if shape.agreed and shape.entries is not None:
            ledger.rank.facts[REPEATED] = ledger.rank.facts.get(REPEATED, 0) + 1
            _set_switches(self, shape.switches)
            return _again(ledger, shape, tokens), None
        result = _noted(ledger, shape, tokens, run)
        shape.switches = _switches(self)
        return result

    SequentialMLP.forward = of_layer
    MLP.forward = of_expert


def _has_hooks(layer: torch.nn.Module) -> bool:
    """Whether a part of an expert does more than it says: gathering its weights first."""
    return any(m._forward_pre_hooks or m._forward_hooks for m in layer.modules())


def _switches(expert: torch.nn.Module) -> Switches:
    """What is on or off in the parts of an expert: Megatron notes there that a step has begun."""
    return tuple(
        (number, name, value)
        for number, part in enumerate(expert.modules())
        for name, value in vars(part).items()
        if isinstance(value, bool)
    )


def _set_switches(expert: torch.nn.Module, wanted: Switches) -> None:
    """Turn an expert's parts on and off as those of one that was run."""
    parts = list(expert.modules())
    for number, name, value in wanted:
        if vars(parts[number]).get(name) is not value:
            setattr(parts[number], name, value)


def _noted(ledger: Ledger, shape: _Shape, tokens: Tensor, run: Callable[[], Any]) -> Any:
    """Run an expert and compare what it leaves with the one before."""
    ledger.tape = []
    try:
        result = run()
    finally:
        tape, ledger.tape = ledger.tape, None
    output, bias = result
    found = None
    if bias is None and output.shape == tokens.shape and output.is_contiguous():
        found = _by_order(tape, output.untyped_storage()._cdata)
    if found is None:
        shape.entries, shape.agreed = None, False
        return result
    entries, place = found
    shape.agreed = shape.entries == entries and shape.output == place
    shape.entries, shape.output = entries, place
    return result


def _by_order(tape: Entries, output: int) -> tuple[Entries, int] | None:
    """Name memory by the order in which it was made, not by its address.

    Args:
        tape: what happened.
        output: address of the result.

    Returns:
        The entries and the number of the result's memory; None where an expert did something else,
        or left more than its result.
    """
    entries: Entries = []
    alive: dict[int, int] = {}
    made = 0
    for entry in tape:
        kind = entry[0]
        if kind == "make":
            alive[entry[1]] = made
            entries.append(("make", made, *entry[2:]))
            made += 1
        elif kind == "free":
            if entry[1] not in alive:
                return None
            entries.append(("free", alive.pop(entry[1])))
        elif kind == "kernel":
            entries.append(entry)
        else:
            return None
    if list(alive) != [output]:
        return None
    return entries, alive[output]


def _again(ledger: Ledger, shape: _Shape, tokens: Tensor) -> Tensor:
    """Write an expert's entries again.

    Args:
        ledger: the rank's books.
        shape: the entries.
        tokens: ``[t, h]``.

    Returns:
        Its result, ``[t, h]``.
    """
    assert shape.entries is not None
    result: Tensor | None = None
    alive: dict[int, int] = {}
    for kind, *rest in shape.entries:
        if kind == "kernel":
            name, flops, moved, fp8 = rest
            ledger.kernel(name, flops, moved, fp8=fp8)
        elif kind == "free":
            ledger.release(alive.pop(rest[0]))
        elif rest[0] == shape.output:
            with ledger.at(rest[2]):
                result = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
        else:
            alive[rest[0]] = ledger.make(*rest[1:])
    assert result is not None
    return result
