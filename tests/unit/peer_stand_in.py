"""Checkouts that stand in for other people's code: a model and samplers of the shortest kind.

The samplers take a whole block at its first step, where caches make no difference, so that they do
what this project does with as many steps as blocks, or with a threshold that everything passes.
"""

import sys
from pathlib import Path

MODEL = """
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F


def rotated(x):
    half = x.size(-1) // 2
    angles = torch.arange(x.size(-2))[:, None] * 10000.0 ** (-torch.arange(half) / half)
    angles = torch.cat((angles, angles), -1)
    return x * angles.cos() + torch.cat((-x[..., half:], x[..., :half]), -1) * angles.sin()


class Block(nn.Module):
    def __init__(self, heads, d, ffn):
        super().__init__()
        self.heads = heads
        self.attn_norm, self.ff_norm = nn.RMSNorm(d, 1e-5), nn.RMSNorm(d, 1e-5)
        for name in ("q_proj", "k_proj", "v_proj", "attn_out"):
            setattr(self, name, nn.Linear(d, d, bias=False))
        self.ff_proj, self.up_proj = nn.Linear(d, ffn, bias=False), nn.Linear(d, ffn, bias=False)
        self.ff_out = nn.Linear(ffn, d, bias=False)

    def forward(self, x):
        y = self.attn_norm(x)
        q, k, v = (
            each(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v)
        x = x + self.attn_out(y.transpose(1, 2).flatten(2))
        y = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))


class LLaDAModelLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, n, ffn = config["d_model"], config["vocab_size"], config["mlp_hidden_size"]
        self.model, self.config = nn.Module(), SimpleNamespace()
        self.model.transformer = nn.Module()
        self.model.transformer.wte = nn.Embedding(n, d)
        self.model.transformer.blocks = nn.ModuleList(
            Block(config["n_heads"], d, ffn) for _ in range(config["n_layers"])
        )
        self.model.transformer.ln_f = nn.RMSNorm(d, 1e-5)
        self.model.transformer.ff_out = nn.Linear(d, n, bias=False)

    @classmethod
    def from_pretrained(cls, folder, torch_dtype):
        model = cls(json.loads(Path(folder, "config.json").read_text()))
        model.load_state_dict(load_file(Path(folder, "model.safetensors")))
        return model.to(torch_dtype)

    def forward(self, x):
        parts = self.model.transformer
        x = parts.wte(x)
        for block in parts.blocks:
            x = block(x)
        return SimpleNamespace(logits=parts.ff_out(parts.ln_f(x)))
"""

SAMPLER = """
import torch


@torch.no_grad()
def generate(model, prompt, gen_length, block_length, mask_id, **settings):
    print("whatever they print")
    x = torch.full((len(prompt), prompt.size(1) + gen_length), mask_id)
    x[:, : prompt.size(1)] = prompt
    for start in range(prompt.size(1), x.size(1), block_length):
        block = slice(start, start + block_length)
        x[:, block] = model(x).logits[:, block].argmax(-1) + ADDED
    return RETURNED


generate_with_prefix_cache = generate_with_dual_cache = generate
"""

TRAINER = """
import torch
from torch.nn import functional as F


def forward_process(batch, prompt_index, mask_id, seed=None):
    generator = torch.Generator().manual_seed(seed.item())
    mask = (torch.rand(batch.shape, generator=generator) < 0.5) & ~prompt_index
    return torch.where(mask, mask_id, batch), None


class ESPOTrainer:
    def _get_elbo_mc(self, model, tokens, length, seeds, num_mc):
        tokens, draws = tokens[0], []
        prompt = torch.arange(tokens.size(1)) < tokens.size(1) - length
        for seed in seeds[0]:
            mask = forward_process(tokens, prompt, -1, seed)[0] == -1
            draw = 0.0
            for side in (mask, ~mask & ~prompt):
                noisy = torch.where(side, self.processing_class.mask_token_id, tokens)
                losses = F.cross_entropy(model(noisy).logits.mT, tokens, reduction="none")
                draw = draw - (losses * side).sum(1) * (length + 1) / (2 * side.sum(1))
            draws.append(draw)
        return torch.stack(draws).mean(0)[:, None]

    def compute_loss(self, model, inputs):
        tokens = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), 1)
        length, seeds = inputs["completion_ids"].size(1), inputs["mask_seeds"][0, :1]
        elbo = self._get_elbo_mc(model, tokens[None], length, seeds, self.num_mc)[:, 0]
        ratio = ((elbo - inputs["old_per_token_logps"][:, 0]) / length).exp()
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        gains = torch.minimum(ratio * inputs["advantages"], clipped * inputs["advantages"])
        return -gains.mean() * SCALE
"""

# A Python that has transformers 4, as far as its version says.
VERSION = "import transformers\ntransformers.__version__ = '4.49.0'\n"


def write_stand_in(folder: Path, added: int = 0, scale: float = 1.0) -> list[str]:
    """Write checkouts and a Python.

    Args:
        folder: where to.
        added: what is wrong with the tokens of Fast-dLLM's stand-in.
        scale: factor on the loss of the stand-in for ESPO's trainer.

    Returns:
        The flags that name them.
    """
    fast = SAMPLER.replace("ADDED", str(added)).replace("RETURNED", "x, gen_length // block_length")
    plain = SAMPLER.replace("ADDED", "0").replace("RETURNED", "x")
    for file, text in {
        "Fast-dLLM/v1/llada/model/modeling_llada.py": MODEL,
        "Fast-dLLM/v1/llada/generate.py": fast,
        "LLaDA/generate.py": plain,
        "ESPO/espo/espo_trainer.py": TRAINER.replace("SCALE", str(scale)),
        "site/sitecustomize.py": VERSION,
        "python": f'#!/bin/sh\nPYTHONPATH={folder}/site exec {sys.executable} "$@"\n',
    }.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    (folder / "python").chmod(0o755)
    flags = {"peer-python": "python", "fast-dllm": "Fast-dLLM", "llada": "LLaDA", "espo": "ESPO"}
    return [word for flag, name in flags.items() for word in (f"--{flag}", str(folder / name))]
