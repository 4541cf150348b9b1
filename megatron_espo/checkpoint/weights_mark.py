"""A short mark of a checkpoint's weights, to know them again without reading all of them."""

import hashlib
from pathlib import Path

from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_espo.errors import UserError

# Bytes that are read at the start, in the middle and at the end of each stored part of a tensor.
_SAMPLE = 4096


def fingerprint(folder: str) -> str:
    """Mark the weights of a torch_dist checkpoint.

    Names, shapes, types and samples of the bytes of every stored part go into it: any step of
    training changes it, a change of a few numbers by hand may not. Weights that were stored again
    by another layout have another mark.

    Args:
        folder: of one iteration.

    Returns:
        32 hexadecimal digits.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        metadata = FileSystemReader(folder).read_metadata()
        weights = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer")
        }
        for key, entry in sorted(weights.items()):
            digest.update(f"{key} {list(entry.size)} {entry.properties.dtype}".encode())
        parts = [
            (index.fqn, tuple(index.offset or ()), place)
            for index, place in metadata.storage_data.items()
            if index.fqn in weights
        ]
        for key, offset, place in sorted(parts, key=lambda part: part[:2]):
            digest.update(f"{key} {offset} {place.length}".encode())
            with open(Path(folder, place.relative_path), "rb") as file:
                last = max(place.length - _SAMPLE, 0)
                for start in sorted({0, last // 2, last}):
                    file.seek(place.offset + start)
                    digest.update(file.read(min(_SAMPLE, place.length - start)))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: cannot read this checkpoint ({error}).") from error
    return digest.hexdigest()
