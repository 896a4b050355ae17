"""Around Megatron's HTTP handlers: what they are given is checked, what they answer is put right.

A Quart blueprint, in the process of the front end. Before a handler: the paths and bodies of requests.py.
In between, in place of Megatron's client of the engine: the tokens of each prompt, whoever made them, and the
end of each answer. After it: reasons as JSON, and as many log-probabilities as tokens.

When the engine has failed, rank 0 closes its end of a pipe: requests that wait are answered with an error, so
is everything that comes, `/health` included.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from helix_megatron.generate import requests
from helix_megatron.generate.messages import check_messages
from helix_megatron.generate.requests import CHAT, COMPLETIONS, HEALTH, Limits, Refused, RequestOptions
from helix_megatron.generate.stops import Stops, decoder

GONE = "the engine has failed; the server ends, its output says why"
_LINGER_S = 10.0  # of a front end whose rank 0 is no more


class FrontTokenizer:
    """Megatron's tokenizer as its handlers should see it.

    The chat handler takes every leading BOS away from what the template has written, and never puts it back:
    it does not when there is no BOS.
    """

    bos = None

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    @property
    def eos_id(self) -> int:
        """Megatron's: where the answer ended whose tokens a message has."""
        from quart import g

        if self._tokenizer.eod is None:
            g.refused = Refused(
                400,
                "a message has tokens ('prompt_token_ids') whose end is not known: this tokenizer has "
                "no end of text; leave them out, or send 'prevent_retokenization': false",
            )
            raise g.refused
        return int(self._tokenizer.eod)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's; what fails is the request's fault, which the handler would call its own."""
        from quart import g

        try:
            return self._tokenizer.apply_chat_template(*args, **kwargs)
        except Exception as error:
            g.refused = Refused(400, f"the chat template does not take these messages: {error}")
            raise


class EngineClient:
    """Megatron's client of the engine, for one front end.

    Args:
        client: Megatron's.
        tokenizer: Megatron's.
        limits: of a prompt.
        ends: tokens at which an answer ends.
    """

    def __init__(self, client: Any, tokenizer: Any, limits: Limits, ends: frozenset[int]):
        self._client, self._tokenizer, self._limits, self._ends = client, tokenizer, limits, ends

    @property
    def waiting(self) -> int:
        """Prompts in the engine and its queue."""
        return len(self._client.completion_futures)

    def fail(self) -> None:
        """Answer every request that waits with an error."""
        for future in self._client.completion_futures.values():
            if not future.done():
                future.set_exception(RuntimeError(GONE))

    def add_request(self, tokens: list[int], params: Any) -> asyncio.Future[dict[str, Any]]:
        """Megatron's, of a prompt that the engine can take.

        Raises:
            Refused: it cannot.
        """
        from quart import g

        asked, bos = g.asked, self._tokenizer.bos
        if params.add_BOS and tokens[:1] != [bos] and bos is not None:
            tokens = [bos, *tokens]
        requests.check_tokens(tokens, "the prompt", self._limits)
        requests.check_room(1, self.waiting, self._limits)  # others came while a chat template was written
        params.stop_words = asked.stop or None
        number = len(asked.finished)
        asked.finished.append("length")
        future = self._client.add_request(tokens, params)
        return asyncio.ensure_future(self._ended(future, asked, number))

    async def _ended(self, future: Any, asked: RequestOptions, number: int) -> dict[str, Any]:
        reply = await future
        if reply.get("status") != "FAILED":
            asked.finished[number] = cut_answer(reply, asked.stop, self._ends, self._tokenizer)
        return reply


def cut_answer(reply: dict[str, Any], stop: list[str], ends: frozenset[int], tokenizer: Any) -> str:
    """Let an answer of the engine end before its first stop; why it has ended, `stop` or `length`."""
    tokens, params = reply["generated_tokens"], reply["sampling_params"]
    at_end = bool(tokens) and tokens[-1] in ends and params["termination_id"] in ends
    ended = at_end or len(tokens) < params["num_tokens_to_generate"]
    if at_end:  # Megatron leaves out the tokenizer's own end alone
        reply["generated_text"] = decoder(tokenizer)(tokens[:-1])
    found = Stops.of(stop, tokenizer).cut(tokens, decoder(tokenizer)) if stop else None
    if found is not None:
        kept, reply["generated_text"] = found
        for name in ("generated_tokens", "generated_log_probs", "generated_top_n_logprobs"):
            if reply.get(name):
                reply[name] = reply[name][:kept]
    _keep_chosen(reply, tokenizer)
    reply["log_probs"] = reply.get("generated_log_probs")  # the chat handler asks for it by this name
    return "stop" if found is not None or ended else "length"


def _keep_chosen(reply: dict[str, Any], tokenizer: Any) -> None:
    """Let the chosen token have its text's place among the most likely: several may have that text, as half a
    character, and Megatron keeps the last of them.
    """
    rows = reply.get("generated_top_n_logprobs") or []
    for token, own, row in zip(reply["generated_tokens"], reply["generated_log_probs"] or [], rows):
        text = tokenizer.detokenize([token])
        if text in row:
            row[text] = max(row[text], own)


def complete_answer(document: dict[str, Any], asked: RequestOptions) -> dict[str, Any]:
    """A handler's answer, with the true reason of each end, and as many log-probabilities as tokens."""
    for choice, reason in zip(document["choices"], asked.finished, strict=True):
        choice["finish_reason"] = reason
        logprobs = choice.get("logprobs") or {}
        for name in ("token_logprobs", "top_logprobs"):  # they begin with a None for the token before
            extra = len(logprobs.get(name) or []) - len(logprobs.get("tokens") or [])
            if extra > 0:
                logprobs[name] = logprobs[name][extra:]
    return document


def make_blueprint(limits: Limits, ends: frozenset[int], engine_lives: tuple[int, int]) -> Any:
    """What is registered with Megatron's app.

    Args:
        limits: of requests.
        ends: tokens at which an answer ends.
        engine_lives: the two ends of a pipe; the other one's writing end is rank 0's.
    """
    from quart import Blueprint, current_app, g, jsonify, request

    found = Blueprint("helix_front_end", __name__)
    reading, writing = engine_lives
    failed = asyncio.Event()

    def refusal(refused: Refused) -> tuple[Any, int]:
        return jsonify({"error": {"message": str(refused), "code": refused.status}}), refused.status

    @found.before_app_serving
    async def prepare() -> None:
        config = current_app.config
        client = EngineClient(config["client"], config["tokenizer"], limits, ends)
        config.update(client=client, tokenizer=FrontTokenizer(config["tokenizer"]))
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(reading)
            failed.set()
            client.fail()
            loop.call_later(_LINGER_S, os._exit, 1)

        os.close(writing)
        loop.add_reader(reading, ended)

    @found.before_app_request
    async def check() -> Any:
        if failed.is_set():
            if request.path in HEALTH:
                return jsonify({"status": "error", "details": GONE, "ready": False}), 503
            return refusal(Refused(503, GONE))
        if request.path not in (*COMPLETIONS, *CHAT, *HEALTH):
            paths = ", ".join((COMPLETIONS[1], CHAT[1], HEALTH[0]))
            return refusal(Refused(404, f"there is no {request.path} here; there are {paths}"))
        if request.method != "POST" or request.path in HEALTH:
            return None
        try:
            await _check_body(limits)
        except Refused as refused:
            return refusal(refused)
        return None

    @found.app_errorhandler(Refused)
    async def refuse(refused: Refused) -> Any:
        return refusal(refused)

    @found.after_app_request
    async def correct(response: Any) -> Any:
        refused = g.get("refused")
        if refused is None and response.status_code >= 400 and not response.is_json:
            status = 503 if failed.is_set() else response.status_code
            text = (await response.get_data(as_text=True)).strip()
            refused = Refused(status, response.status if text.startswith("<") else text)
        if refused is not None:
            response = jsonify({"error": {"message": str(refused), "code": refused.status}})
            response.status_code = refused.status
        elif response.status_code == 200 and g.get("asked") is not None:
            document = complete_answer(json.loads(await response.get_data()), g.asked)
            response.set_data(json.dumps(document))
        return response

    return found


async def _check_body(limits: Limits) -> None:
    """Check the body of the current request, and give the handler what is left of it."""
    from quart import current_app, g, request

    client, tokenizer = current_app.config["client"], current_app.config["tokenizer"]
    chat, count = request.path in CHAT, 1
    body = requests.check_fields(requests.parse(await _read_body(limits.body)), limits, chat)
    if not chat:
        count = requests.check_prompts(body, limits, tokenizer.tokenize)
    elif getattr(tokenizer, "chat_template", None) is None:
        raise Refused(400, "this model's tokenizer has no chat template; use /v1/completions")
    else:
        check_messages(body, limits)
    requests.check_room(count, client.waiting, limits)
    g.asked = RequestOptions(requests.stop_texts(body))
    request._cached_json = {False: body, True: body}  # what get_json() gives, whatever the Content-Type


async def _read_body(most: int) -> bytes:
    """The body of the current request; too long a one is read to its end: who still sends hears no answer."""
    from quart import request

    async def read() -> tuple[list[bytes], int]:
        parts, size = [], 0
        async for part in request.body:
            size += len(part)
            if size <= most:
                parts.append(part)
        return parts, size

    try:
        parts, size = await asyncio.wait_for(read(), request.body_timeout)
    except asyncio.TimeoutError as error:
        raise Refused(408, f"the body did not come within {request.body_timeout} s") from error
    if size > most:
        raise Refused(413, f"the body has {size} bytes; this server takes {most}")
    return b"".join(parts)
