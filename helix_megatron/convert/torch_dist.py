"""Megatron's torch_dist checkpoints, written and read one tensor at a time.

The format is PyTorch's distributed checkpoint plus `metadata.json`; Megatron's own writer wants the whole
model in memory, so this one gives PyTorch a plan whose tensors are made when they are written. Written as a
`release` checkpoint (Megatron's word for weights without optimizer state): `--load` needs no other flag.
"""

from __future__ import annotations

import io
import pickle
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import load as load_planned
from torch.distributed.checkpoint import save as save_planned
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from helix_megatron.checkpoint import integrity
from helix_megatron.convert.mapping import EXTRA_STATES, Entry

_TRACKER = "latest_checkpointed_iteration.txt"


class _LazySave(DefaultSavePlanner):
    """A plan of tensors that `make(entry)` produces when each is written."""

    def __init__(self, entries: list[Entry], layers: int, dtype: torch.dtype, make: Callable, objects: dict):
        super().__init__(flatten_state_dict=False)
        self._make, self._objects = make, objects
        self._items: dict[MetadataIndex, Entry] = {}
        self._plan = []
        for entry in entries:
            stacked = entry.layer is not None
            size = torch.Size((layers, *entry.shape) if stacked else entry.shape)
            offsets = torch.Size((entry.layer if stacked else 0, *[0] * (len(size) - 1)))
            chunk = ChunkStorageMetadata(offsets, torch.Size((1, *entry.shape) if stacked else entry.shape))
            index = MetadataIndex(entry.key, offsets)
            data = TensorWriteData(chunk, TensorProperties(dtype=dtype), size)
            self._items[index] = entry
            self._plan.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self._plan += [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]

    def create_local_plan(self) -> SavePlan:
        """One item for each tensor."""
        self.plan = SavePlan(self._plan)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The tensor [1, ...] of one layer, a whole tensor, or a pickled object."""
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], buffer)
            return buffer
        entry = self._items[MetadataIndex(write_item.index.fqn, write_item.index.offset)]
        tensor = self._make(entry).contiguous()
        return tensor if entry.layer is None else tensor.unsqueeze(0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that it works in a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """ValueError that names the folder for what a checkpoint that is cut or lacks files runs into."""
    try:
        with _quiet():
            yield
    except CheckpointException as error:  # torch's, of every rank's failures
        failure = next(iter(error.failures.values()))[0]
        raise _broken(folder, failure) from error
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise _broken(folder, error) from error


def _broken(folder: Path, error: BaseException) -> ValueError:
    told = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{folder} is no complete checkpoint ({told}); copy or save it again.")


class _Writer(FileSystemWriter):
    """A file for each tensor: torch's writer keeps a file's tensors until it is closed. No copying ahead."""

    def __init__(self, folder: Path):
        super().__init__(folder, single_file_per_rank=False, per_thread_copy_ahead=0)

    def storage_meta(self) -> None:
        """Nothing: torch's would have this machine's path in the checkpoint, as a class to unpickle."""


def write(folder: Path, entries: Iterable[Entry], args: Namespace, make: Callable[[Entry], Tensor]) -> None:
    """Write a checkpoint of weights alone into `folder`.

    Args:
        entries: what to write.
        args: the model's Megatron arguments, kept in the checkpoint; its params_dtype is the weights'.
        make: the tensor of an entry, [entry.shape]; called once each, held only while it is written.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    layers = args.num_layers
    objects: dict[str, Any] = {}
    for module in EXTRA_STATES:
        if "_layernorm" in module and "final" not in module and not args.qk_layernorm:
            continue
        count = layers if ".layers." in module else 1
        objects |= {f"{module}._extra_state/shard_{index}_{count}": None for index in range(count)}
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    objects["common_state/shard_0_1"] = common
    release = folder / "release"
    release.mkdir(parents=True)
    planner = _LazySave(list(entries), layers, args.params_dtype, make, objects)
    with _quiet():
        save_planned({}, storage_writer=_Writer(release), planner=planner, no_dist=True)
    save_config(CheckpointingConfig("torch_dist", 1), str(release))
    (folder / _TRACKER).write_text("release")  # last: without it there is no checkpoint


class _ChunkLoad(DefaultLoadPlanner):
    """Read one box of a stored tensor into a tensor of that box's size."""

    def __init__(self, key: str, box: ChunkStorageMetadata, into: Tensor):
        super().__init__()
        self._key, self._box, self._into = key, box, into

    def create_local_plan(self) -> LoadPlan:
        """The pieces of the stored tensor that meet the box."""
        stored = self.metadata.state_dict_metadata[self._key]
        return LoadPlan(create_read_items_for_chunk_list(self._key, stored, [self._box]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Where every piece goes."""
        return self._into


class Checkpoint:
    """A torch_dist checkpoint on disk.

    Args:
        folder: what `--load` takes (the newest iteration is read), or one `iter_0000100` or `release` in it.

    Raises:
        ValueError: there is no torch_dist checkpoint, or it holds no arguments.
    """

    def __init__(self, folder: Path):
        from megatron.core import dist_checkpointing

        self.folder = self._find(folder)
        with _named(self.folder):
            common = dist_checkpointing.load_common_state_dict(str(self.folder))
        if common.get("args") is None:
            raise ValueError(f"{self.folder} holds no Megatron arguments, so its architecture is unknown.")
        self.args: Namespace = common["args"]
        self._reader = FileSystemReader(self.folder)
        with _named(self.folder):
            metadata = integrity.metadata_of(self._reader)
        self._reader.read_metadata = lambda *_, **__: metadata  # once, not once a tensor
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: stored
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        assert isinstance(metadata, Metadata)

    @staticmethod
    def _find(folder: Path) -> Path:
        from megatron.core.dist_checkpointing.core import check_is_distributed_checkpoint

        tracker = folder / _TRACKER
        if tracker.is_file():
            step = tracker.read_text().strip()
            if step != "release" and not step.isdecimal():
                raise ValueError(f"{tracker} says {step!r}; it says release, or a checkpoint's iteration.")
            folder = folder / ("release" if step == "release" else f"iter_{int(step):07d}")
        with _named(folder):
            distributed = check_is_distributed_checkpoint(str(folder))
        if not distributed:
            raise ValueError(
                f"{folder} is not a torch_dist checkpoint (it has no metadata.json); give the folder that "
                "Megatron's --load takes, of a run with --ckpt-format torch_dist (its default)."
            )
        return folder

    def read(self, entry: Entry) -> Tensor:
        """The tensor of an entry, [entry.shape], in its stored dtype. ValueError when it is not there."""
        stored = self.tensors.get(entry.key)
        shape = tuple(entry.shape) if entry.layer is None else (self.args.num_layers, *entry.shape)
        if stored is None or tuple(stored.size) != shape:
            found = "no such tensor" if stored is None else f"shape {list(stored.size)}"
            raise ValueError(
                f"{self.folder} should hold {entry.key} of shape {list(shape)}, as its arguments say, but "
                f"has {found}; only dense GPT models of one kind of layer can be converted."
            )
        stacked = entry.layer is not None
        sizes = (1, *entry.shape) if stacked else entry.shape
        offsets = (entry.layer if stacked else 0, *[0] * (len(sizes) - 1))
        into = torch.empty(sizes, dtype=stored.properties.dtype)
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        with _named(self.folder):
            planner = _ChunkLoad(entry.key, box, into)
            load_planned({}, storage_reader=self._reader, planner=planner, no_dist=True)
        return into.squeeze(0) if stacked else into
