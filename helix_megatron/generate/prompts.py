"""Prompts of a command line or a file, and text that streams as tokens come."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of a file.

    Args:
        given: from the command line.
        file: UTF-8, one prompt a line, empty lines aside; in a .jsonl file a line is a JSON string or an
            object with `prompt`. A line ends at \\n or \\r\\n and nowhere else.

    Raises:
        ValueError: there is no prompt, one is empty, or the file cannot be read.
    """
    prompts = list(given)
    if file is not None:
        try:
            text = file.read_bytes().decode("utf-8-sig")  # without a byte-order mark
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read --prompts-file {file}: {error}.") from error
        as_json = file.suffix.lower() == ".jsonl"
        for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
            if line.strip():
                prompts.append(_json_prompt(line, f"{file}:{number}") if as_json else line)
    if not prompts:
        raise ValueError(
            'there is no prompt; give one in quotes ("Once upon a time") or --prompts-file FILE.'
        )
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; a model needs at least one token to go on from.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt {number} is not text: {error.reason}; give UTF-8.") from error
    return prompts


def _json_prompt(line: str, where: str) -> str:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if [name for name, _ in pairs].count("prompt") > 1:
            raise ValueError(f"{where} has two of `prompt`; give each a line of its own.")
        return dict(pairs)

    try:
        found = json.loads(line, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    found = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(found, str):
        raise ValueError(f"{where} is neither a JSON string nor an object with a string `prompt`.")
    return found


def refuse_vocabulary(prompts: list[list[int]], top_k: int, vocabulary: int) -> None:
    """ValueError for a prompt with a token that the model has not, or for more top tokens than it has."""
    if top_k >= vocabulary:
        raise ValueError(f"--top-k {top_k}: this model has {vocabulary} tokens; give fewer, or 0 for all.")
    for number, tokens in enumerate(prompts):
        if tokens and not 0 <= max(tokens) < vocabulary:
            raise ValueError(
                f"prompt {number} has token {max(tokens)}, this model has {vocabulary}: the tokenizer is "
                "another model's (--tokenizer)."
            )


def refuse_too_long(prompts: list[list[int]], new_tokens: int, limit: int) -> None:
    """ValueError for the first prompt of no token, or one that leaves no room in the model's positions.

    Args:
        prompts: their tokens.
        new_tokens: of each answer.
        limit: positions that the model knows.
    """
    for number, tokens in enumerate(prompts):
        if not tokens:
            raise ValueError(f"prompt {number} has no tokens; a model needs one to go on from.")
        if len(tokens) + new_tokens > limit:
            raise ValueError(
                f"prompt {number} has {len(tokens)} tokens, with --max-new-tokens {new_tokens} more than the "
                f"{limit} positions this model knows; shorten the prompt or generate fewer."
            )


class TextStream:
    """The text of tokens as they come: what is printed is never taken back.

    A character may take several tokens, and a tokenizer may write a token with or without a space before it
    depending on its neighbours. So text is decoded from the last place where it was complete, with the tokens
    before as context, and held back while it ends in half a character.

    Args:
        decode: the text of a list of tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str]):
        self._decode = decode
        self._tokens: list[int] = []
        self._context = self._shown = 0  # tokens[context:shown] have been printed, and are decoded along

    def push(self, token: int) -> str:
        """The text that is complete with this token, often ''."""
        self._tokens.append(token)
        return self._rest(final=False)

    def close(self) -> str:
        """What was held back."""
        return self._rest(final=True)

    def _rest(self, final: bool) -> str:
        before = self._decode(self._tokens[self._context : self._shown])
        after = self._decode(self._tokens[self._context :])
        if len(after) <= len(before) or (after.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return ""
        self._context, self._shown = self._shown, len(self._tokens)
        return after[len(before) :]
