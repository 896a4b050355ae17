"""`helix serve`: Megatron's own text-generation server, its engine on the ranks of this command.

The engine, its coordinator and the HTTP front end are Megatron's (MegatronAsyncLLM); here are the model they
get, a check of every request and answer (front_end.py), and the end: SIGTERM or SIGINT, once, lets the engine
finish its step and leave on all ranks; a second one kills them. Slurm and service managers send it to all
processes of a job at once: the coordinator, and ranks that have stopped serving, ignore it. When an engine
fails, the front end says so to whoever waits or asks, and all ranks end.
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
from helix_megatron.generate.graphs import EAGER, Steps
from helix_megatron.generate.requests import Limits

_POLL_S = 0.1
_LAST_WORDS_S = 2.0  # in which the front end says that the engine has failed


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
        steps: how they are run.
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
    steps: Steps = EAGER


def refuse_port(host: str, port: int) -> None:
    """ValueError for what is no IPv4 address of this machine, and when something listens there: Megatron's
    server would share the port with it."""
    if not 0 < port < 2**16:
        raise ValueError(f"--port {port}: give a number from 1 to {2**16 - 1}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except socket.gaierror as error:
            raise ValueError(
                f"--host {host}: {error.strerror}; give an IPv4 address of this machine, or its name."
            ) from error
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port, or --host."
            ) from error


def rank_serve(terminal: TextIO, server: Server) -> None:
    """What a rank does until the server is told to stop."""
    from megatron.core.inference.apis import MegatronAsyncLLM
    from megatron.core.inference.text_generation_server.dynamic_text_gen_server import endpoints

    from helix_megatron.generate import engine as engines
    from helix_megatron.generate import front_end, stops

    model, tokenizer = models.load(server.checkpoint, server.layout, server.tokenizer, server.sequence)
    if os.environ.get("RANK", "0") == "0":
        print(server.steps, file=terminal, flush=True)
    vocabulary = models.vocabulary(server.checkpoint, tokenizer)
    block = server.block_tokens or engines.default_block_tokens(model.config, server.layout.on_host)
    blocks = server.at_once * -(-server.sequence // block)
    size = engines.CacheSize(block, blocks, server.at_once, server.sequence, max(2048, server.sequence))
    lives = os.pipe()
    limits = Limits(server.sequence, vocabulary, server.queue)
    ends = models.stop_tokens(server.checkpoint, tokenizer, server.tokenizer)
    endpoints.__all__.append(front_end.make_blueprint(limits, frozenset(ends), lives))
    default = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # in the coordinator, which starts now
    llm = MegatronAsyncLLM(
        model=model,
        tokenizer=tokenizer,
        inference_config=engines.inference_config(model.config, size),
        coordinator_host=os.environ.get("MASTER_ADDR", "127.0.0.1"),
    )
    engines.end_at_tokens(llm.engine, ends)
    signal.signal(signal.SIGTERM, default)
    stops.end_at_stop_texts(llm.engine, tokenizer)
    asyncio.run(_serve(llm, server, terminal, lives[1]))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


async def _serve(llm: Any, server: Server, terminal: TextIO, life: int) -> None:
    """Serve until told to stop; RuntimeError when the engine has failed.

    Args:
        life: the front end answers while this end of a pipe is open on rank 0.
    """
    from megatron.core.inference.apis import ServeConfig

    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    await llm.serve(ServeConfig(server.host, server.port, frontend_replicas=1), blocking=False)
    for number in (signal.SIGTERM, signal.SIGINT):  # after the front end, a fork, has been started
        loop.add_signal_handler(number, stop.set if llm.is_primary_rank else lambda: None)
    watch = FailureWatch(llm)
    failed = asyncio.create_task(watch.failure())
    if llm.is_primary_rank:
        server.pid_file.write_text(str(os.getpid()))
        announced = asyncio.create_task(_announce(server, terminal))
        await asyncio.wait([failed, asyncio.create_task(stop.wait())], return_when=asyncio.FIRST_COMPLETED)
        announced.cancel()
        watch.told = True
    if not failed.done():
        shutdown = asyncio.create_task(llm.shutdown())  # ranks other than the first wait in it
        await asyncio.wait([failed, shutdown], return_when=asyncio.FIRST_COMPLETED)
        if not failed.done():
            return shutdown.result()
    os.close(life)
    await asyncio.sleep(_LAST_WORDS_S if watch.mine else 2 * _LAST_WORDS_S)  # its own rank shall speak first
    watch.end_children()
    raise RuntimeError(failed.result()) from watch.cause


class FailureWatch:
    """Sees that the engine of some rank, its coordinator or the front end has ended unasked.

    Megatron's loop prints the exception, ends its thread and tells nobody. Ranks tell one another by a key of
    torch.distributed's store: without that, those whose engine waits for a failed one would wait for ever.
    """

    _KEY = "helix_serve/failed"

    def __init__(self, llm: Any):
        from torch.distributed import distributed_c10d

        self._engine, self._primary = llm.engine, llm.is_primary_rank
        self._store = distributed_c10d._get_default_store()
        self.told = False
        self.mine = False
        self.cause: BaseException | None = None

    async def failure(self) -> str:
        """Return when something has failed: what."""
        while True:
            await asyncio.sleep(_POLL_S)
            found = self._engine_failure()
            if found is None and self._child_has_ended():
                await asyncio.sleep(10 * _POLL_S)  # a signal to all processes: this one's comes, too
                found = self._child_has_ended()
            if found is not None:
                self.mine = True
                self._store.set(self._KEY, found)
                return found
            with contextlib.suppress(RuntimeError):  # rank 0, whose store it may be, has left first
                if self._store.check([self._KEY]):
                    return "the server has failed on another rank: " + self._store.get(self._KEY).decode()

    def _engine_failure(self) -> str | None:
        loop = self._engine.engine_loop_task
        if not loop.done() or loop.cancelled() or loop.exception() is None:
            return None
        stop = loop.exception()  # Megatron's SystemExit, raised while the cause was handled
        self.cause = stop.__context__ or stop
        return f"the engine has failed: {type(self.cause).__name__}: {self.cause}"

    def _child_has_ended(self) -> str | None:
        if not self._primary or self.told:
            return None
        if not self._engine.inference_coordinator_process.is_alive():
            return "the engine's coordinator has ended"
        if not all(process.is_alive() for process in _front_ends()):
            return "the HTTP front end has ended"
        return None

    def end_children(self) -> None:
        """Kill what this rank has started."""
        if self._primary:
            for process in (self._engine.inference_coordinator_process, *_front_ends()):
                process.kill()
                process.join()


def _front_ends() -> list[Any]:
    from megatron.core.inference.text_generation_server.dynamic_text_gen_server import text_generation_server

    return text_generation_server._SERVER_PROCESSES


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


def stop_on_signals(pid_file: Path) -> None:
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
