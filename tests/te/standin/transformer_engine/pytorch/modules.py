"""Layers with the real ones' parameters."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from transformer_engine.pytorch.quantization import check_shape, record, replace, rounded, state
from transformer_engine.signatures import bound


class _Base(torch.nn.Module):
    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, _: Any) -> None: ...


def _norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    size = (values.size(-1),)
    return torch.nn.functional.rms_norm(values.float(), size, weight.float(), eps).to(values.dtype)


class _Fused(torch.autograd.Function):
    """A weight whose gradient goes to Megatron's buffer; autograd gets memory of any content."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        weight = ctx.weight
        weight.main_grad.add_(gradient)
        weight.grad_added_to_main_grad = True
        return torch.full_like(weight, math.nan)


class RMSNorm(torch.nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = bound("RMSNorm.__init__", *args, **kwargs)
        dtype = given.get("params_dtype") or given.get("dtype")
        size, device = given["normalized_shape"], given["device"]
        self.eps = given["eps"]
        self.weight = Parameter(torch.ones(size, dtype=dtype, device=device))
        self.weight.sequence_parallel = given["sequence_parallel"]

    def forward(self, inp: Tensor) -> Tensor:
        return _norm(inp, self.weight, self.eps)


class Linear(_Base):
    """``y = x W^T + b``, split over the tensor-parallel ranks by rows or by columns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        name = "LayerNormLinear" if isinstance(self, LayerNormLinear) else "Linear"
        given = bound(f"{name}.__init__", *args, **kwargs)
        self.parallel_mode, self.tp_size = given["parallel_mode"], given["tp_size"]
        self.tp_group, self.sequence_parallel = given["tp_group"], given["sequence_parallel"]
        self.use_bias, self.return_bias = given["bias"], given["return_bias"]
        self.save_original_input = given.get("save_original_input", False)
        self.in_features, self.out_features = given["in_features"], given["out_features"]
        self.fuse_wgrad_accumulation = given["fuse_wgrad_accumulation"]
        if self.parallel_mode == "column":
            self.out_features //= self.tp_size
        elif self.parallel_mode == "row":
            self.in_features //= self.tp_size
        options = {"dtype": given["params_dtype"], "device": given["device"]}
        if isinstance(self, LayerNormLinear):
            assert given["normalization"] == "RMSNorm" and not given["zero_centered_gamma"]
            self.eps = given["eps"]
            self.layer_norm_weight = Parameter(torch.ones(self.in_features, **options))
            self.layer_norm_weight.sequence_parallel = given["sequence_parallel"]
        self.weight = Parameter(torch.empty(self.out_features, self.in_features, **options))
        self.weight.tensor_model_parallel = self.parallel_mode is not None
        self.weight.partition_dim = 1 if self.parallel_mode == "row" else 0
        if self.use_bias:
            self.bias = Parameter(torch.zeros(self.out_features, **options))
        given["init_method"](self.weight)
        # The FP8 copy of the weight that is kept for later micro-batches, by name.
        self._fp8_workspaces: dict[str, Tensor] = {}
        self._histories: tuple[list[float], list[float]] = ([], [])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = bound("Linear.forward", *args, **kwargs)
        return self._product(given["inp"], given.get("is_first_microbatch"))

    def _product(self, inp: Tensor, is_first_microbatch: bool | None) -> Any:
        record(self)
        weight = self.weight
        if self.fuse_wgrad_accumulation and torch.is_grad_enabled():
            weight = _Fused.apply(weight)
        if state.enabled:
            # Each rank quantizes its own share of the positions, and gathers after that.
            check_shape(inp, torch.is_grad_enabled())
            check_shape(weight, with_gradient=True)
        inp = self._gathered(inp)
        if state.enabled:
            kept = self._fp8_workspaces.get("weight") if is_first_microbatch is not None else None
            if kept is None or is_first_microbatch:
                kept = rounded(weight, (128, 128), self._histories[0])
            if is_first_microbatch is not None:
                self._fp8_workspaces["weight"] = kept
            # Of gathered parts under one scale: the real one finds the largest entry of all ranks.
            inp = replace(inp, rounded(inp, (1, 128), self._histories[1]))
            weight = replace(weight, kept)
        bias = self.bias if self.use_bias else None
        out = torch.nn.functional.linear(inp, weight, None if self.return_bias else bias)
        out = self._summed(out)
        return (out, bias) if self.return_bias else out

    def _gathered(self, inp: Tensor) -> Tensor:
        """The input of a column-parallel layer from all ranks; their gradients are summed."""
        # Megatron imports this package.
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode != "column" or self.tp_size == 1:
            return inp
        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(inp, group=self.tp_group)
        return mappings.copy_to_tensor_model_parallel_region(inp, group=self.tp_group)

    def _summed(self, out: Tensor) -> Tensor:
        """The output of a row-parallel layer, summed over the ranks."""
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode != "row" or self.tp_size == 1:
            return out
        if self.sequence_parallel:
            if state.enabled:  # its gradient is quantized in this rank's share
                share = out.size(0) // self.tp_size
                check_shape(out[:share], torch.is_grad_enabled())
            return mappings.reduce_scatter_to_sequence_parallel_region(out, group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(out, group=self.tp_group)


class LayerNormLinear(Linear):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.return_layernorm_output = kwargs.get("return_layernorm_output", False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = bound("LayerNormLinear.forward", *args, **kwargs)
        inp = _norm(given["inp"], self.layer_norm_weight, self.eps)
        product = self._product(inp, given.get("is_first_microbatch"))
        if not self.return_layernorm_output:
            return product
        return (*product, inp) if self.return_bias else (product, inp)


class DotProductAttention(_Base):
    """Attention over sbhd tensors, with full sequences or right padding."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = bound("DotProductAttention.__init__", *args, **kwargs)
        self.qkv_format = given.get("qkv_format") or "sbhd"
        self.attn_mask_type = given["attn_mask_type"]
        self.softmax_scale = given.get("softmax_scale")
        self.mask_types: list[str] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        record(self)
        given = bound("DotProductAttention.forward", *args, **kwargs)
        mask_type = given["attn_mask_type"]
        self.mask_types.append(mask_type)
        if mask_type not in ("padding", "no_mask"):
            raise ValueError(f"attn_mask_type {mask_type}: the model is bidirectional")
        query, key, value = (
            given[name].float().permute(1, 2, 0, 3)
            for name in ("query_layer", "key_layer", "value_layer")
        )
        key, value = (
            part.repeat_interleave(query.size(1) // part.size(1), dim=1) for part in (key, value)
        )
        scores = query @ key.mT * (self.softmax_scale or 1 / math.sqrt(query.size(-1)))
        if mask_type == "padding":
            scores = scores.masked_fill(given["attention_mask"], float("-inf"))
        out = (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)
        return out.to(given["query_layer"].dtype)


class GroupedLinear(_Base):
    """A base class that Megatron names; not used without experts."""
