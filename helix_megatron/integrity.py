"""Check a torch_dist checkpoint before it is loaded: every shard there, whole, and unchanged.

Each tensor of a shard file is a zip archive with a CRC-32 of its data, which torch does not compare on load:
a flipped bit would load silently. `.metadata` is a pickle, which could run any code: it is read with an
allow-list of the classes torch writes there. Works on checkpoints of any origin; each rank checks its share.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from isal.isal_zlib import crc32  # zlib's checksum at memory speed

_ALLOWED_MODULES = (
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
)
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),  # in what plain torch.distributed.checkpoint writes
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("builtins", name) for name in ("set", "frozenset", "slice", "list", "dict", "tuple")),
}


class CheckpointError(ValueError):
    """A checkpoint is damaged or not safe to read; the message names the file."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module not in _ALLOWED_MODULES and (module, name) not in _ALLOWED and not dtype:
            raise CheckpointError(f"it asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Any:
    """The checkpoint's index (torch's Metadata), read without running what it contains.

    Raises:
        CheckpointError: missing, damaged, or asking for classes that a checkpoint does not need.
    """
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            return _MetadataUnpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is refused: {error}; load it only if you trust it, with --helix-no-verify-checkpoint"
        ) from None
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}); the checkpoint is incomplete or "
            "damaged, load an earlier one (--ckpt-step)"
        ) from error


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the shards of a checkpoint, one line each; empty when all is well.

    Args:
        folder: of one iteration, with .metadata and the shard files.
        part, parts: check every parts-th tensor only, beginning with the part-th.
    """
    metadata = read_metadata(folder)
    by_file = defaultdict(list)
    stored = sorted(metadata.storage_data.items(), key=lambda item: (item[1].relative_path, item[1].offset))
    for index, info in stored[part::parts]:
        by_file[info.relative_path].append((index.fqn, info))
    found = []
    for name, items in by_file.items():
        path = folder / name
        try:
            with open(path, "rb") as file:
                found += [
                    f"{path}: {fault} (in {tensor})"
                    for tensor, info in items
                    if (fault := _fault(file, info.offset, info.length))
                ]
        except OSError as error:
            found.append(f"{path}: {error.strerror}")
    return found


def _fault(file: io.BufferedReader, offset: int, length: int) -> str | None:
    file.seek(offset)
    blob = file.read(length)
    if len(blob) < length:
        return f"truncated, {length - len(blob)} bytes are missing"
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            bad = next((entry.filename for entry in archive.infolist() if not _intact(blob, entry)), None)
        torch._C.PyTorchFileReader(io.BytesIO(blob))  # torch reads parts of the archive that zipfile does not
    except Exception as error:  # damaged archives raise of all kinds
        return f"damaged ({(str(error) or type(error).__name__).splitlines()[0]})"
    return f"damaged (the checksum of {bad} does not match)" if bad else None


def _intact(blob: bytes, entry: zipfile.ZipInfo) -> bool:
    """Whether an entry's bytes have the checksum of the archive's directory (torch stores uncompressed)."""
    head = entry.header_offset
    name, extra = struct.unpack_from("<HH", blob, head + 26)
    data = memoryview(blob)[head + 30 + name + extra :][: entry.file_size]
    return blob[head : head + 4] == b"PK\3\4" and entry.compress_type == 0 and crc32(data) == entry.CRC


def verify(folder: str | Path) -> None:
    """Check a checkpoint with all ranks; all of them raise when any part is damaged. Collective.

    Raises:
        CheckpointError: naming the files.
    """
    folder = Path(folder)
    distributed = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    try:
        found = damage(folder, rank, world)
    except CheckpointError as error:
        found = [str(error)]
    if distributed:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, found)
        found = sorted({line for lines in gathered for line in lines})
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {'; '.join(found[:3])}{more}; "
            "load an earlier one (--ckpt-step)"
        )
