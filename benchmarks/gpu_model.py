"""The model that the GPU benchmark measures, in several precisions."""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import get_args
from megatron.training import training as megatron_training
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.checkpointing import load_checkpoint
from torch import Tensor

from megatron_espo import device
from megatron_espo.data.tokenizer import byte_tokenizer, save_tokenizer
from megatron_espo.environment import transformer_engine
from megatron_espo.model import fp8
from megatron_espo.model.handle import DiffusionModel
from megatron_espo.model.provider import model_provider
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.startup.setup import diffusion_model, initialize_process_groups


def usable_recipes(asked: Sequence[str], rest: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Ask Transformer Engine which recipes run here; and why the others do not."""
    if not transformer_engine().usable or not (device.has_cuda() or "transformer_engine" in rest):
        return [], dict.fromkeys(asked, "Transformer Engine needs a GPU and is not in use")
    if "local" in rest:
        return [], dict.fromkeys(asked, "FP8 needs Transformer Engine's layers")
    usable, reasons = [], {}
    for recipe in asked:
        try:
            fp8.check_device(recipe)
            usable.append(recipe)
        except ValueError as error:
            reasons[recipe] = str(error)
    return usable, reasons


def build(
    options: argparse.Namespace, recipes: list[str], rest: list[str]
) -> tuple[DiffusionModel, int]:
    """Build the model with gradient buffers and without an optimizer."""
    tokenizer = tempfile.mkdtemp()
    save_tokenizer(byte_tokenizer(), tokenizer)
    all_layers = 0

    def prepare(args: argparse.Namespace) -> None:
        nonlocal all_layers
        all_layers = args.num_layers
        args.num_layers = options.layers
        args.seq_length = options.prompt + options.completion
        args.micro_batch_size, args.train_iters, args.lr = 1, 1, 0.0
        args.rerun_mode = "disabled"
        args.no_load_optim = args.no_load_rng = True
        if args.max_position_embeddings is None:
            args.max_position_embeddings = args.seq_length

    flags = ["--preset", options.preset, "--bf16", "--tokenizer-model", tokenizer]
    if options.preset == "tiny":
        flags += ["--mask-token-id", "256"]
    if recipes:
        flags += ["--fp8-format", "hybrid", "--fp8-recipe", recipes[0]]
    args = initialize_arguments([*flags, *rest], prepare)
    megatron_training.initialize_megatron(store=initialize_process_groups(args))
    chunks = megatron_training.get_model(model_provider, ModelType.encoder_or_decoder)
    if args.load is not None:
        load_checkpoint(chunks, None, None)
    multiples = [fp8.sequence_multiple(recipe, 1) for recipe in recipes] or [1]
    model = diffusion_model(chunks)
    # Positions are measured as they are asked for.
    multiple = max([model.pad_multiple, *multiples])
    return replace(model, pad_multiple=multiple, widths=()), all_layers


def layers_of(model: DiffusionModel) -> Any:
    """The transformer layers."""
    return unwrap_model(list(model.chunks))[0].decoder.layers


@contextmanager
def half_of_the_layers(model: DiffusionModel) -> Iterator[None]:
    """Run only half of the layers: the first ones, and the last one, which differs from them."""
    decoder = unwrap_model(list(model.chunks))[0].decoder
    layers = decoder.layers
    decoder.layers = torch.nn.ModuleList([*layers[: len(layers) // 2 - 1], layers[-1]])
    try:
        yield
    finally:
        decoder.layers = layers


@contextmanager
def computing_in(model: DiffusionModel, precision: str) -> Iterator[None]:
    """Compute in bf16 or an FP8 recipe, with the same weights."""
    config = get_model_config(model.chunks[0])
    if precision != "bf16":
        config.fp8_recipe = precision
    with fp8.fp8_phase(model.chunks, "elbo", "rollout" if precision == "bf16" else "both"):
        yield


def free_gradients(model: DiffusionModel) -> None:
    """Give the gradient buffers' memory back; there are no backward passes after this."""
    for chunk in model.chunks:
        for buffer in chunk.buffers:
            buffer.grad_data.untyped_storage().resize_(0)


def float32_copy(model: DiffusionModel) -> DiffusionModel:
    """Build the same model in float32 with local layers: Transformer Engine would use TF32.

    So does PyTorch where its environment says so, as in NVIDIA's images; not in this process from
    here on.
    """
    torch.set_float32_matmul_precision("highest")
    args = get_args()
    config = core_transformer_config_from_args(args)
    config.bf16, config.params_dtype, config.fp8 = False, torch.float32, None
    config.pipeline_dtype = config.autocast_dtype = torch.float32
    config.gradient_accumulation_fusion = config.masked_softmax_fusion = False
    backend, args.transformer_impl = args.transformer_impl, "local"
    try:
        twin: Any = model_provider(config=config).to(model.device).eval()
    finally:
        args.transformer_impl = backend
    (source,) = unwrap_model(list(model.chunks))
    # Transformer Engine keeps a norm's weight in the linear layer that follows it.
    names = {
        "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
        "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    }
    state = {}
    for name, weights in source.state_dict().items():
        if isinstance(weights, Tensor) and not name.endswith("_extra_state"):
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            state[name] = weights.float()
    missing = twin.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
    assert all(name.endswith("_extra_state") for name in missing.missing_keys), missing
    return replace(model, chunks=(twin,))
