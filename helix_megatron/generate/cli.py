"""The command lines of `helix generate` and `helix serve`; torch is imported when they run."""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any


def _add_model(parser: argparse.ArgumentParser) -> None:
    """What both commands ask of a model and its ranks."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="PATH",
        help="Hugging Face folder, .gguf file, or Megatron torch_dist checkpoint")  # fmt: skip
    add("--tensor-model-parallel-size", type=int, default=1, metavar="T", help="number of ranks (default 1)")
    add("--attention-impl", choices=["helix", "megatron"], default="helix",
        help="megatron: vanilla, for comparison")  # fmt: skip
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="of weights and cache (auto: float32 on the host, bfloat16 on GPUs)")  # fmt: skip
    add("--tokenizer", metavar="FOLDER", help="Hugging Face tokenizer, of a checkpoint that brings none")
    add("--cache-dir", type=Path, metavar="FOLDER",
        help="where converted models are kept (default: the user's cache folder)")  # fmt: skip
    add("--kv-block-size", type=int, metavar="TOKENS",
        help="tokens of a block of the paged cache; a multiple of the slices m")  # fmt: skip
    add("--cuda-graph-impl", choices=["none", "local"],
        help="local: steps are replayed from CUDA graphs, which Megatron's engine captures when it starts "
        "(default: on GPUs wherever that works, which is said)")  # fmt: skip
    add("--inference-dynamic-batching-num-cuda-graphs", type=int, metavar="N",
        help="sizes of a step that graphs are captured of; -1: as many as Megatron likes")  # fmt: skip
    add("--megatron-args", default="", metavar="'FLAGS'",
        help="further flags of Megatron and Helix, in one string")  # fmt: skip


def _layout(options: argparse.Namespace) -> tuple[Any, str | None]:
    """How the model is spread, and the --cuda-graph-impl that was asked for."""
    from helix_megatron.generate import graphs, ranks
    from helix_megatron.generate.model import Layout

    size = options.tensor_model_parallel_size
    if size < 1:
        raise ValueError(f"--tensor-model-parallel-size {size}: at least one rank is needed.")
    if options.kv_block_size is not None and options.kv_block_size < 1:
        raise ValueError(f"--kv-block-size {options.kv_block_size}: a block holds at least one token.")
    host = ranks.on_host()
    dtype = ("float32" if host else "bfloat16") if options.dtype == "auto" else options.dtype
    more = _megatron_args(options.megatron_args)
    graphs.refuse_unread_flags(more)
    asked = graphs.asked_for(options.cuda_graph_impl, more, host)
    return Layout(size, options.attention_impl, dtype, host, more), asked


def _megatron_args(text: str) -> tuple[str, ...]:
    """The words of --megatron-args. ValueError for what is no flag and value of Megatron or Helix."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--megatron-args {text!r}: {error}.") from error
    if words:
        from helix_megatron.megatron import arguments, yaml_config

        parser = yaml_config.megatron_parser()
        if "--attention-impl" not in yaml_config.known_flags(parser):  # not installed in this process
            arguments.add_helix_arguments(parser)
        yaml_config.check_flags(words, parser)
    return tuple(words)


def _with_steps(
    options: argparse.Namespace, layout: Any, asked: str | None, checkpoint: Path, decode_only: bool
) -> tuple[Any, Any]:
    """The layout with the flags of its steps, and how they are run."""
    from helix_megatron.generate import graphs
    from helix_megatron.generate.model import Checkpoint

    steps = graphs.choose_steps(asked, layout, Checkpoint(checkpoint).args)
    flags = steps.flags(options.inference_dynamic_batching_num_cuda_graphs, decode_only)
    return replace(layout, more=(*layout.more, *flags)), steps


def add_generate(subparsers: Any) -> None:
    """`helix generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="text from a model on any number of ranks, with times and KV bytes",
        description="Generates with Megatron's dynamic inference engine. Without a GPU it starts the ranks "
        "itself, as processes of this machine; with GPUs start it with torchrun: torchrun --nproc-per-node 8 "
        "-m helix_megatron.cli generate …",
        epilog='helix generate --model SmolLM2.gguf --tensor-model-parallel-size 8 "Once upon a time"',
    )
    _add_model(parser)
    add = parser.add_argument
    add("prompt", nargs="*", metavar="PROMPT", help="text to go on from, in quotes")
    add(
        "--prompts-file",
        type=Path,
        metavar="FILE",
        help='one prompt a line; .jsonl: strings or {"prompt": …}',
    )
    add("--max-new-tokens", type=int, default=64, metavar="N", help="of each answer (default 64)")
    add("--max-batch-size", type=int, default=64, metavar="N", help="prompts at once (default 64)")
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-k", type=int, default=0, metavar="K", help="choose among the K most likely tokens")
    add("--top-p", type=float, default=0.0, metavar="P", help="choose among those that have probability P")
    add("--seed", type=int, default=42, help="of the draws (default 42)")
    add("--ignore-eos", action="store_true", help="go on after an end of text")
    add("--json", action="store_true", help="print one JSON document, and no text as it comes")
    parser.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    from helix_megatron.generate import ranks

    ranks.silence_warnings()
    from helix_megatron.generate import generate, model
    from helix_megatron.generate.generate import Job, Sampling
    from helix_megatron.generate.model import Checkpoint, default_cache, open_tokenizer, prepare_checkpoint
    from helix_megatron.generate.prompts import read_prompts, refuse_too_long, refuse_vocabulary

    for name in ("max_new_tokens", "max_batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1 is needed.")
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    prompts = read_prompts(options.prompt, options.prompts_file)
    layout, asked = _layout(options)
    checkpoint = prepare_checkpoint(options.model, layout.dtype, options.cache_dir or default_cache())
    tokenizer = open_tokenizer(checkpoint, options.tokenizer, options.model)
    tokens = [tokenizer.tokenize(prompt) for prompt in prompts]
    refuse_vocabulary(tokens, options.top_k, model.vocabulary(checkpoint, tokenizer))
    limit = Checkpoint(checkpoint).args.max_position_embeddings
    refuse_too_long(tokens, options.max_new_tokens, limit)
    # prompts start together: their steps have sizes that do not come again
    layout, steps = _with_steps(options, layout, asked, checkpoint, decode_only=True)
    job = Job(
        model=str(options.model),
        checkpoint=checkpoint,
        layout=layout,
        prompts=prompts,
        tokens=tokens,
        new_tokens=options.max_new_tokens,
        sampling=sampling,
        tokenizer=options.tokenizer,
        ignore_eos=options.ignore_eos,
        at_once=options.max_batch_size,
        block_tokens=options.kv_block_size,
        as_json=options.json,
        steps=steps,
    )
    return ranks.run(generate.rank_generate, layout.tensor_parallel, layout.on_host, job)


def add_serve(subparsers: Any) -> None:
    """`helix serve`."""
    parser = subparsers.add_parser(
        "serve",
        help="Megatron's text-generation server on any number of ranks",
        description="Starts Megatron's own HTTP server (/v1/completions, /v1/chat/completions, /health) over "
        "its dynamic engine. Without a GPU it starts the ranks itself; with GPUs start it with torchrun. "
        "SIGTERM or Ctrl-C stops it cleanly, a second one at once.",
        epilog="helix serve --model SmolLM2.gguf --tensor-model-parallel-size 4 --port 5000",
    )
    _add_model(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    add("--port", type=int, default=5000, help="default 5000")
    add("--max-sequence-length", type=int, default=2048, metavar="TOKENS", help="prompt and answer (2048)")
    add("--max-batch-size", type=int, default=16, metavar="N", help="prompts generated for at once (16)")
    add("--max-queue", type=int, default=256, metavar="N",
        help="prompts in the server, those generated for included; more are refused (256)")  # fmt: skip
    add("--decode-only-cuda-graphs", action="store_true",
        help="capture steps without prompts alone: an earlier start")  # fmt: skip
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    import tempfile

    from helix_megatron.convert.hf import require_packages
    from helix_megatron.generate import ranks, serve
    from helix_megatron.generate.model import Checkpoint, default_cache, open_tokenizer, prepare_checkpoint

    ranks.silence_warnings()
    require_packages("zmq", "msgpack", "quart", "hypercorn")
    for name in ("max_sequence_length", "max_batch_size", "max_queue"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1 is needed.")
    if os.environ.get("RANK", "0") == "0":  # the rank that will listen
        serve.refuse_port(options.host, options.port)
    layout, asked = _layout(options)
    checkpoint = prepare_checkpoint(options.model, layout.dtype, options.cache_dir or default_cache())
    open_tokenizer(checkpoint, options.tokenizer, options.model)
    limit = Checkpoint(checkpoint).args.max_position_embeddings
    if options.max_sequence_length > limit:
        raise ValueError(
            f"--max-sequence-length {options.max_sequence_length}: this model knows {limit} positions."
        )
    layout, steps = _with_steps(options, layout, asked, checkpoint, options.decode_only_cuda_graphs)
    with tempfile.TemporaryDirectory(prefix="helix-serve-") as folder:
        server = serve.Server(
            model=str(options.model),
            checkpoint=checkpoint,
            layout=layout,
            host=options.host,
            port=options.port,
            sequence=options.max_sequence_length,
            at_once=options.max_batch_size,
            queue=options.max_queue,
            pid_file=Path(folder, "pid"),
            tokenizer=options.tokenizer,
            block_tokens=options.kv_block_size,
            steps=steps,
        )
        if not ranks.under_torchrun():
            serve.stop_on_signals(server.pid_file)
        return ranks.run(serve.rank_serve, layout.tensor_parallel, layout.on_host, server)
