"""`helix serve`: Megatron's own text-generation server, its engine on the ranks of this command.

The engine, its coordinator and the HTTP front end are Megatron's (MegatronAsyncLLM); here are the model they
get, a check of every request (requests.py), and the end: SIGTERM or SIGINT, once, lets the engine finish its
step and leave on all ranks; a second one kills them. Slurm and service managers send it to all processes of a
job at once: the coordinator, and ranks that have stopped serving, ignore it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from helix_megatron.generate import model as models
from helix_megatron.generate.requests import Limits


@dataclass(frozen=True)
class Server:
    """What `helix serve` was asked for.

    Args:
        model: what the user calls it.
        checkpoint: Megatron's, of that model.
        layout: how it is spread.
        host, port: of HTTP.
        sequence: tokens of a prompt and its answer.
        at_once: prompts generated for at the same time; the cache holds that many at full length.
        queue: prompts in the server, those generated for included.
        pid_file: where rank 0 writes the process that a signal should go to.
    """

    model: str
    checkpoint: Path
    layout: models.Layout
    host: str
    port: int
    sequence: int
    at_once: int
    queue: int
    pid_file: Path
    tokenizer: str | None = None
    block_tokens: int | None = None


def refuse_port(host: str, port: int) -> None:
    """ValueError when something listens there: Megatron's server would share the port with it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port."
            ) from error


def rank_serve(terminal: TextIO, server: Server) -> None:
    """What a rank does until the server is told to stop."""
    from megatron.core.inference.apis import MegatronAsyncLLM
    from megatron.core.inference.text_generation_server.dynamic_text_gen_server import endpoints

    from helix_megatron.generate import engine as engines
    from helix_megatron.generate.requests import guard

    model, tokenizer = models.load(server.checkpoint, server.layout, server.tokenizer, server.sequence)
    vocabulary = models.vocabulary(server.checkpoint, tokenizer)
    block = server.block_tokens or engines.default_block_tokens(model.config, server.layout.on_host)
    blocks = server.at_once * -(-server.sequence // block)
    size = engines.CacheSize(block, blocks, server.at_once, server.sequence, max(2048, server.sequence))
    endpoints.__all__.append(guard(Limits(server.sequence, vocabulary, server.queue)))
    default = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # in the coordinator, which starts now
    llm = MegatronAsyncLLM(
        model=model,
        tokenizer=tokenizer,
        inference_config=engines.inference_config(model.config, size),
        coordinator_host=os.environ.get("MASTER_ADDR", "127.0.0.1"),
    )
    engines.stop_at(llm.engine, models.stop_tokens(server.checkpoint, tokenizer, server.tokenizer))
    signal.signal(signal.SIGTERM, default)
    asyncio.run(_serve(llm, server, terminal))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


async def _serve(llm: Any, server: Server, terminal: TextIO) -> None:
    from megatron.core.inference.apis import ServeConfig

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    await llm.serve(ServeConfig(server.host, server.port, frontend_replicas=1), blocking=False)
    for number in (signal.SIGTERM, signal.SIGINT):  # after the front end, a fork, has been started
        loop.add_signal_handler(number, stop.set if llm.is_primary_rank else lambda: None)
    if llm.is_primary_rank:
        server.pid_file.write_text(str(os.getpid()))
        engine_ends = asyncio.create_task(llm.wait_for_shutdown())
        told = asyncio.create_task(stop.wait())
        announced = asyncio.create_task(_announce(server, terminal))
        await asyncio.wait([engine_ends, told], return_when=asyncio.FIRST_COMPLETED)
        announced.cancel()
        if not told.done():
            engine_ends.result()
            raise RuntimeError("Megatron's engine has stopped by itself")
    await llm.shutdown()


async def _announce(server: Server, terminal: TextIO) -> None:
    """Say when the front end answers."""
    while True:
        try:
            _, writer = await asyncio.open_connection(server.host, server.port)
        except OSError:
            await asyncio.sleep(0.1)
            continue
        writer.close()
        address = f"http://{server.host}:{server.port}/v1/completions"
        print(f"{server.model} at {address}", file=terminal, flush=True)
        return


def stop_gently(pid_file: Path) -> None:
    """From now on the first SIGTERM or SIGINT of this process goes to the server, the next one ends it."""

    def told(number: int, frame: Any) -> None:
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signal_number, _end)
        if not pid_file.exists():
            _end(number, frame)
        with contextlib.suppress(ProcessLookupError):  # it has been told by others too
            os.kill(int(pid_file.read_text()), signal.SIGTERM)

    def _end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, told)
