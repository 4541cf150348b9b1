"""Adapters on a built model: which layers get one, and what then is trained and saved."""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_espo.adapters.adapter import Adapter, Packing
from megatron_espo.adapters.projections import HEAD, PROJECTIONS, in_layer, targets_of
from megatron_espo.config import LoraConfig
from megatron_espo.random import stream, uniform

# Between the name of a linear layer and those of its adapter's parameters.
_MARK = ".adapter."


def is_adapter(name: str) -> bool:
    """Say whether a parameter, or a tensor of a checkpoint, belongs to an adapter."""
    return _MARK in f".{name}"


def attach_adapters(model: Any, lora: LoraConfig, seed: int, *, initialize: bool = True) -> None:
    """Freeze a model and put adapters on its projections.

    Initial values are PEFT's: B is zero and A uniform within 1 / sqrt(inputs). They are drawn by
    layer and projection, so that they do not depend on the layout.

    Args:
        model: a GPTModel, one pipeline stage of it.
        lora: the adapters' settings; its rank is not None.
        seed: the run's seed.
        initialize: whether A gets values; a checkpoint may bring them.
    """
    assert lora.rank is not None
    config, group = model.config, model.pg_collection.tp
    targets = targets_of(lora.targets, gated=config.gated_linear_unit)
    model.requires_grad_(False)
    layers: list[tuple[int, str, Any]] = []
    for layer in model.decoder.layers:
        for name in ("linear_qkv", "linear_proj"):
            layers.append((layer.layer_number, name, getattr(layer.self_attention, name)))
        # Of a mixture of experts the one that every token passes, where it has one.
        part = getattr(layer.mlp, "shared_experts", None) if _is_mixture(layer) else layer.mlp
        for name in ("linear_fc1", "linear_fc2") if part is not None else ():
            layers.append((layer.layer_number, name, getattr(part, name)))
    if model.post_process:
        layers.append((0, "output_layer", model.output_layer))
    for number, name, linear in layers:
        if chosen := in_layer(name, targets):
            head = name == "output_layer"
            linear.adapter = Adapter(
                chosen,
                _packing(model, name, group.size(), linear),
                lora.rank,
                lora.scale,
                config.params_dtype,
                linear.weight.device,
                group,
                # The head gets the states of all positions (passes/pipeline.py).
                config.sequence_parallel and not head,
            )
            # Transformer Engine's layers that have the norm before them inside.
            with_norm = hasattr(linear, "return_layernorm_output")
            if with_norm:
                linear.return_layernorm_output = True
            kind: Any = type(linear)
            linear.__class__ = _adapted(kind, with_norm)
            if initialize and not linear.weight.is_meta:
                _initialize(linear.adapter, seed, number, group)
    # Nothing before the first adapter wants a gradient, and a layer that is computed again in the
    # backward pass, or a pipeline stage, takes that to mean that nothing in it does.
    if model.pre_process:
        model.embedding.register_forward_hook(_want_gradient)
    _keep_base_out_of_checkpoints(model)


def _is_mixture(layer: Any) -> bool:
    return hasattr(layer.mlp, "router")


def _packing(model: Any, layer: str, tp: int, linear: Any) -> Packing:
    config = model.config
    head_size, groups = config.kv_channels, config.num_query_groups
    # A shared expert's own config says how wide it is.
    queries, inner = config.num_attention_heads * head_size, linear.config.ffn_hidden_size
    hidden = config.hidden_size
    rows: dict[str, dict[str, int]] = {
        "linear_qkv": {
            "q_proj": queries // tp,
            "k_proj": groups * head_size // tp,
            "v_proj": groups * head_size // tp,
        },
        "linear_proj": {"o_proj": hidden},
        "linear_fc1": {"gate_proj": inner // tp, "up_proj": inner // tp},
        "linear_fc2": {"down_proj": hidden},
        "output_layer": {"lm_head": model.vocab_size // tp},
    }
    if not config.gated_linear_unit:
        del rows["linear_fc1"]["gate_proj"]
    columns = {"linear_proj": queries // tp, "linear_fc2": inner // tp}
    splits = next(p.splits for p in PROJECTIONS if p.layer == layer)
    return Packing(
        rows[layer],
        groups // tp if layer == "linear_qkv" else 1,
        columns.get(layer, hidden),
        splits == "rows",
    )


@torch.no_grad()
def _initialize(adapter: Adapter, seed: int, number: int, group: dist.ProcessGroup) -> None:
    """Draw this rank's part of each A."""
    split = not adapter.packing.splits_rows
    for name in adapter.targets:
        a = adapter.get_parameter(f"{name}_a")
        r, columns = a.shape
        whole = columns * (group.size() if split else 1)
        ids = torch.arange(r, device=a.device)
        draws = uniform(stream(seed, f"lora {name}", number), ids, whole)
        start = columns * group.rank() if split else 0
        a.copy_((2.0 * draws[:, start : start + columns] - 1.0) / math.sqrt(whole))


def _want_gradient(module: Any, arguments: Any, output: Tensor) -> None:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


class _Adapted:
    """What a linear layer with an adapter does besides; stands before its class."""

    def forward(self, hidden: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
        """Project, and add the adapter's update; see the layer's own class."""
        output, bias = super().forward(hidden, *args, **settings)  # type: ignore[misc]
        adapter: Adapter = self.adapter  # type: ignore[attr-defined]
        return adapter(hidden, output) if adapter.active else output, bias

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe the layer to a checkpoint, with the adapter's tensors as they are split."""
        state: dict[str, Any] = super().sharded_state_dict(  # type: ignore[misc]
            prefix, sharded_offsets, metadata
        )
        adapter: Adapter = self.adapter  # type: ignore[attr-defined]
        tensors = adapter.state_dict(keep_vars=True)
        described = make_sharded_tensors_for_checkpoint(
            tensors,
            f"{prefix}adapter.",
            {name: adapter.split_axis for name in tensors if adapter.is_split(name)},
            sharded_offsets,
            tp_group=adapter._group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        head = described.get(f"{prefix}adapter.{HEAD}_b")
        if head is not None:
            head.allow_shape_mismatch = True  # a layout may have padded the vocabulary
        return {**state, **described}


class _AdaptedWithNorm(_Adapted):
    """Of a layer that normalizes its input itself: the adapter gets what the norm makes of it."""

    def forward(self, hidden: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
        """Normalize, project, and add the adapter's update; see the layer's own class."""
        # Past the class above to the layer's own. Megatron hands on what Transformer Engine gives:
        # output, bias, norm; or the first and the last as one, with None for the bias.
        output, bias, *rest = super(_Adapted, self).forward(  # type: ignore[misc]
            hidden, *args, **settings
        )
        output, normed = (output, *rest) if rest else output
        adapter: Adapter = self.adapter  # type: ignore[attr-defined]
        return adapter(normed, output) if adapter.active else output, bias


@functools.cache
def _adapted(layer: type[Any], with_norm: bool) -> type[Any]:
    """Make the class of a linear layer with an adapter."""
    return type(
        f"Adapted{layer.__name__}", (_AdaptedWithNorm if with_norm else _Adapted, layer), {}
    )


def _keep_base_out_of_checkpoints(model: Any) -> None:
    """Let a model save and load its adapters alone, unless :func:`whole_state` asks for all."""
    describe = model.sharded_state_dict

    def sharded_state_dict(*args: Any, **settings: Any) -> dict[str, Any]:
        state = describe(*args, **settings)
        return {name: value for name, value in state.items() if is_adapter(name)}

    def forgive(module: Any, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if is_adapter(name)]

    model.sharded_state_dict, model.whole_sharded_state_dict = sharded_state_dict, describe
    model.register_load_state_dict_post_hook(forgive)


def whole_state(model: Any) -> dict[str, Any]:
    """Describe all weights of a model to a checkpoint, those under adapters and these.

    Args:
        model: the GPTModel, with adapters or without.

    Returns:
        Megatron's sharded state.
    """
    describe = getattr(model, "whole_sharded_state_dict", model.sharded_state_dict)
    state: dict[str, Any] = describe(metadata={"dp_cp_group": model.pg_collection.dp_cp})
    return state


def base_state(model: Any) -> dict[str, Any]:
    """Describe the frozen weights alone, as if the model had no adapters; see above."""
    return {name: part for name, part in whole_state(model).items() if not is_adapter(name)}


def adapters_of(chunks: Sequence[torch.nn.Module]) -> list[Adapter]:
    """List the adapters of a model's chunks; none of a model that is trained whole."""
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, Adapter)]


@contextlib.contextmanager
def without_adapters(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let a model compute what its base does, to the bit, inside the context.

    Args:
        chunks: this rank's model chunks.
    """
    adapters = adapters_of(chunks)
    for adapter in adapters:
        adapter.active = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.active = True
