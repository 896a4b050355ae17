"""Check a torch_dist checkpoint while it is loaded: every shard there, whole, and unchanged.

Each tensor of a shard file is a zip archive with a CRC-32 of its data, which torch does not compare on load:
a flipped bit would load silently. `.metadata` is a pickle, which could run any code: it is read with an
allow-list of the classes torch writes there. Works on checkpoints of any origin.

Note [Reading a shard once]
    torch reads a stored tensor from its file once for every piece of it that a rank wants. Slices of heads
    want many pieces of few tensors: read_shards reads each stored tensor once, compares the checksum on the
    bytes it has in hand anyway, and copies all pieces from it.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from isal.isal_zlib import crc32  # zlib's checksum at memory speed
from torch import Tensor
from torch.distributed.checkpoint.metadata import StorageMeta

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


def current_metadata(folder: Path) -> Any:
    """read_metadata, but once for an unchanged file until forget_metadata: a load needs it several times."""
    try:
        stat = os.stat(folder / ".metadata")
    except OSError:
        return read_metadata(folder)  # raises, in plain words
    return _same_metadata(folder, (stat.st_ino, stat.st_mtime_ns, stat.st_size))


@functools.lru_cache(maxsize=1)
def _same_metadata(folder: Path, stamp: tuple[int, ...]) -> Any:
    return read_metadata(folder)


def metadata_of(reader: Any, rank: int | None = None, **kwargs: Any) -> Any:
    """torch's FileSystemReader.read_metadata by current_metadata.

    Raises:
        CheckpointError: as read_metadata.
    """
    if rank is not None:  # an index per rank: torch's own, which Megatron does not write
        return type(reader).read_metadata(reader, rank=rank, **kwargs)
    metadata = current_metadata(Path(reader.path))
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata


def forget_metadata() -> None:
    """Drop what current_metadata keeps."""
    _same_metadata.cache_clear()


def read_shards(
    reader: Any, plan: Any, planner: Any, *, verify: bool, agree: bool = True
) -> torch.futures.Future:
    """torch's FileSystemReader.read_data, but reading each stored tensor once. Collective with both flags.

    Args:
        reader: a FileSystemReader with its metadata set.
        plan, planner: a LoadPlan and its LoadPlanner.
        verify: compare checksums.
        agree: all ranks raise when one of them finds damage; off where one rank may read alone.
    Raises:
        CheckpointError: naming the damaged or missing files.
    """
    wanted = defaultdict(list)
    for item in plan.items:
        wanted[item.storage_index].append(item)
    names = {index: items[0].dest_index.fqn for index, items in wanted.items()}
    found: list[str] = []
    refused: Exception | None = None  # by whoever unpickles an object; not damage
    for index, content, fault in _stored(Path(reader.path), reader.storage_data, names, verify):
        try:
            for item in [] if fault else wanted[index]:
                _hand_over(content, item, planner)
        except Exception as error:  # no rank may miss the agreement below
            if index.offset is None:
                refused = refused or error
            else:
                path = Path(reader.path) / reader.storage_data[index].relative_path
                fault = f"{path}: not what the index says: {_first_line(error)} (in {names[index]})"
        if fault:
            found.append(fault)
    _refuse(Path(reader.path), found, verify and agree)
    if refused is not None:
        raise refused
    done: torch.futures.Future = torch.futures.Future()
    done.set_result(None)
    return done


def _first_line(error: Exception) -> str:
    """Of its message, or its name where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _hand_over(content: Tensor | io.BytesIO, item: Any, planner: Any) -> None:
    """Give the planner the piece of `content` that it wants for a ReadItem."""
    if isinstance(content, io.BytesIO):
        planner.load_bytes(item, content)
        return
    for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        content = content.narrow(dim, offset, length)
    target = planner.resolve_tensor(item).detach()
    assert target.shape == content.shape, "torch plans pieces of equal shapes"
    target.copy_(content)
    planner.commit_tensor(item, target)


def _stored(folder: Path, storage: Any, names: dict[Any, str], verify: bool) -> Iterator[tuple]:
    """(index, Tensor or BytesIO, None) or (index, None, fault) for what is stored under the indices of
    `names`, in the order of the files; one fault stands for all of a file that cannot be opened. A tensor's
    memory is the next one's too: copy it before going on."""
    by_file, buffer, described = defaultdict(list), bytearray(), {}
    for index in sorted(names, key=lambda index: storage[index].offset):
        by_file[storage[index].relative_path].append(index)
    for name, indices in by_file.items():
        path = folder / name
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                for index in indices:
                    info, content, fault = storage[index], None, None
                    try:
                        if size < info.offset + info.length:
                            raise CheckpointError("truncated")
                        if len(buffer) < info.length:  # one for all tensors: fresh memory costs time
                            buffer = bytearray(info.length)
                        archive = memoryview(buffer)[: info.length]
                        file.seek(info.offset)
                        file.readinto(archive)
                        content = _content(archive, index, verify, described)
                    except OSError:
                        raise
                    except Exception as error:  # damaged archives raise of all kinds
                        fault = f"{path}: damaged: {_first_line(error)} (in {names[index]})"
                    yield index, content, fault
        except OSError as error:
            yield indices[0], None, f"{path}: {error.strerror}"


class _Reader(io.RawIOBase):
    """Bytes in memory as a file, without a copy (io.BytesIO makes one of anything but bytes)."""

    def __init__(self, content: memoryview):
        self._content, self._position = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._content)}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        part = self._content[self._position : self._position + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)


def _content(
    archive: memoryview, index: Any, verify: bool, described: dict[bytes, tuple]
) -> Tensor | io.BytesIO:
    """What torch.save wrote: the tensor, over the memory of `archive`; or a copy of the archive itself, where
    the index names an object.

    Args:
        described: kept between calls: what a pickle of a tensor's dtype and shape says. A model has few
            different ones, and torch takes as long to read one as to read a megabyte of data.
    Raises: anything, when the archive is damaged.
    """
    with zipfile.ZipFile(_Reader(archive)) as parts:
        entries = parts.infolist()
    data = {entry.filename.partition("/")[2]: _data(archive, entry) for entry in entries}
    if verify:
        for entry, content in zip(entries, data.values(), strict=True):
            if entry.compress_type or crc32(content) != entry.CRC:
                raise CheckpointError(f"the checksum of {entry.filename} does not match")
    if index.offset is None:  # an object: read by whoever asked for it
        torch._C.PyTorchFileReader(_Reader(archive))  # it reads parts of the archive that zipfile does not
        return io.BytesIO(archive)
    description = bytes(data["data.pkl"]) + bytes(data.get("byteorder", b""))
    if description not in described:
        with torch.serialization.skip_data():  # shape and strides: the data is in hand
            tensor = torch.load(_Reader(archive), map_location="cpu", weights_only=True)
        described[description] = tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
    dtype, shape, stride, offset = described[description]
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data["data/0"], dtype=dtype).as_strided(shape, stride, offset)


def _data(archive: memoryview, entry: zipfile.ZipInfo) -> memoryview:
    """The bytes of an entry, which torch stores uncompressed."""
    head = entry.header_offset
    if archive[head : head + 4] != b"PK\3\4":
        raise CheckpointError(f"there is no {entry.filename} where the archive's directory says")
    name, extra = struct.unpack_from("<HH", archive, head + 26)
    start = head + 30 + name + extra
    return archive[start : start + entry.file_size]


def _refuse(folder: Path, found: list[str], agree: bool) -> None:
    """Raise on all ranks when one of them has found damage."""
    if agree and dist.is_available() and dist.is_initialized():
        device = torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
        failed = torch.tensor([len(found)], device=device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if failed:  # the sound ranks learn the reason only then: gathering objects takes three collectives
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, found)
            found = sorted({line for lines in gathered for line in lines})
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {'; '.join(found[:3])}{more}; "
            "load an earlier one (--ckpt-step)"
        )
