"""Layers under their published names, in plain PyTorch: what PEFT puts adapters on.

Written from the model's description, for tests alone; transformers has no such class.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        h, f, heads = config["d_model"], config["mlp_hidden_size"], config["n_heads"]
        self.heads, self.groups, self.size = heads, config["n_kv_heads"], h // heads
        self.theta, eps = config["rope_theta"], config["rms_norm_eps"]
        pair = self.groups * self.size
        self.attn_norm, self.ff_norm = nn.RMSNorm(h, eps), nn.RMSNorm(h, eps)
        self.q_proj, self.attn_out = nn.Linear(h, h, False), nn.Linear(h, h, False)
        self.k_proj, self.v_proj = nn.Linear(h, pair, False), nn.Linear(h, pair, False)
        self.ff_proj, self.up_proj = nn.Linear(h, f, False), nn.Linear(h, f, False)
        self.ff_out = nn.Linear(f, h, False)

    def forward(self, x: Tensor) -> Tensor:
        normed, (b, s, _) = self.attn_norm(x), x.shape
        q = self.rotate(self.q_proj(normed).view(b, s, self.heads, -1).transpose(1, 2))
        k = self.rotate(self.k_proj(normed).view(b, s, self.groups, -1).transpose(1, 2))
        v = self.v_proj(normed).view(b, s, self.groups, -1).transpose(1, 2)
        k, v = (part.repeat_interleave(self.heads // self.groups, dim=1) for part in (k, v))
        seen = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, -1)
        x = x + self.attn_out(seen)
        normed = self.ff_norm(x)
        return x + self.ff_out(functional.silu(self.ff_proj(normed)) * self.up_proj(normed))

    def rotate(self, x: Tensor) -> Tensor:
        powers = torch.arange(0, self.size, 2).float() / self.size
        angles = torch.arange(x.size(2)).float()[:, None] / self.theta**powers
        angles = torch.cat((angles, angles), dim=-1)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()


class LLaDALike(nn.Module):
    """``model.transformer.{wte, blocks, ln_f, ff_out}``, every position seeing every other."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        vocabulary, h = config["vocab_size"], config["d_model"]
        parts = {
            "wte": nn.Embedding(vocabulary, h),
            "blocks": nn.ModuleList(Block(config) for _ in range(config["n_layers"])),
            "ln_f": nn.RMSNorm(h, config["rms_norm_eps"]),
            "ff_out": nn.Linear(h, vocabulary, False),
        }
        self.model = nn.Module()
        self.model.transformer = nn.ModuleDict(parts)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.model.transformer
        x = parts["wte"](tokens)
        for block in parts["blocks"]:
            x = block(x)
        return parts["ff_out"](parts["ln_f"](x))


class LinearTree(nn.Module):
    """The weights of a model folder as modules under their names; nothing passes through it."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            *path, last, kind = name.split(".")
            parent: nn.Module = self
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            if kind != "weight" or weight.dim() != 2:
                held = nn.Module()
                held.register_parameter(kind, nn.Parameter(weight))
            elif "embed" in last:
                held = nn.Embedding.from_pretrained(weight)
            else:
                held = nn.Linear(weight.size(1), weight.size(0), bias=False)
                held.weight = nn.Parameter(weight)
            if last in dict(parent.named_children()):  # a router's weight and its biases
                parent.get_submodule(last).register_parameter(kind, nn.Parameter(weight))
            else:
                parent.add_module(last, held)
