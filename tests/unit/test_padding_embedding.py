"""The padding token's row of the embedding, against torch's own padding index."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron_state import new_groups

from megatron_espo.model.padding_embedding import _without_gradient
from megatron_espo.model.provider import model_provider
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.startup.setup import start_anew

PAD = 257
TOKENS = torch.tensor([[5, PAD, 256, PAD, 9], [PAD, 7, 7, 256, 1]])


def embedding_gradient(tokenizer: str, *flags: str) -> torch.Tensor:
    """Gradient of the embedding of a tiny model, of a sum over all logits."""
    start_anew()
    argv = (
        "--preset tiny --num-layers 1 --seq-length 16 --micro-batch-size 1 --train-iters 1 "
        f"--init-method-std 0.3 --tokenizer-model {tokenizer}"
    )
    initialize_arguments([*argv.split(), *flags], lambda args: None)
    new_groups()
    model_parallel_cuda_manual_seed(3)
    torch.manual_seed(3)
    model = model_provider().eval()
    positions = torch.arange(5).expand(2, 5)
    (model(TOKENS, positions, None) ** 2).mean().backward()
    gradient = model.embedding.word_embeddings.weight.grad.clone()
    mpu.destroy_model_parallel()
    start_anew()
    return gradient


def test_only_the_padding_tokens_row_is_left_as_it_is(one_rank: object, tokenizer: str) -> None:
    trained = embedding_gradient(tokenizer)
    frozen = embedding_gradient(tokenizer, "--padding-embedding", "freeze")
    assert trained[PAD].abs().max() > 0 and (frozen[PAD] == 0).all()
    others = torch.arange(len(trained)) != PAD
    assert torch.equal(trained[others], frozen[others]) and trained[256].abs().max() > 0


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scattered", [False, True])
def test_the_gradient_is_that_of_torchs_padding_index(ranks: int, scattered: bool) -> None:
    tokens = TOKENS[:, :4]
    weight = torch.randn(300, 3, requires_grad=True)
    slopes = torch.randn(2, 4, 3)
    theirs = torch.nn.functional.embedding(tokens, weight, padding_idx=PAD)
    (expected,) = torch.autograd.grad((theirs * slopes).sum(), weight)
    found = torch.zeros(300, 3)
    for rank in range(ranks if scattered else 1):
        group = SimpleNamespace(size=lambda: ranks, rank=lambda rank=rank: rank)
        module: Any = SimpleNamespace(reduce_scatter_embeddings=scattered, tp_group=group)
        output, slope = torch.nn.functional.embedding(tokens, weight), slopes
        if scattered:  # a rank's part of the positions
            output, slope = (x.transpose(0, 1).chunk(ranks)[rank] for x in (output, slope))
        kept = _without_gradient(module, (tokens,), output, token=PAD)
        assert torch.equal(kept, output)
        found += torch.autograd.grad((kept * slope).sum(), weight)[0]
    assert torch.allclose(found, expected) and (expected[PAD] == 0).all()
