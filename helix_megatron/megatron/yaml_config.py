"""A training run as a YAML file: Megatron's own flags, environment variables, and `host`.

    MODEL_ARGS:                          # names exactly as Megatron's flags, with or without `--`
      num-layers: 16                     # a value           → --num-layers 16
      sequence-parallel: true            # true              → --sequence-parallel
      use-distributed-optimizer: false   # false             → nothing
      data-path: [0.3, books, 0.7, web]  # a list            → --data-path 0.3 books 0.7 web
    ENV_VARS:
      CUDA_DEVICE_MAX_CONNECTIONS: 1
    host: true                           # run on the CPU: the same as --helix-host-mode

Both entry points take it as `--helix-config FILE.yaml`. Its flags stand where that flag stood, so flags
after it on the command line override it. An unknown key or flag is refused with the nearest real one.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CONFIG_FLAG = "--helix-config"
HOST_FLAG = "--helix-host-mode"


@dataclass(frozen=True)
class RunConfig:
    """What a YAML file says."""

    model_args: dict[str, Any] = field(default_factory=dict)
    """Flag name with its dashes → value, in the file's order."""
    env_vars: dict[str, str] = field(default_factory=dict)
    """Environment variables to set before Megatron is imported."""
    host: bool = False
    """Whether to run on the CPU."""


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known name nearest to `name`, or '' when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. ValueError, in one line, when there is none."""
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds {type(document).__name__}, not a mapping of keys such as MODEL_ARGS.")
    return document


def check_keys(mapping: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """ValueError naming the first unknown key of `mapping`, and the nearest known one."""
    known = list(known)
    for key in mapping:
        if key not in known:
            raise ValueError(
                f"{where}: unknown key {key!r}{nearest(str(key), known)} Known keys: {', '.join(known)}."
            )


def model_args(mapping: Any, where: str) -> dict[str, Any]:
    """Normalise MODEL_ARGS to `--name` → value. ValueError for what cannot become flags."""
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise ValueError(f"{where}: expected a mapping of flags, got {type(mapping).__name__}.")
    normal: dict[str, Any] = {}
    for key, value in mapping.items():
        flag = "--" + str(key).removeprefix("--")
        if flag in normal:
            raise ValueError(f"{where}: {flag} is given twice, with and without its dashes; keep one.")
        items = value if isinstance(value, list) else [value]
        if any(item is None or isinstance(item, dict | list) for item in items):
            raise ValueError(
                f"{where}: {flag} has the value {value!r}; write true for a flag alone, false to leave it "
                "out, one value, or a list of values."
            )
        normal[flag] = value
    return normal


def env_vars(mapping: Any, where: str) -> dict[str, str]:
    """ENV_VARS as strings. ValueError for booleans (write 1 or 0) and nested values."""
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise ValueError(f"{where}: expected a mapping of variables, got {type(mapping).__name__}.")
    for key, value in mapping.items():
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(
                f"{where}: {key} has the value {value!r}; write a number or a string (1 or 0 for yes or no)."
            )
    return {str(key): str(value) for key, value in mapping.items()}


def load(path: str | Path) -> RunConfig:
    """Read and check FILE.yaml, flag names apart: `to_argv` checks those against Megatron's parser."""
    document = read_yaml(path)
    check_keys(document, ("MODEL_ARGS", "ENV_VARS", "host"), str(path))
    host = document.get("host", False)
    if not isinstance(host, bool):
        raise ValueError(f"{path}: host is {host!r}; it is true (run on the CPU) or false.")
    return RunConfig(
        model_args(document.get("MODEL_ARGS"), f"{path}: MODEL_ARGS"),
        env_vars(document.get("ENV_VARS"), f"{path}: ENV_VARS"),
        host,
    )


def known_flags() -> list[str]:
    """Every long flag of Megatron's own parser, and ours once `integrate.install()` has run."""
    from megatron.training import arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_megatron_arguments(parser)
    return [flag for flag in parser._option_string_actions if flag.startswith("--")]


def check_flags(argv: Iterable[str]) -> None:
    """ValueError naming the first `--flag` in argv that the parser does not know, and the nearest it does."""
    known = known_flags()
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            raise ValueError(f"Megatron has no flag {flag}{nearest(flag, known) or '.'}")


def to_argv(arguments: Mapping[str, Any], where: str, known: Iterable[str] | None = None) -> list[str]:
    """Flags (as `model_args` returns them) → argv. ValueError for a flag that is not in `known`."""
    known = known_flags() if known is None else list(known)
    argv: list[str] = []
    for flag, value in arguments.items():
        if flag not in known:
            raise ValueError(f"{where}: Megatron has no flag {flag}{nearest(flag, known) or '.'}")
        if value is True:
            argv.append(flag)
        elif value is not False:
            argv += [flag, *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return argv


def split(argv: list[str]) -> tuple[list[str], list[tuple[int, RunConfig, str]]]:
    """Take every `--helix-config FILE` out of argv: the rest, and (position in it, config, path) of each."""
    rest: list[str] = []
    found: list[tuple[int, RunConfig, str]] = []
    remaining = iter(argv)
    for word in remaining:
        name, equals, path = word.partition("=")
        if name != CONFIG_FLAG:
            rest.append(word)
            continue
        path = path if equals else next(remaining, "")
        if not path:
            raise ValueError(f"{CONFIG_FLAG} needs the path of a YAML file after it.")
        found.append((len(rest), load(path), path))
    return rest, found


def wants_host(rest: list[str], found: list[tuple[int, RunConfig, str]]) -> bool:
    """Whether the command line or one of its files asks for host mode."""
    return HOST_FLAG in rest or any(
        config.host or config.model_args.get(HOST_FLAG) is True for _, config, _ in found
    )


def join(rest: list[str], found: list[tuple[int, RunConfig, str]]) -> list[str]:
    """The inverse of `split`: argv with every file's flags where `--helix-config FILE` stood.

    Call `integrate.install()` first: the flags are checked against Megatron's parser as it then is.
    """
    argv = list(rest)
    known = known_flags() if found else []
    for position, config, path in reversed(found):
        host = [HOST_FLAG] if config.host else []
        argv[position:position] = to_argv(config.model_args, f"{path}: MODEL_ARGS", known) + host
    return argv
