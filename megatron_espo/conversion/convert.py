"""Converts checkpoints: Hugging Face folders to Megatron's torch_dist format and back."""

import argparse
import copy
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore

from megatron_espo.adapters.base import lora_settings
from megatron_espo.checkpoint.tracker import (
    TRACKER,
    checkpoint_folder,
    stored_tokenizer,
    tokenizer_folder,
)
from megatron_espo.conversion.adapters import CheckpointAdapters
from megatron_espo.conversion.blocks import check_weights, write_hugging_face, write_megatron
from megatron_espo.conversion.families import FAMILIES
from megatron_espo.conversion.hugging_face import DTYPES as HF_DTYPES
from megatron_espo.conversion.hugging_face import (
    HuggingFaceWeights,
    copy_other_files,
    read_json,
    resolve_folder,
    weight_map,
)
from megatron_espo.conversion.lora import MergedWeights
from megatron_espo.conversion.mapping import Names, extra_states
from megatron_espo.conversion.model_folder import (
    PublishedModel,
    read_model,
    read_model_with_mask,
    stored_facts,
)
from megatron_espo.conversion.peft import base_folder
from megatron_espo.conversion.side_files import write_side_files
from megatron_espo.conversion.torch_dist import CheckpointReader
from megatron_espo.conversion.verification import quiet, verify
from megatron_espo.data.atomic_folder import atomic_folder
from megatron_espo.data.tokenizer import copy_tokenizer, load_tokenizer, special_ids
from megatron_espo.errors import UserError
from megatron_espo.model.provider import model_provider
from megatron_espo.model.shape import ModelShape
from megatron_espo.model.supported import refusals
from megatron_espo.startup.adapters import SETTINGS
from megatron_espo.startup.arguments import initialize_arguments
from megatron_espo.startup.setup import start_anew
from megatron_espo.startup.stored import stored_arguments

# Longer sequences are a matter of flags, not of the checkpoint: Dream names 131072 positions.
_LONGEST = 4096

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert_to_megatron(
    hf: str,
    out: str,
    lora: str | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    check_logits: bool = False,
    mask_token_id: int | None = None,
    logit_shift: bool | None = None,
) -> None:
    """Write a Hugging Face model as a checkpoint for --load or --pretrained-checkpoint.

    Args:
        hf: folder or hub name of the model.
        out: the --save folder to make; a tokenizer folder lies in it.
        lora: folder or hub name of a PEFT adapter to merge.
        tokenizer: tokenizer folder, where the model folder has none.
        dtype: convert the weights to this type; None keeps them.
        check_logits: compare the logits of both sides at the end.
        mask_token_id: the mask token of an autoregressive model, which has none; None takes the
            first row of the vocabulary without a token.
        logit_shift: whether such a model goes on to predict the next position; None: it does.

    Raises:
        UserError: one sentence on what is wrong; ``out`` does not exist then.
    """
    folder = resolve_folder(hf, "--hf")
    source = Path(tokenizer) if tokenizer else folder
    model = read_model_with_mask(folder, source, mask_token_id, logit_shift)
    weights = HuggingFaceWeights(model.folder) if lora is None else _merged_weights(model, lora)
    weights.check(model.sources, model.copies)
    own = [name for block in model.blocks if block.dtype for name in block.sources]
    kept = weights.dtype(convert=dtype is not None, own=own)
    kept = DTYPES[dtype] if dtype else kept
    with atomic_folder(out, needed=model.num_parameters * kept.itemsize) as partial:
        copied = tokenizer_folder(partial)
        mask = model.given.get("mask_token_id")
        copy_tokenizer(source, copied, model.family.tokenizer_class, mask)
        args = copy.copy(_initialize_megatron(model, copied))
        _check_targets(model)
        args.tokenizer_model = str(tokenizer_folder(Path(out).absolute()))
        args.bf16, args.fp16 = kept == torch.bfloat16, kept == torch.float16
        args.params_dtype = kept
        # For the way back: a checkpoint has these tensors in float32 whatever they were.
        args.expert_bias_dtype = HF_DTYPES[weights.tensors[own[0]].dtype] if own else None
        release = partial / "release"
        release.mkdir()
        common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
        write_megatron(weights, release, model.blocks, kept, extra_states(model.shape), common)
        (partial / TRACKER).write_text("release")
        if check_logits:
            verify([CheckpointReader(release)], weights, model.fields, model.shape)
    print(
        f"{out}: {_describe(model, kept)}. Pass it with --load or --pretrained-checkpoint, and "
        "--use-checkpoint-args."
    )


def convert_to_hugging_face(
    megatron: str,
    out: str,
    template: str | None = None,
    family: str | None = None,
    tokenizer: str | None = None,
    iteration: int | None = None,
    dtype: str | None = None,
    check_logits: bool = False,
    base: str | None = None,
) -> None:
    """Write a checkpoint's model as a folder that the original Hugging Face code loads.

    Args:
        megatron: a --save folder.
        out: the folder to make.
        template: folder or hub name of the model whose config, tokenizer and code are copied; if
            it has weights or an index, the tensors are split into files as there.
        family: without a template, the family whose config and names are written; there is no code
            in the folder then.
        tokenizer: without a template, the tokenizer folder; None takes the checkpoint's.
        iteration: which checkpoint; None takes the latest.
        dtype: convert the weights to this type; None keeps them.
        check_logits: compare the logits of both sides at the end.
        base: of a checkpoint of adapters, which are merged into it, the place of the base; None
            takes the one that it names.

    Raises:
        UserError: one sentence on what is wrong; ``out`` does not exist then.
    """
    folder = checkpoint_folder(megatron, iteration)
    args, reader = stored_arguments(folder), CheckpointReader(Path(folder))
    adapted = lora_settings(args).rank is not None
    readers = [reader]
    if adapted:
        reader = CheckpointReader(Path(base_folder(megatron, args, base)))
        readers.append(reader)
    elif base is not None:
        raise UserError(f"--base: --megatron {megatron} holds a whole model; leave it out.")
    kept = DTYPES[dtype] if dtype else reader.dtype()
    with tempfile.TemporaryDirectory() as scratch:
        if template is not None:
            flag = f"--hf-template {template}"
            source = resolve_folder(template, "--hf-template", weights=False)
            model = read_model(source, stored_facts(args))
        else:
            assert family is not None
            flag = f"--family {family}"
            model = _write_template(Path(scratch), megatron, args, family, tokenizer, kept)
        differences = model.shape.differences(args)
        # What a refusal advises is for a run.
        differences += [r.partition(";")[0].rstrip(".") for r in refusals(args, validated=True)]
        if differences:
            found = "; ".join(differences)
            raise UserError(f"--megatron {megatron} does not fit {flag}: {found}.")
        check_weights(reader, model.blocks)
        files, delta = _files(model), None
        if adapted:
            names = model.family.names
            delta = CheckpointAdapters.of(readers[0], args, model.shape, names).delta
        with atomic_folder(out, needed=model.num_parameters * kept.itemsize) as partial:
            copy_other_files(model.folder, partial)
            own_dtype = getattr(args, "expert_bias_dtype", None) or torch.float32
            write_hugging_face(
                reader, partial, model.blocks, kept, files, model.copies, delta, own_dtype
            )
            written = HuggingFaceWeights(partial)
            written.check(model.sources, model.copies)
            if check_logits:
                copied = Path(scratch, "tokenizer")
                mask = model.given.get("mask_token_id")
                copy_tokenizer(model.folder, copied, model.family.tokenizer_class, mask)
                own = _initialize_megatron(model, copied)
                for name in SETTINGS if adapted else ():
                    setattr(own, name, getattr(args, name))
                verify(readers, written, model.fields, model.shape)
        print(f"{out}: {_describe(model, kept)}.")
        named = read_json(model.folder / "config.json").get("torch_dtype")
    if named is not None and named != _name(kept):
        print(
            f"note: config.json says torch_dtype {named}, the weights are {_name(kept)}; "
            f"--dtype {named} converts them."
        )


def _write_template(
    scratch: Path,
    megatron: str,
    args: argparse.Namespace,
    family: str,
    tokenizer: str | None,
    dtype: torch.dtype,
) -> PublishedModel:
    """Make the folder that would be the template of a checkpoint that has none.

    Args:
        scratch: where to.
        megatron: the --save folder.
        args: the checkpoint's arguments.
        family: the family to write it as.
        tokenizer: the tokenizer folder; None takes the checkpoint's.
        dtype: type of the weights.

    Returns:
        The model.
    """
    found = tokenizer or stored_tokenizer(megatron, args)
    if found is None:
        raise UserError(f"--megatron {megatron} names no tokenizer; pass --tokenizer-model FOLDER.")
    loaded = load_tokenizer(found)
    shape = ModelShape.of(args, special_ids(loaded, args.mask_token_id).eos_token_id)
    if len(loaded) > shape.vocab_size:
        raise UserError(
            f"--tokenizer-model {loaded.name_or_path} has {len(loaded)} tokens, more than the "
            f"{shape.vocab_size} of --megatron {megatron}; give the one that it was trained with."
        )
    try:
        write_side_files(scratch, FAMILIES[family], shape, dtype, loaded)
    except UserError as error:
        raise UserError(f"--megatron {megatron} does not fit --family {family}: {error}") from error
    return read_model(scratch)


def _describe(model: PublishedModel, dtype: torch.dtype) -> str:
    """Say how much a model is."""
    return f"{len(model.sources)} tensors, {model.num_parameters:,} parameters, {_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _merged_weights(model: PublishedModel, lora: str) -> MergedWeights:
    """Read the weights with an adapter; say what of it fits nothing."""
    weights = MergedWeights(model.folder, resolve_folder(lora, "--lora", "adapter_config.json"))
    print(f"{lora}: merging {weights.num_merged} adapted weights.")
    if unused := weights.unused_targets():
        names = model.family.names
        print(
            f"note: the adapter was to adapt {', '.join(unused)} too, but no layer of this model "
            f"is called so (its linear layers: {', '.join(_linear_names(names))}); they were "
            "left as they are when it was trained."
        )
    return weights


def _linear_names(names: Names) -> list[str]:
    attention = [names.query, names.key, names.value, names.attention_output]
    return [name.split(".")[-1] for name in [*attention, names.gate, names.up, names.down]]


def _files(model: PublishedModel) -> dict[str, str] | None:
    """Take over how the template's tensors are split into files."""
    files = weight_map(model.folder)
    if files is not None and files.keys() - model.copies.keys() != model.sources.keys():
        name = min((files.keys() - model.copies.keys()) ^ model.sources.keys())
        missing = "has no entry for" if name in model.sources else "has an entry too many for"
        raise UserError(
            f"--hf-template {model.folder}: its index {missing} {name}; correct or remove it."
        )
    return files


def _initialize_megatron(model: PublishedModel, tokenizer: Path) -> argparse.Namespace:
    """Set Megatron's arguments to this model, in float32, and the groups to this process."""
    shape = model.shape
    named = load_tokenizer(tokenizer)
    if len(named) > shape.vocab_size:
        raise UserError(
            f"{model.folder}: the tokenizer has {len(named)} tokens, more than the "
            f"{shape.vocab_size} of config.json; correct one, or pass the model's own "
            "--tokenizer-model."
        )
    if named.mask_token_id not in (None, shape.mask_token_id):
        raise UserError(
            f"{model.folder}: the tokenizer's mask token is {named.mask_token_id}, config.json "
            f"says {shape.mask_token_id}; correct one."
        )
    ids = special_ids(named, shape.mask_token_id)
    stops = dict.fromkeys([*model.end_tokens, *ids.stop_token_ids])
    flags = [
        *shape.flags(),
        *("--stop-token-ids", *map(str, stops)),
        *("--tokenizer-model", str(tokenizer)),
        # Only describes the model: nothing of it is kept when a run loads the checkpoint.
        *("--transformer-impl", "local", "--use-cpu-initialization"),
        *("--no-gradient-accumulation-fusion", "--make-vocab-size-divisible-by", "1"),
        *("--micro-batch-size", "1", "--train-iters", "1", "--lr", "0"),
        *("--seq-length", str(min(shape.max_position_embeddings, _LONGEST))),
    ]
    start_anew()  # after another conversion, or a model, in this process
    with quiet():
        args = initialize_arguments(flags, lambda args: None)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(args.seed)
    return args


def _check_targets(model: PublishedModel) -> None:
    """Compare the blocks with what Megatron's own model, built without memory, would load.

    Raises:
        UserError: naming the tensor.
    """
    with quiet(), torch.device("meta"):
        sharded = model_provider().sharded_state_dict()
    apply_factories(sharded)
    targets = list(nested_values(sharded))
    wanted = {
        (target.key, target.global_offset): (target.global_shape, target.local_shape)
        for target in targets
        if isinstance(target, ShardedTensor)
    }
    ours = {
        (block.key, block.offset): (block.global_shape, block.shape[block.stacked :])
        for block in model.blocks
    }
    for place in wanted.keys() | ours.keys():
        if wanted.get(place) != ours.get(place):
            raise UserError(
                f"{place[0]} at {place[1]}: Megatron asks for {wanted.get(place)}, the mapping "
                f"gives {ours.get(place)}."
            )
    states = extra_states(model.shape)
    for target in targets:
        if isinstance(target, ShardedObject) and (states.get(target.key),) != target.global_shape:
            raise UserError(f"{target.key}: Megatron asks for this state, the mapping has none.")
