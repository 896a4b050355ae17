"""Megatron's reading of torch_dist checkpoints, in one verified pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helix_megatron.checkpoint import integrity


def read_each_once(replace: Callable[..., None], verify: bool = True) -> None:
    """Have torch_dist checkpoints read as integrity.py reads them: each stored tensor once, and verified.

    Args:
        replace: Replacements.replace.
        verify: compare checksums.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.api import CheckpointException

    def index_first(original: Callable) -> Callable:  # Megatron reads the arguments before the weights
        @functools.wraps(original)
        def load_common_state_dict(checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
            integrity.current_metadata(Path(checkpoint_dir))
            return original(checkpoint_dir, *args, **kwargs)

        return load_common_state_dict

    def each_once(original: Callable, agree: bool = True) -> Callable:
        @functools.wraps(original)
        def _get_filesystem_reader(*args: Any, **kwargs: Any) -> Any:
            reader = original(*args, **kwargs)
            if isinstance(reader, FileSystemReader):  # other storage has its own reader
                reader.read_data = functools.partial(
                    integrity.read_shards, reader, verify=verify, agree=agree
                )
                if verify:
                    reader.read_metadata = functools.partial(integrity.metadata_of, reader)
            return reader

        return _get_filesystem_reader

    def in_plain_words(original: Callable) -> Callable:
        @functools.wraps(original)
        def load(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except CheckpointException as error:  # torch's, of every rank's failures
                for failure, _ in error.failures.values():
                    if isinstance(failure, integrity.CheckpointError):
                        raise failure from None
                raise
            finally:
                integrity.forget_metadata()

        return load

    if verify:
        replace(dist_checkpointing, "load_common_state_dict", index_first)
        replace(dist_checkpointing, "load_common_state_dict", in_plain_words)
    replace(torch_strategy, "_get_filesystem_reader", each_once)
    if hasattr(serialization, "_get_filesystem_reader"):  # of arguments and counters; one rank may read alone
        alone = functools.partial(each_once, agree=False)
        replace(serialization, "_get_filesystem_reader", alone)
    replace(dist_checkpointing, "load", in_plain_words)
