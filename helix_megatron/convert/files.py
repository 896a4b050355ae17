"""The files of a Hugging Face model: which of them conversion uses, and whether they are what they should be.

What is wrong with a file is said in one line that names it and the way out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONFIG, GENERATION, ADAPTER = "config.json", "generation_config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_COPIED = (
    GENERATION, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template*", "additional_chat_templates/*",
)  # fmt: skip
_READ = (CONFIG, ADAPTER, "*.safetensors", INDEX)
_LFS = b"version https://git-lfs.github.com/spec/"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if not path.is_dir()})


def copied_files(folder: Path) -> list[Path]:
    """What a conversion takes over as it is: the tokenizer's files and the settings of generation."""
    return _matching(folder, _COPIED)


def used_files(source: Path) -> list[Path]:
    """Everything on which a conversion of this folder or file depends."""
    return _matching(source, (*_COPIED, *_READ)) if source.is_dir() else [source]


def copy(source: Path, target: Path) -> bool:
    """Copy `copied` into another folder; whether a tokenizer is among it. ValueError for a broken file."""
    found = [path.relative_to(source) for path in copied_files(source)]
    for path in found:
        check(source / path)
        if path.suffix == ".json":
            read_json(source / path)
        (target / path).parent.mkdir(exist_ok=True)
        shutil.copy(source / path, target / path)
    return any(path.name.startswith(("tokenizer", "vocab", "tekken")) for path in found)


def is_listed(file: Path) -> bool:
    """Whether a folder has a file of that name, be it a link to nothing."""
    return file.exists() or file.is_symlink()


def check(file: Path) -> None:
    """ValueError for a file that is missing, unreadable, empty, or a Git-LFS pointer in place of the file."""
    if not file.is_file():
        link = " (a link to a file that is not there)" if file.is_symlink() else ""
        raise ValueError(f"{file} is missing{link}; download the model again, all of its files.")
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_LFS))
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}.") from error
    if not start:
        raise ValueError(f"{file} is empty; download it again.")
    if start == _LFS:
        raise ValueError(
            f"{file} is a Git-LFS pointer, not the file itself; run `git lfs pull` in the repository it is "
            "from, or download it again."
        )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError when it is broken."""
    check(file)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); download it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object; download it again.")
    return found


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """An open safetensors file. ValueError when it is broken."""
    from safetensors import SafetensorError, safe_open

    check(file)
    try:
        opened = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is no complete safetensors file ({error}); download it again."
        ) from error
    with opened:
        yield opened


def token_ids(folder: Path) -> dict[str, Any]:
    """bos_token_id, eos_token_id (a number or several) and pad_token_id of a model; None where it says none.

    generation_config.json is asked first, as transformers' generate does, then config.json.

    Raises:
        ValueError: one of them is no number, nor a list of numbers.
    """
    found: dict[str, Any] = dict.fromkeys(_TOKEN_IDS)
    for file in (folder / CONFIG, folder / GENERATION):
        told = read_json(file) if file.is_file() else {}
        for key in (key for key in _TOKEN_IDS if told.get(key) is not None):
            value = told[key]
            for token in value if isinstance(value, list) else [value]:
                if not isinstance(token, int) or isinstance(token, bool):
                    raise ValueError(
                        f"{file}: {key} is {value!r}; it is a token's number, or a list of them."
                    )
            found[key] = value
    return found
