"""Mixtures of experts in plain PyTorch, as an independent judge of a conversion.

transformers has neither LLaDA2.0 nor LLaDA-MoE. Written from the models' descriptions and config
files; names and fields are read here on their own, not through what the converter uses. Weights are
read when they are needed, an expert at a time.

Symbols: b rows, s positions, h hidden size, d head size, t tokens, e experts, k of a token.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

Read = Callable[[str], Tensor]


class Routing(NamedTuple):
    """The choice of one layer: int64 ``[t, k]`` experts and their weights ``[t, k]``."""

    experts: Tensor
    weights: Tensor


class MixtureOracle:
    """A model folder's logits, layer by layer, with full attention."""

    def __init__(self, fields: Mapping[str, Any], read: Read, dtype: torch.dtype) -> None:
        """Remember the model.

        Args:
            fields: the folder's config.json.
            read: reads a tensor by the name that it has in the folder.
            dtype: type to compute in.
        """
        self._fields, self._dtype = fields, dtype
        self._read: Read = lambda name: read(name).to(dtype)
        self._is_llada2 = fields["architectures"] == ["LLaDA2MoeModelLM"]
        self.routings: list[Routing] = []
        """What the routers chose in the last call, layer by layer."""

    @torch.no_grad()
    def logits(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Compute the logits that predict each position.

        Args:
            tokens: int64 ``[b, s]``, padded on the right.
            lengths: int64 ``[b]``.

        Returns:
            float32 ``[b, s, vocabulary]``.
        """
        self.routings = []
        hidden = torch.arange(tokens.size(1))[None, :] >= lengths[:, None]
        embedding = "model.word_embeddings" if self._is_llada2 else "model.embed_tokens"
        x = functional.embedding(tokens, self._read(f"{embedding}.weight"))
        for layer in range(self._fields["num_hidden_layers"]):
            path = f"model.layers.{layer}."
            x = x + self._attend(path, self._norm(f"{path}input_layernorm", x), hidden)
            normed = self._norm(f"{path}post_attention_layernorm", x)
            x = x + (self._mixture if self._is_mixture(layer) else self._gated)(
                f"{path}mlp.", normed
            )
        return (self._norm("model.norm", x) @ self._read("lm_head.weight").t()).float()

    def _is_mixture(self, layer: int) -> bool:
        if self._is_llada2:
            return bool(layer >= self._fields["first_k_dense_replace"])
        return bool(self._fields["moe_layer_freq"][layer])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self._fields["rms_norm_eps"]).rsqrt()
        return x * scale * self._read(f"{name}.weight")

    def _gated(self, path: str, x: Tensor) -> Tensor:
        gate, up, down = (self._read(f"{path}{part}_proj.weight") for part in _PARTS)
        return (functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()

    def _attend(self, path: str, x: Tensor, hidden: Tensor) -> Tensor:
        fields, (b, s, _) = self._fields, x.shape
        heads, groups = fields["num_attention_heads"], fields["num_key_value_heads"]
        size = fields.get("head_dim") or fields["hidden_size"] // heads
        if self._is_llada2:
            whole = self._read(f"{path}attention.query_key_value.weight")
            weights = whole.split([heads * size, groups * size, groups * size])
            norms = (f"{path}attention.query_layernorm", f"{path}attention.key_layernorm")
        else:
            weights = tuple(self._read(f"{path}self_attn.{p}_proj.weight") for p in "qkv")
            norms = (f"{path}self_attn.q_norm", f"{path}self_attn.k_norm")
        q, k, v = ((x @ w.t()).view(b, s, -1, size).transpose(1, 2) for w in weights)
        if self._is_llada2 or fields.get("qk_layernorm"):
            q, k = self._norm(norms[0], q), self._norm(norms[1], k)
        q, k = self._rotate(q), self._rotate(k)
        k, v = (part.repeat_interleave(heads // groups, dim=1) for part in (k, v))
        scores = (q @ k.transpose(2, 3)) / size**0.5
        scores = scores.masked_fill(hidden[:, None, None, :], -torch.inf).softmax(-1)
        output = "attention.dense" if self._is_llada2 else "self_attn.o_proj"
        seen = (scores @ v).transpose(1, 2).reshape(b, s, -1)
        return seen @ self._read(f"{path}{output}.weight").t()

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotate the first channels of each head ``[b, heads, s, d]``."""
        share = self._fields.get("partial_rotary_factor", 1.0)
        size = int(x.size(-1) * share)
        powers = torch.arange(0, size, 2, dtype=torch.float64) / size
        places = torch.arange(x.size(2), dtype=torch.float64)
        angles = (places[:, None] / float(self._fields["rope_theta"]) ** powers).repeat(1, 2)
        rotated, rest = x[..., :size], x[..., size:]
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        rotated = rotated * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)
        return torch.cat((rotated, rest), dim=-1)

    def _mixture(self, path: str, x: Tensor) -> Tensor:
        tokens, output = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        routing = self._route(path, tokens)
        self.routings.append(routing)
        for expert in routing.experts.unique().tolist():
            rows, places = (routing.experts == expert).nonzero(as_tuple=True)
            computed = self._gated(f"{path}experts.{expert}.", tokens[rows])
            output[rows] += computed * routing.weights[rows, places, None].to(x.dtype)
        output = output.view_as(x)
        if self._is_llada2 and self._fields.get("num_shared_experts"):
            output = output + self._gated(f"{path}shared_experts.", x)
        return output

    def _route(self, path: str, tokens: Tensor) -> Routing:
        fields = self._fields
        logits = tokens @ self._read(f"{path}gate.weight").t()
        count = fields["num_experts_per_tok"]
        if not self._is_llada2:
            weights, experts = logits.softmax(-1).topk(count, dim=-1)
            return Routing(experts, weights)
        scores = logits.sigmoid()
        ranked = scores + self._read(f"{path}gate.expert_bias")
        by_group = ranked.unflatten(-1, (fields["n_group"], -1))
        sums = by_group.topk(2, dim=-1).values.sum(-1)
        best = sums.topk(fields["topk_group"], dim=-1).indices
        looked_at = torch.zeros_like(sums, dtype=torch.bool).scatter(1, best, True)
        ranked = by_group.masked_fill(~looked_at[..., None], -torch.inf).flatten(1)
        experts = ranked.topk(count, dim=-1).indices
        weights = scores.gather(1, experts)
        weights = weights / weights.sum(-1, keepdim=True) * fields["routed_scaling_factor"]
        return Routing(experts, weights)


_PARTS = ("gate", "up", "down")
