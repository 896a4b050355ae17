"""What the text-generation server takes, field by field: all else is refused before Megatron's handlers run.

Megatron 0.19 checks little of a request's body, and what its engine cannot compute (a temperature that makes
a logit infinite, more top log-probabilities than there are tokens) ends the server for everybody. Here are
all fields that a request may have, each with a type and a range that the engine takes. `checked` returns the
body that the handlers see: fields that are null or mean nothing here are left out of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

COMPLETIONS = ("/completions", "/v1/completions")
CHAT = ("/chat/completions", "/v1/chat/completions")
HEALTH = ("/health", "/v1/health")

# fp32, and fp16 with logits up to 655, divide by this without an infinite result.
COLDEST, HOTTEST = 0.01, 1e38
LEAST_TOP_P = 1e-6  # as fp32, smaller ones may be 0, which is all tokens
_MOST_TOKENS = 2**31 - 1  # of an answer; the engine stops at --max-sequence-length
_MOST_LOGPROBS, _MOST_STOPS = 20, 64
_LONGEST_STOP = 1024  # characters; every rank of the engine reads them, while all requests wait
_LEAST_BODY, _MOST_BODY = 2**24, 2**30  # bytes of the largest body; Megatron takes 2^30


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

    @property
    def body(self) -> int:
        """Bytes of the largest body: room for a queue of prompts. It is read while everybody waits."""
        return min(_MOST_BODY, max(_LEAST_BODY, 32 * self.sequence * self.requests))


@dataclass
class RequestOptions:
    """What a request asks for beyond what Megatron's handlers read, and how its answers ended.

    Args:
        stop: texts that end an answer.
        finished: `stop` or `length`, of every answer in order; filled in as they end.
    """

    stop: list[str]
    finished: list[str] = field(default_factory=list)


class Refused(Exception):
    """A request that is not served: HTTP status and why."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in a request's body; every text in it can be written as UTF-8."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:  # ValueError: also bytes, and numbers of 5,000 digits
        raise Refused(400, f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Refused(400, "the body is JSON, but not an object such as {\"prompt\": \"…\"}")
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Refused(400, "a text in the body has half of a surrogate pair: no character") from error
    except RecursionError as error:
        raise Refused(400, "the body is nested too deeply") from error
    return found


# ---- one field ----
@dataclass(frozen=True)
class _Field:
    """A test of a value, and what it must be, in words."""

    fits: Callable[[Any], bool]
    kind: str


def is_int(value: Any) -> bool:
    """A whole number; JSON's true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _count(low: int, high: int) -> _Field:
    return _Field(lambda value: is_int(value) and low <= value <= high, f"a count from {low} to {high}")


def _zero_or(low: float, high: float, zero: str) -> _Field:
    return _Field(
        lambda value: _is_number(value) and (value == 0 or low <= value <= high),
        f"0 ({zero}), or a number from {low:g} to {high:g}",
    )


def _only(*values: Any, why: str = "Megatron's server does nothing else") -> _Field:
    shown = " or ".join(json.dumps(value) for value in values)
    same = lambda value: any(value == one and type(value) is type(one) for one in values)  # noqa: E731
    return _Field(same, f"{shown}, or left out: {why}")


def _are_stops(value: Any) -> bool:
    words = [value] if isinstance(value, str) else value
    return (
        isinstance(words, list)
        and len(words) <= _MOST_STOPS
        and all(isinstance(word, str) and 0 < len(word) <= _LONGEST_STOP for word in words)
    )


_FLAG = _Field(_is_bool, "true or false")
_ANYTHING = _Field(lambda value: True, "")
_STOP = _Field(
    _are_stops, f"a text, or a list of up to {_MOST_STOPS} texts, each of 1 to {_LONGEST_STOP} characters"
)

# Clients send these without meaning anything by them, or they mean nothing to one model on one machine.
_IGNORED = {
    **dict.fromkeys(("model", "user", "metadata", "store", "service_tier", "safety_identifier"), _ANYTHING),
    "prompt_cache_key": _ANYTHING,
    "n": _only(1, why="send the prompt several times"),
    "best_of": _only(1),
    "stream": _only(False, why="'stream' is not supported by Megatron's server"),
    "frequency_penalty": _only(0, 0.0),
    "presence_penalty": _only(0, 0.0),
    "repetition_penalty": _only(1, 1.0),
    "min_p": _only(0, 0.0),
    "logit_bias": _only({}),
    "response_format": _only({"type": "text"}),
    "suffix": _only(""),
    "modalities": _only(["text"]),
}


def _fields(limits: Limits, chat: bool) -> dict[str, _Field]:
    """Every field of an endpoint."""
    both = {
        "temperature": _zero_or(COLDEST, HOTTEST, "greedy"),
        "top_p": _zero_or(LEAST_TOP_P, 1, "all tokens"),
        "top_k": _count(0, limits.vocabulary - 1),
        "max_tokens": _count(1, _MOST_TOKENS),
        "stop": _STOP,
        "ignore_eos": _FLAG,
        "seed": _Field(is_int, "a whole number"),
    }
    logprobs = _count(0, min(_MOST_LOGPROBS, limits.vocabulary))
    if not chat:
        return {**both, "prompt": _ANYTHING, "echo": _FLAG, "logprobs": logprobs}
    return {
        **both,
        "messages": _ANYTHING,
        "tools": _ANYTHING,
        "chat_template_kwargs": _ANYTHING,
        "max_completion_tokens": both["max_tokens"],
        "logprobs": _FLAG,
        "top_logprobs": logprobs,
        "skip_prompt_log_probs": _only(True, why="log-probabilities of the prompt are not computed here"),
        "add_BOS": _FLAG,
        "tool_choice": _only("auto", "none", why="a call cannot be enforced here"),
        "parallel_tool_calls": _FLAG,
        "prevent_retokenization": _FLAG,
        "return_tokenized_data": _FLAG,
        "return_raw_text": _FLAG,
    }


# ---- a body ----
def check_fields(body: dict[str, Any], limits: Limits, chat: bool) -> dict[str, Any]:
    """The fields of a request that mean something, every one of them of a type and range that is served.

    A null is a field left out. `prompt` and `messages` are checked by check_prompts and check_messages.
    """
    fields, kept = _fields(limits, chat), {}
    for name, value in body.items():
        known = fields.get(name) or _IGNORED.get(name)
        if value is None and (known or name == "stream_options"):
            continue
        if known is None:
            raise Refused(
                400, f"{shorten(name)} is no field of this server; it takes {', '.join(sorted(fields))}"
            )
        if not known.fits(value):
            raise Refused(400, f"{name!r} is {shorten(value)}; it must be {known.kind}")
        if name in fields:
            kept[name] = value
    _check_together(kept, chat)
    return kept


def _check_together(body: dict[str, Any], chat: bool) -> None:
    greedy = body.get("temperature") == 0
    if body.get("top_k") and body.get("top_p") != 0 and not greedy:
        raise Refused(400, "'top_k' needs 'top_p': 0 beside it: Megatron does not combine them")
    if "seed" in body and not greedy:
        raise Refused(400, "'seed' is not obeyed: one generator draws for all requests; leave it out")
    if body.get("echo") and "logprobs" in body:
        raise Refused(400, "log-probabilities of the prompt ('echo' with 'logprobs') are not computed here")
    if chat and body.get("top_logprobs") and not body.get("logprobs"):
        raise Refused(400, "'top_logprobs' needs 'logprobs': true beside it")
    both = {body[name] for name in ("max_tokens", "max_completion_tokens") if name in body}
    if len(both) > 1:
        raise Refused(400, "'max_tokens' and 'max_completion_tokens' differ; give one of them")


def stop_texts(body: dict[str, Any]) -> list[str]:
    """The texts that end an answer."""
    stop = body.get("stop", [])
    return [stop] if isinstance(stop, str) else stop


def shorten(value: Any) -> str:
    """A value in an error message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


# ---- prompts ----
def check_tokens(tokens: list[int], what: str, limits: Limits) -> None:
    """Refuse a prompt that the engine cannot take."""
    if not tokens:
        raise Refused(400, f"{what} is empty")
    if len(tokens) >= limits.sequence:
        raise Refused(
            400,
            f"{what} has {len(tokens)} tokens; this server takes {limits.sequence}, answer included "
            "(--max-sequence-length)",
        )
    if not all(0 <= token < limits.vocabulary for token in tokens):
        raise Refused(400, f"{what} has a token outside 0 ... {limits.vocabulary - 1}")


def check_prompts(body: dict[str, Any], limits: Limits, tokenize: Callable[[str], list[int]]) -> int:
    """Number of prompts in a completion request, every one of them fit to be served."""
    given = body.get("prompt")
    if isinstance(given, str) or (isinstance(given, list) and given and all(is_int(t) for t in given)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise Refused(400, "'prompt' is missing or empty; give a text, tokens, or a list of either")
    if len({type(prompt) for prompt in given}) > 1:
        raise Refused(400, "'prompt' mixes texts and tokens; give a list of one kind")
    check_room(len(given), 0, limits)
    for number, prompt in enumerate(given):
        if isinstance(prompt, str):
            tokens = _tokenize(prompt, f"prompt {number}", limits, tokenize)
        elif isinstance(prompt, list) and all(is_int(token) for token in prompt):
            tokens = prompt
        else:
            raise Refused(400, f"prompt {number} is neither a text nor a list of tokens")
        check_tokens(tokens, f"prompt {number}", limits)
    return len(given)


def _tokenize(text: str, what: str, limits: Limits, tokenize: Callable[[str], list[int]]) -> list[int]:
    """The tokens of a prompt; of one that is far too long only the beginning is looked at."""
    start = text[: 16 * limits.sequence]
    tokens = tokenize(start)
    if len(start) == len(text):
        return tokens
    if len(tokens) < 2 * limits.sequence:
        return tokenize(text)
    raise Refused(
        400,
        f"{what} has {len(text)} characters, more than {len(tokens)} tokens; this server takes "
        f"{limits.sequence}, answer included (--max-sequence-length)",
    )


def check_room(prompts: int, waiting: int, limits: Limits) -> None:
    """Refuse what would make the queue too long."""
    if waiting + prompts > limits.requests:
        raise Refused(
            503,
            f"the queue is full: {waiting} prompts are here, this server takes {limits.requests} "
            "(--max-queue); try again later",
        )
