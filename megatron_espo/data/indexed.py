"""Pre-training data from Megatron-Core's .bin/.idx files, for a masked-diffusion model.

The tokens of a row are input and target at once: there is no shifted label, no extra token and no
causal mask. Every rank builds the data sets, because every rank derives the noise of a row itself
from the row's ``sample_id``.
"""

import argparse
import hashlib
import warnings
from dataclasses import dataclass

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers import MegatronTokenizerBase
from torch import Tensor
from torch.utils.data import Dataset

from megatron_espo.data.corpus import inspect_corpus, split_spans
from megatron_espo.errors import UserError

Blend = tuple[list[str], list[float] | None]
"""Prefixes of .bin/.idx pairs and their weights; without weights, by their number of tokens."""

Datasets = tuple[
    Dataset[dict[str, Tensor]] | None,
    Dataset[dict[str, Tensor]] | None,
    Dataset[dict[str, Tensor]] | None,
]
"""Training, validation and test set."""

_UNSUPPORTED = (
    "mock_data",
    "multiple_validation_sets",
    "reset_position_ids",
    "reset_attention_mask",
    "eod_mask_loss",
    "fim_data",
    "dataloader_inter_document_masking",
    "dataloader_fast_cache_load",
    "dataloader_defer_npy_index_mmap",
    "per_dataset_sequences_path",
    "object_storage_cache_path",
)


@dataclass
class PretrainDatasetConfig(GPTDatasetConfig):
    """GPTDatasetConfig with what else decides the order of the samples."""

    corpus_fingerprint: str = ""
    """Identifies the contents of the files, so that indices cached for an earlier corpus at the
    same path are not used for a new one."""


class PretrainDataset(GPTDataset):
    """Rows of consecutive tokens in a shuffled order that spans the epochs."""

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*GPTDataset._key_config_attributes(), "corpus_fingerprint"]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row.

        Args:
            index: place in the order of the samples.

        Returns:
            ``tokens`` int64 ``[s]`` and ``sample_id`` int64 ``[]``, the index: the noise's key.
        """
        _check_index(index, len(self))
        # Not GPTDataset.__getitem__: it writes token 0 over tokens that equal the padding id.
        tokens, _, _ = self._query_document_sample_shuffle_indices(index)
        assert len(tokens) == self.config.sequence_length
        return {"tokens": torch.from_numpy(tokens), "sample_id": torch.tensor(int(index))}


class BlendedPretrainDataset(Dataset[dict[str, Tensor]]):
    """A blend whose rows are keyed by their place in the blend.

    Rows of two corpora may have the same place in their own corpus; they must not share noise.
    """

    def __init__(self, blend: BlendedDataset) -> None:
        """Wrap a blend of `PretrainDataset`."""
        self.blend = blend
        self.split: Split = blend.split  # Megatron's data loader asks for it

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.blend)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return a row as `PretrainDataset` does, ``sample_id`` being its place in the blend."""
        _check_index(index, len(self))
        return {"tokens": self.blend[index]["tokens"], "sample_id": torch.tensor(int(index))}


def _check_index(index: int, length: int) -> None:
    if not 0 <= index < length:
        raise IndexError(f"row {index} of a data set of {length}")


def build_pretrain_datasets(
    *,
    tokenizer: MegatronTokenizerBase,
    seq_length: int,
    seed: int,
    num_samples: tuple[int | None, int | None, int | None],
    blend: Blend | None = None,
    split: str | None = None,
    blend_per_split: list[Blend | None] | None = None,
    cache_path: str | None = None,
    mmap: bool = True,
    num_threads: int = 1,
    surplus: float = 0.005,
) -> Datasets:
    """Build the training, validation and test set; call it on every rank.

    Args:
        tokenizer: Megatron's tokenizer; its vocabulary size checks the data, its identity is part
            of the cache's key.
        seq_length: tokens in a row.
        seed: decides the order of the samples.
        num_samples: rows of each set, at least; as many epochs as that takes. None is one epoch,
            0 leaves the set out.
        blend: corpora that the three sets share by ``split``.
        split: shares of the documents of each corpus, for example "99,1,0".
        blend_per_split: corpora of each set, instead of ``blend`` and ``split``.
        cache_path: folder for the indices; default: beside the data. All ranks must see it.
        mmap: whether to map the .bin files into memory.
        num_threads: threads that build the corpora of a blend.
        surplus: share of extra rows that the corpora of a weighted blend are built with.

    Returns:
        The three sets, None where one has no corpus, no share or no samples.

    Raises:
        UserError: before any communication, when files are missing or broken, or cannot yield
            what is asked for.
    """
    datasets: list[Dataset[dict[str, Tensor]] | None] = []
    plans = [
        _plan(place, count, blend, split, blend_per_split, seq_length, tokenizer.vocab_size)
        for place, count in zip(Split, num_samples, strict=True)
    ]
    for place, count, plan in zip(Split, num_samples, plans, strict=True):
        if plan is None:
            datasets.append(None)
            continue
        config = PretrainDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            blend=plan.blend,
            split=plan.split,
            num_dataset_builder_threads=num_threads,
            path_to_cache=cache_path,
            mmap_bin_files=mmap,
            tokenizer=tokenizer,
            mid_level_dataset_surplus=surplus,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            add_extra_token_to_sequence=False,
            corpus_fingerprint=plan.fingerprint,
        )
        # One set at a time: Megatron would index an epoch of the others as well, and would refuse
        # the weights of one set because another is to be a single epoch.
        config.split_matrix = [plan.span if other is place else None for other in Split]
        sizes = [count if other is place else 0 for other in Split]
        with warnings.catch_warnings():
            # Padding plays no part here: rows are always full.
            warnings.filterwarnings("ignore", message="The pad token id in the tokenizer collides")
            built = BlendedMegatronDatasetBuilder(
                PretrainDataset, sizes, lambda: True, config
            ).build()[place.value]
        datasets.append(BlendedPretrainDataset(built) if _is_blend(built) else built)
    train, valid, test = datasets
    return train, valid, test


def _is_blend(dataset: object) -> bool:
    return isinstance(dataset, BlendedDataset)


@dataclass(frozen=True)
class _Plan:
    """What one of the three sets is made from."""

    blend: Blend
    split: str
    span: tuple[float, float]
    fingerprint: str


def _plan(
    place: Split,
    count: int | None,
    blend: Blend | None,
    split: str | None,
    blend_per_split: list[Blend | None] | None,
    seq_length: int,
    vocab_size: int,
) -> _Plan | None:
    """Decide, and check, what a set is made from."""
    if blend_per_split is not None:
        flag, source, share = f"--{place.name}-data-path", blend_per_split[place.value], ""
        split = ",".join("1" if other is place else "0" for other in Split)
    else:
        flag, source, share = "--data-path", blend, f" of --split {split}"
        if source is None:
            raise UserError(
                "--data-path is missing; give the prefix of a .bin and .idx file made by "
                "tools/preprocess_data.py"
            )
    span = split_spans(split)[place.value]
    if count == 0 or source is None or span is None:
        return None
    prefixes, weights = source
    if weights is not None and not all(weight > 0 for weight in weights):
        raise UserError(f"{flag}: the weights {weights} must be positive; drop what has weight 0")
    corpora = [inspect_corpus(prefix, flag, vocab_size) for prefix in prefixes]
    tokens = [corpus.tokens_in(span) for corpus in corpora]
    for corpus, number in zip(corpora, tokens, strict=True):
        if number == 0 or (count is None and number < seq_length):
            raise UserError(
                f"{flag} {corpus.prefix}: its {len(corpus.starts)} documents leave {number} tokens "
                f"for the {place.name} set{share} with --seq-length {seq_length}; give it more"
            )
    if len(prefixes) == 1 or count is None:
        weights = None  # one epoch takes all there is, whatever the weights
    elif weights is None:
        # Left to itself, Megatron would stop a blend without weights after one epoch.
        weights = [float(number) for number in tokens]
    fingerprint = hashlib.sha256("".join(c.fingerprint for c in corpora).encode()).hexdigest()
    assert split is not None
    return _Plan((list(prefixes), weights), split, span, fingerprint)


def pretrain_datasets_from_args(
    args: argparse.Namespace,
    num_samples: tuple[int | None, int | None, int | None],
    tokenizer: MegatronTokenizerBase,
) -> Datasets:
    """Build the data sets that Megatron's flags describe; see `build_pretrain_datasets`.

    Args:
        args: Megatron's arguments.
        num_samples: rows of the training, validation and test set.
        tokenizer: Megatron's tokenizer.

    Returns:
        The three sets.

    Raises:
        UserError: as `build_pretrain_datasets`, or for a flag that has no meaning here.
    """
    # Here and not at the top: megatron.training is slow to import and nothing else needs it.
    from megatron.training.utils import get_blend_and_blend_per_split

    for name in _UNSUPPORTED:
        if getattr(args, name, None):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is not supported with masked-diffusion data; leave it out")
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return build_pretrain_datasets(
        tokenizer=tokenizer,
        seq_length=args.seq_length,
        seed=args.seed,
        num_samples=num_samples,
        blend=blend,
        split=args.split,
        blend_per_split=blend_per_split,
        cache_path=args.data_cache_path,
        mmap=args.mmap_bin_files,
        num_threads=args.num_dataset_builder_threads,
        surplus=args.mid_level_dataset_surplus,
    )
