"""Hugging Face → Megatron and back: what `helix convert` does."""

from __future__ import annotations

import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from helix_megatron.convert import families, files, hf, mapping, torch_dist
from helix_megatron.convert.mapping import Entry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HF_FOLDER = "hf"  # in a converted checkpoint: configuration, generation settings, tokenizer of its model
FLAGS_FILE = "model.yaml"


def to_megatron(
    source: Path, out: Path, dtype: str | None = None, divisible_by: int = 128, progress: bool = False
) -> Namespace:
    """Convert a safetensors folder or GGUF file into a Megatron checkpoint.

    Args:
        source: the model.
        out: new folder: the checkpoint, `model.yaml` (its flags, for --helix-config) and `hf/` (configuration
            and tokenizer).
        dtype: of the weights written; None keeps the source's (float32 of a GGUF file).
        divisible_by: the vocabulary is padded with zero rows to a multiple of it.
        progress: show a progress bar.

    Returns:
        The Megatron arguments in the checkpoint.

    Raises:
        ValueError: the model cannot be converted exactly, its tensors are not those of its family, or `out`
            is not empty.
    """
    model = hf.open_source(source)
    _untie_where_it_differs(model)
    args = families.to_megatron(model.config, divisible_by)
    wanted = list(mapping.entries(args, args.vocab_size))
    dtypes = _check_tensors(model, wanted, args, source)
    args.params_dtype = DTYPES[dtype] if dtype else _the_only(dtypes, source)

    def make(entry: Entry) -> Tensor:
        return mapping.merge(entry, [model.read(name).to(args.params_dtype) for name in entry.names], args)

    with _new_folder(out) as folder, _bar("to Megatron", len(wanted), progress) as advance:
        (folder / HF_FOLDER).mkdir()
        model.config.dtype = args.params_dtype
        model.config.save_pretrained(folder / HF_FOLDER)
        tokenizer = model.save_tokenizer(folder / HF_FOLDER)
        vars(args).update(files.token_ids(folder / HF_FOLDER))
        flags = families.flags(args, args.params_dtype)
        if tokenizer:
            args.tokenizer_type = "HuggingFaceTokenizer"
            args.tokenizer_model = str((out / HF_FOLDER).resolve())  # wherever a run is started
            flags |= {"--tokenizer-type": args.tokenizer_type, "--tokenizer-model": args.tokenizer_model}
        names = {flag.removeprefix("--"): value for flag, value in flags.items()}
        (folder / FLAGS_FILE).write_text(yaml.safe_dump({"MODEL_ARGS": names}, sort_keys=False))
        torch_dist.write(folder, wanted, args, lambda entry: advance(make(entry)))
    return args


def to_hf(
    checkpoint: Path,
    out: Path,
    like: Path | None = None,
    shard_bytes: int = 2 * 2**30,
    progress: bool = False,
) -> Any:
    """Convert a Megatron checkpoint into a safetensors folder.

    Args:
        checkpoint: what Megatron's --load takes, or one iteration's folder in it.
        out: new folder.
        like: folder whose config.json and tokenizer to take over; by default `hf/` in `checkpoint`, or the
            folder it was trained with (its tokenizer, or `hf/` in what it loaded) when that is of the same
            model. Else a config.json is made from the checkpoint's arguments and its tokenizer.
        shard_bytes: largest safetensors file.
        progress: show a progress bar.

    Returns:
        The transformers configuration written.

    Raises:
        ValueError: it is not a torch_dist checkpoint, not a model of the Llama family, or not the one `like`
            describes; or `out` is not empty.
    """
    hf.require_packages("transformers", "safetensors")
    source = torch_dist.Checkpoint(checkpoint)
    args = source.args
    if not getattr(args, "group_query_attention", True):
        args.num_query_groups = args.num_attention_heads
    embedding = source.tensors["embedding.word_embeddings.weight"]
    dtype = embedding.properties.dtype
    # The rows that a training run has: padding depends on its tensor-parallel size.
    args.padded_vocab_size = embedding.size[0]
    own = checkpoint / HF_FOLDER
    like = like or (own if (own / files.CONFIG).is_file() else _described_in(args))
    tokenizer = like or trained_tokenizer(args)
    if like is not None:
        config = hf.read_config(like)
        families.check_like(config, args)
        config.dtype = dtype
    else:
        if tokenizer is not None:
            _set_special_tokens(args, tokenizer)
        config = families.to_hf(args, dtype)
    vocab_size = config.vocab_size
    wanted = list(mapping.entries(args, vocab_size))
    sizes = {
        name: torch.Size(shape).numel() * dtype.itemsize
        for entry in wanted
        for name, shape in zip(entry.names, mapping.hf_shapes(entry, args, vocab_size), strict=True)
    }

    with _new_folder(out) as folder, _bar("to Hugging Face", len(wanted), progress) as advance:

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for entry in wanted:
                parts = mapping.split(entry, advance(source.read(entry)), args, vocab_size)
                yield from zip(entry.names, (part.to(dtype) for part in parts), strict=True)

        config.save_pretrained(folder)
        if tokenizer is not None:
            files.copy(tokenizer, folder)
        hf.write_safetensors(folder, sizes, tensors(), shard_bytes)
    return config


def unknown_vocabulary(checkpoint: Path) -> int | None:
    """The rows of a checkpoint's embedding where it does not say which of them are padding; else None."""
    source = torch_dist.Checkpoint(checkpoint)
    known = getattr(source.args, "vocab_size", None) or not getattr(source.args, "pad_vocab_size", True)
    return None if known else source.tensors["embedding.word_embeddings.weight"].size[0]


def trained_tokenizer(args: Namespace) -> Path | None:
    """The folder of the Hugging Face tokenizer that a checkpoint's arguments name, if it is there."""
    kind, model = (getattr(args, name, None) for name in ("tokenizer_type", "tokenizer_model"))
    there = kind == "HuggingFaceTokenizer" and bool(model) and Path(model).is_dir()
    return Path(model) if there else None


def _described_in(args: Namespace) -> Path | None:
    """The folder, still there, whose config.json describes the model: its tokenizer's, or that of the
    converted checkpoint from which its training began.
    """
    loaded = getattr(args, "load", None)
    for folder in (trained_tokenizer(args), Path(loaded, HF_FOLDER) if loaded else None):
        if folder is None or not (folder / files.CONFIG).is_file():
            continue
        try:
            families.check_like(hf.read_config(folder), args)
        except ValueError:  # another model's
            continue
        return folder
    return None


def _set_special_tokens(args: Namespace, folder: Path) -> None:
    """Set the beginning, end, padding and number of tokens in `args` from the tokenizer in a folder."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    args.vocab_size = len(tokenizer)
    for name, told in files.token_ids(folder).items():
        setattr(args, name, getattr(tokenizer, name) if told is None else told)


def _untie_where_it_differs(model: Any) -> None:
    """Believe the weights where config.json says that embedding and output are one matrix and two differ.

    So does transformers. Two that are equal stay one.
    """
    pair = ("model.embed_tokens.weight", "lm_head.weight")
    if not model.config.tie_word_embeddings or not model.names.issuperset(pair):
        return
    (shape, dtype), other = map(model.describe, pair)
    same = (shape, dtype) == other and torch.equal(*map(model.read, pair))
    model.config.tie_word_embeddings = same


def _check_tensors(model: Any, wanted: list[Entry], args: Namespace, source: Path) -> set[torch.dtype]:
    """The dtypes of a model's tensors. ValueError when they are not those of its config.json."""
    kind, dtypes = model.config.model_type, set()
    used: set[str] = set()
    for entry in wanted:
        for name, shape in zip(entry.names, mapping.hf_shapes(entry, args, args.vocab_size), strict=True):
            if name not in model.names:
                raise ValueError(f"{source} lacks {name}, which a {kind} model of its config.json has.")
            found, dtype = model.describe(name)
            if found != shape:
                raise ValueError(f"{source}: {name} is {list(found)}, config.json says {list(shape)}.")
            if not dtype.is_floating_point or dtype.itemsize < 2:
                raise ValueError(f"{source}: {name} is {dtype}: quantized, without what it was scaled by.")
            dtypes.add(dtype)
            used.add(name)
    ignored = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    extra = sorted(name for name in model.names - used - ignored if not name.endswith(".rotary_emb.inv_freq"))
    if extra:
        raise ValueError(f"{source} has a tensor {extra[0]}, which a {kind} model of its config.json lacks.")
    return dtypes


def _the_only(dtypes: set[torch.dtype], source: Path) -> torch.dtype:
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"{source} holds tensors of several dtypes ({names}); choose one with --dtype.")
    return next(iter(dtypes))


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when the body has succeeded. ValueError if `out` holds anything."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists; give a new or empty folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        yield work
        work.chmod(0o755)
        if out.exists():
            out.rmdir()
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextmanager
def _bar(title: str, total: int, show: bool) -> Iterator[Any]:
    """A function that returns its argument and moves the bar on."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tensors"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not show) as bar:
        task = bar.add_task(title, total=total)

        def advance(value: Any) -> Any:
            bar.advance(task)
            return value

        yield advance
