"""Values for flags of Megatron's argument parser, judged by that parser: in one line, without its usage.

Pure argparse.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any, NoReturn


class _Refused(Exception):
    """What argparse would print below its usage."""


class Parser(argparse.ArgumentParser):
    """A parser that raises its refusals."""

    def error(self, message: str) -> NoReturn:
        raise _Refused(message)


def exit_in_one_line(parser: argparse.ArgumentParser) -> Callable[[str], NoReturn]:
    """A parser's `error` without its usage, which has 700 lines with Megatron's flags."""
    return lambda message: parser.exit(2, f"{parser.prog}: {message}\n")


def refusal(parser: Parser, argv: Iterable[str]) -> str | None:
    """Why the parser does not take all of argv; None when it does."""
    try:
        _, rest = parser.parse_known_args(list(argv))
    except _Refused as error:
        return str(error)
    except Exception as error:  # a flag's own type function, given what it was not written for
        return f"{type(error).__name__}: {error}"
    return f"unrecognized arguments: {' '.join(rest)}" if rest else None


def words(parser: Parser, flag: str, value: Any) -> list[str]:
    """argv for a flag that is true, false, has a value or a list of values. `false` is no word, as a rule.

    Raises:
        ValueError: the flag does not take that value; says what it takes.
    """
    action = parser._option_string_actions[flag]
    if isinstance(action, argparse.BooleanOptionalAction) and value is False:
        positive = flag.removeprefix("--no-")
        return [f"--{positive}" if flag.startswith("--no-") else f"--no-{positive.removeprefix('--')}"]
    if value is False:
        return []
    if value is True and action.nargs in ("?", "*"):
        return [flag]
    if (action.nargs == 0) is not (value is True):
        alone = "is a flag alone: write true, or false to leave it out"
        wanted = alone if action.nargs == 0 else _takes(action)
        raise ValueError(f"{flag} is {_shown(value)}, but it {wanted}")
    if value is True:
        return [flag]
    argv = [flag, *(str(item) for item in (value if isinstance(value, list) else [value]))]
    reason = refusal(parser, argv)
    if reason is not None:
        reason = " ".join(reason.split()).removeprefix(f"argument {'/'.join(action.option_strings)}: ")
        raise ValueError(f"{flag} is {_shown(value)}, but it {_takes(action)} ({reason})")
    return argv


def without(parser: Parser, argv: list[str], flag: str) -> list[str]:
    """argv without the flag, in all its spellings, and the values after it."""
    names = parser._option_string_actions[flag].option_strings
    kept: list[str] = []
    dropping = False
    for word in argv:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in names
        if not dropping:
            kept.append(word)
    return kept


def _takes(action: argparse.Action) -> str:
    """takes one of a, b · takes a number · takes numbers · ..."""
    several = action.nargs in ("*", "+") or (isinstance(action.nargs, int) and action.nargs > 1)
    if action.choices is not None:
        return f"takes {'some' if several else 'one'} of {', '.join(map(str, action.choices))}"
    one, more = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers")}.get(
        action.type, ("a value", "values")
    )
    return f"takes {more if several else one}"


def _shown(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
