"""What of a chat request is refused before Megatron sees it: messages, tools, template variables."""

from __future__ import annotations

import inspect
import json
from typing import Any

from helix_megatron.generate.requests import Limits, Refused, is_int, shorten


def check_messages(body: dict[str, Any], limits: Limits) -> None:
    """Refuse messages and tools that Megatron's handler would drop in part, or fail on.

    Whether a role is known, and in which order, is the chat template's to say; so are further keys.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "'messages' is missing or empty; give a list of {\"role\": …, \"content\": …}")
    for number, message in enumerate(messages):
        _check_message(message, f"message {number}", limits)
    tools = body.get("tools", [])
    if not isinstance(tools, list):
        raise Refused(400, f"'tools' is {shorten(tools)}; it must be a list")
    for number, tool in enumerate(tools):
        _check_function(tool, f"tool {number}", "parameters", (dict,))
    _check_template_variables(body.get("chat_template_kwargs", {}))


def _check_message(message: Any, what: str, limits: Limits) -> None:
    if not isinstance(message, dict):
        raise Refused(400, f"{what} is {shorten(message)}; it must be an object with 'role' and 'content'")
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise Refused(400, f"{what} has no 'role'; give system, user, assistant or tool")
    content = message.get("content")
    for part in content if isinstance(content, list) else []:
        given = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(given, str):
            raise Refused(
                400, f"{what} has a part {shorten(part)}; this model reads parts of type text alone"
            )
    if not isinstance(content, str | list | None):
        raise Refused(400, f"{what} has the content {shorten(content)}; it must be a text or a list of texts")
    if "content" not in message and not message.get("tool_calls"):
        raise Refused(400, f"{what} has no 'content'")
    calls = message.get("tool_calls")
    if not isinstance(calls, list | None):
        raise Refused(400, f"{what} has the tool_calls {shorten(calls)}; they must be a list")
    for number, call in enumerate(calls or []):
        _check_function(call, f"tool call {number} of {what}", "arguments", (dict, str))
    for name in ("prompt_token_ids", "generation_token_ids"):
        ids = message.get(name)
        if not isinstance(ids, list | None) or not all(map(is_int, ids or [])):
            raise Refused(400, f"{what} has a {name} that is no list of tokens")
        if not all(0 <= token < limits.vocabulary for token in ids or []):
            raise Refused(400, f"{what} has a token outside 0 ... {limits.vocabulary - 1} in {name}")


def _check_function(entry: Any, what: str, name: str, kinds: tuple[type, ...]) -> None:
    """A tool, or a call of one: `entry` has a function with a name, and `name` is an object."""
    function = entry.get("function") if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(
            400, f"{what} is {shorten(entry)}; it must be an object with a 'function' and its 'name'"
        )
    given = function.get(name)
    found = given
    if isinstance(given, str) and str in kinds:
        try:
            found = json.loads(given or "{}")
        except (ValueError, RecursionError):
            found = None
    if given is not None and not isinstance(found, dict):
        raise Refused(400, f"{what} has the {name} {shorten(given)}; they must be a JSON object")


def _check_template_variables(given: Any) -> None:
    if not isinstance(given, dict):
        raise Refused(400, f"'chat_template_kwargs' is {shorten(given)}; it must be an object")
    for name in given:
        if name in _template_parameters():
            raise Refused(
                400,
                f"{name!r} in 'chat_template_kwargs' is not a variable of the template; the server sets it",
            )


def _template_parameters() -> set[str]:
    """What transformers' apply_chat_template takes for itself, and what it gives to the template."""
    from transformers import PreTrainedTokenizerBase

    own = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    return (own | {"messages"}) - {"documents", "kwargs"}
