"""Byte tokens of a real English text that every CPython carries, in Megatron's indexed format.

The text is the Python language reference as `help()` prints it (`pydoc_data.topics`): one document per
topic, its UTF-8 bytes as tokens 0..255, closed by the end-of-document token 256. Nothing is downloaded.

Train on it with `--data-path PREFIX` and TOKENIZER_ARGS (Megatron's NullTokenizer: `--vocab-size 257`
counts the end-of-document token, which it takes to be the last one, 256).

    python -m helix_megatron.models.data PREFIX
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

EOD = 256
VOCAB_SIZE = 257
TOKENIZER_ARGS = {"tokenizer-type": "NullTokenizer", "vocab-size": VOCAB_SIZE}


def documents() -> list[np.ndarray]:
    """The topics in alphabetical order, each as its byte tokens and EOD: uint16 arrays [tokens]."""
    from pydoc_data.topics import topics

    return [np.array([*topics[name].encode("utf-8"), EOD], dtype=np.uint16) for name in sorted(topics)]


def decode(tokens: Iterable[int]) -> str:
    """Text of byte tokens; EOD becomes a blank line, a cut-off UTF-8 sequence becomes U+FFFD.

    Raises ValueError for a token outside 0..256.
    """
    pieces: list[bytes] = []
    for token in tokens:
        token = int(token)
        if not 0 <= token < VOCAB_SIZE:
            raise ValueError(f"token {token} is not a byte token: those are 0..255 and {EOD} (end of text).")
        pieces.append(b"\n\n" if token == EOD else bytes([token]))
    return b"".join(pieces).decode("utf-8", errors="replace")


def write(prefix: str | Path) -> int:
    """Write PREFIX.bin and PREFIX.idx unless they already hold this text; returns the number of tokens.

    Each file is written beside its place and renamed, .bin before .idx, so that a reader that looks for
    the index never sees half a data set, and several processes may call this at once.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    data_path, index_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    texts = documents()
    count = sum(len(text) for text in texts)
    data_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_path.parent, prefix=".helix-data-") as folder:
        new_data, new_index = Path(folder, "text.bin"), Path(folder, "text.idx")
        builder = IndexedDatasetBuilder(str(new_data), dtype=np.uint16)
        for text in texts:
            builder.add_document(text, [len(text)])
        builder.finalize(str(new_index))
        for new, old in ((new_data, data_path), (new_index, index_path)):
            if not (old.is_file() and old.read_bytes() == new.read_bytes()):
                os.replace(new, old)
    return count


def main(argv: list[str] | None = None) -> int:
    """`python -m helix_megatron.models.data PREFIX`: write the data set and say how to train on it."""
    parser = argparse.ArgumentParser(prog="helix data", description=__doc__.split("\n")[0])
    parser.add_argument("prefix", help="path of the data set without .bin and .idx")
    prefix = parser.parse_args(argv).prefix
    count = write(prefix)
    flags = " ".join(f"--{name} {value}" for name, value in TOKENIZER_ARGS.items())
    print(f"{prefix}.bin, {prefix}.idx: {count:,} byte tokens. Train with: --data-path {prefix} {flags}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
