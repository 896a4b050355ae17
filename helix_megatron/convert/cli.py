"""The command line of `helix convert`; torch is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_convert(subparsers: Any) -> None:
    """`helix convert`."""
    parser = subparsers.add_parser(
        "convert",
        help="Hugging Face models into Megatron checkpoints, and back",
        description="Converts a model of the Llama family (Llama, Mistral, SmolLM2, Qwen2, Qwen3) exactly, "
        "tensor by tensor. A Megatron checkpoint has no tensor-parallel size: Helix on any grid, and "
        "Megatron at any size it accepts, load it.",
        epilog="helix convert --from hf SmolLM2.gguf --to megatron out; "
        "helix convert --from megatron out --to hf back",
    )
    kinds = ("KIND", "PATH")
    parser.add_argument("--from", dest="source", nargs=2, metavar=kinds, required=True,
                        help="hf FOLDER_OR_GGUF, or megatron CHECKPOINT")  # fmt: skip
    parser.add_argument("--to", dest="target", nargs=2, metavar=kinds, required=True,
                        help="megatron FOLDER, or hf FOLDER; a new one")  # fmt: skip
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the Megatron weights (default: the source's)",
    )
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128, metavar="N",
                        help="pad the Megatron vocabulary to a multiple of N (default 128)")  # fmt: skip
    parser.add_argument("--like", type=Path, metavar="FOLDER",
                        help="Hugging Face folder whose config.json and tokenizer to take over")  # fmt: skip
    parser.add_argument("--max-shard-gib", type=float, default=2.0, metavar="GIB",
                        help="largest safetensors file, also held in memory (default 2)")  # fmt: skip
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    from helix_megatron.convert import command, families

    (kind, source), (target_kind, target) = options.source, options.target
    if options.make_vocab_size_divisible_by < 1:
        raise ValueError(
            f"--make-vocab-size-divisible-by {options.make_vocab_size_divisible_by}: a number from 1."
        )
    if not 0 < options.max_shard_gib < float("inf"):
        raise ValueError(f"--max-shard-gib {options.max_shard_gib}: a number above 0.")
    if (kind, target_kind) == ("hf", "megatron"):
        args = command.to_megatron(
            Path(source), Path(target), options.dtype, options.make_vocab_size_divisible_by, progress=True
        )
        flags = families.flags(args, args.params_dtype)
        shown = " ".join(families.format_flags(families.not_restored(flags)))
        print(f"{target}: load it with --load {target} --helix-config {Path(target) / command.FLAGS_FILE}")
        print(f"or with Megatron's own flags: --load {target} --use-checkpoint-args {shown}")
    elif (kind, target_kind) == ("megatron", "hf"):
        shard_bytes = int(options.max_shard_gib * 2**30)
        config = command.to_hf(Path(source), Path(target), options.like, shard_bytes, progress=True)
        print(f"{target}: a {config.model_type} model, {config.dtype}")
        if config.vocab_size == command.unknown_vocabulary(Path(source)):
            print(
                f"its arguments do not say how many of the {config.vocab_size} rows of the embedding mean a "
                "token; all were written (--like FOLDER, with the model's config.json, leaves out the others)"
            )
    else:
        raise ValueError(
            f"--from {kind} --to {target_kind}: give --from hf … --to megatron …, or the other way round."
        )
    return 0
