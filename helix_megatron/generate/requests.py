"""What the text-generation server refuses before Megatron's handlers see it, one request at a time.

Megatron 0.19 checks little of a request's body: an empty prompt in a list, a token outside the vocabulary,
`top_k` beside its default `top_p`, or prompt log-probabilities raise inside the engine's loop, which ends the
server for everybody; and nothing bounds its queue.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

COMPLETIONS = ("/completions", "/v1/completions")
CHAT = ("/chat/completions", "/v1/chat/completions")


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        sequence: tokens of a prompt and its answer.
        vocabulary: tokens are 0 ... vocabulary - 1.
        requests: prompts in the engine and its queue at once.
    """

    sequence: int
    vocabulary: int
    requests: int


class Refused(Exception):
    """A request that is not served: HTTP status and why."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body."""
    try:
        found = json.loads(body)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused(400, "the body is JSON, but not an object such as {\"prompt\": \"…\"}")
    return found


def prompts_of(body: dict[str, Any], limits: Limits, tokenize: Callable[[str], list[int]]) -> int:
    """Number of prompts in a completion request, every one of them fit to be served."""
    given = body.get("prompt")
    if isinstance(given, str) or (isinstance(given, list) and given and all(_is_int(t) for t in given)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise Refused(400, "'prompt' is missing or empty; give a text, tokens, or a list of either")
    if len({type(prompt) for prompt in given}) > 1:
        raise Refused(400, "'prompt' mixes texts and tokens; give a list of one kind")
    for number, prompt in enumerate(given):
        if isinstance(prompt, str):
            tokens = tokenize(prompt)
        elif isinstance(prompt, list) and all(_is_int(token) for token in prompt):
            tokens = prompt
        else:
            raise Refused(400, f"prompt {number} is neither a text nor a list of tokens")
        if not tokens:
            raise Refused(400, f"prompt {number} is empty")
        if not all(0 <= token < limits.vocabulary for token in tokens):
            raise Refused(400, f"prompt {number} has a token outside 0 ... {limits.vocabulary - 1}")
        if len(tokens) >= limits.sequence:
            raise Refused(
                400,
                f"prompt {number} has {len(tokens)} tokens; this server takes {limits.sequence}, answer "
                "included (--max-sequence-length)",
            )
    return len(given)


def check_sampling(body: dict[str, Any], limits: Limits) -> None:
    """Refuse settings that Megatron's engine has no answer to."""

    def number(name: str, kind: str, fits: Callable[[Any], bool]) -> Any:
        value = body.get(name)
        if value is None and name not in body:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
            raise Refused(400, f"{name!r} is {json.dumps(value)}; it must be {kind}")
        return value

    number("temperature", "a number from 0", lambda value: 0 <= value < float("inf"))
    top_p = number("top_p", "a number from 0 to 1", lambda value: 0 <= value <= 1)
    top_k = number("top_k", "a count", lambda value: _is_int(value) and 0 <= value < limits.vocabulary)
    for name in ("max_tokens", "max_completion_tokens"):
        number(name, "a count from 1", lambda value: _is_int(value) and value >= 1)
    if top_k and top_p != 0 and body.get("temperature") != 0:
        raise Refused(400, "'top_k' needs 'top_p': 0 beside it: Megatron does not combine them")
    if body.get("stream"):
        raise Refused(400, "'stream' is not supported by Megatron's server; leave it out")
    if body.get("n", 1) != 1:
        raise Refused(400, "'n' other than 1 is not supported; send the prompt several times")
    if body.get("echo") and body.get("logprobs") is not None:
        raise Refused(400, "log-probabilities of the prompt ('echo' with 'logprobs') are not computed here")
    logprobs = body.get("logprobs")
    if not (logprobs is None or isinstance(logprobs, bool) or (_is_int(logprobs) and 0 <= logprobs <= 20)):
        raise Refused(400, "'logprobs' must be a count up to 20")
    stop = body.get("stop")
    words = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise Refused(400, "'stop' must be a text or a list of texts, none of them empty")


def check_room(prompts: int, waiting: int, limits: Limits) -> None:
    """Refuse what would make the queue too long."""
    if waiting + prompts > limits.requests:
        raise Refused(
            503,
            f"the queue is full: {waiting} prompts are here, this server takes {limits.requests} "
            "(--max-queue); try again later",
        )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def guard(limits: Limits) -> Any:
    """A Quart blueprint that checks every request of the app it is registered with."""
    from quart import Blueprint, current_app, jsonify, request

    blueprint = Blueprint("helix_guard", __name__)

    @blueprint.before_app_request
    async def check() -> Any:
        if request.method != "POST" or request.path not in (*COMPLETIONS, *CHAT):
            return None
        try:
            body, tokenizer = parse(await request.get_data()), current_app.config["tokenizer"]
            count = 1
            if request.path in COMPLETIONS:
                count = prompts_of(body, limits, tokenizer.tokenize)
            elif not isinstance(body.get("messages"), list) or not body["messages"]:
                raise Refused(400, "'messages' is missing or empty")
            elif getattr(tokenizer, "chat_template", None) is None:
                raise Refused(400, "this model's tokenizer has no chat template; use /v1/completions")
            check_sampling(body, limits)
            check_room(count, len(current_app.config["client"].completion_futures), limits)
        except Refused as refused:
            error = {"message": str(refused), "code": refused.status}
            return jsonify({"error": error}), refused.status
        return None

    return blueprint
