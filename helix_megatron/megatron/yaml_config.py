"""A training run as a YAML file: Megatron's own flags, environment variables, and `host`.

    MODEL_ARGS:                          # names exactly as Megatron's flags, with or without `--`
      num-layers: 16                     # a value           → --num-layers 16
      sequence-parallel: true            # true              → --sequence-parallel
      use-distributed-optimizer: false   # false             → nothing
      data-path: [0.3, books, 0.7, web]  # a list            → --data-path 0.3 books 0.7 web
    ENV_VARS:
      CUDA_DEVICE_MAX_CONNECTIONS: 1
    host: true                           # run on the CPU: the same as --helix-host-mode

Both entry points take it as `--helix-config FILE.yaml`. Its flags stand where that flag stood: what comes
later, on the command line or in another file, overrides what came before, and `false` leaves out what came
before. A key given twice is refused, an unknown one with the nearest real one, a value that its flag does not
take with what it takes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from helix_megatron.megatron import flag_values

CONFIG_FLAG = "--helix-config"
HOST_FLAG = "--helix-host-mode"


@dataclass(frozen=True)
class RunConfig:
    """What a YAML file says."""

    model_args: dict[str, Any] = field(default_factory=dict)
    """Flag name with its dashes → value, in the file's order."""
    env_vars: dict[str, str] = field(default_factory=dict)
    """Environment variables to set before Megatron is imported."""
    host: bool | None = None
    """Whether to run on the CPU; None: not said."""


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the known name nearest to `name`, or '' when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Safe YAML, in which no mapping has a key twice, and 022, 22:30 and 2024-01-01 are what they look like.

    To YAML 1.1 they are 18 in octal, 1,350 in base 60, and a date.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:  # those of << are defaults, which the mapping's own override
            merged, line = key_node.tag == f"{_TAG}merge", key_node.start_mark.line + 1
            key = "<<" if merged else self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in lines:
                raise _GivenTwice(f"{key!r} is given twice, on lines {lines[key]} and {line}; keep one")
            lines[key] = line
        return super().construct_mapping(node, deep)


_NUMBERS = {
    f"{_TAG}int": re.compile("[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"),
    f"{_TAG}float": re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, _NUMBERS.get(tag, expression)) for tag, expression in found if tag != f"{_TAG}timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _GivenTwice(ValueError):
    """Two values of one key."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. ValueError, in one line, when there is none."""
    try:
        document = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    except _GivenTwice as error:
        raise ValueError(f"{path}: {error}.") from error
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
            close = nearest(str(key), known) or "."
            raise ValueError(f"{where}: unknown key {key!r}{close} Known keys: {', '.join(known)}.")


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
        fine = [isinstance(item, str | int | float) and not isinstance(item, bool) for item in items]
        if not isinstance(value, bool) and not all(fine):
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
        if isinstance(key, bool):
            raise ValueError(f"{where}: a key is {key}, as YAML reads on, off, yes, no; write it in quotes.")
        if not str(key) or set("=\0") & set(str(key)) or "\0" in str(value):
            raise ValueError(f"{where}: {key!r} = {value!r} can be no variable of an environment.")
    return {str(key): str(value) for key, value in mapping.items()}


def load(path: str | Path) -> RunConfig:
    """Read and check FILE.yaml, flag names apart: `to_argv` checks those against Megatron's parser."""
    document = read_yaml(path)
    check_keys(document, ("MODEL_ARGS", "ENV_VARS", "host"), str(path))
    host = document.get("host")
    if not isinstance(host, bool) and "host" in document:
        raise ValueError(f"{path}: host is {host!r}; it is true (run on the CPU) or false.")
    arguments = model_args(document.get("MODEL_ARGS"), f"{path}: MODEL_ARGS")
    if host is not None and HOST_FLAG in arguments:
        raise ValueError(f"{path}: host and {HOST_FLAG} are the same setting; keep one.")
    return RunConfig(
        arguments,
        env_vars(document.get("ENV_VARS"), f"{path}: ENV_VARS"),
        host,
    )


def megatron_parser() -> flag_values.Parser:
    """Megatron's own parser, and ours in it once `integrate.install()` has run; it raises what it refuses."""
    from megatron.training import arguments

    parser = flag_values.Parser(prog="", allow_abbrev=False)
    arguments.add_megatron_arguments(parser)
    return parser


def known_flags(parser: flag_values.Parser | None = None) -> list[str]:
    """Every long flag of Megatron's parser."""
    parser = megatron_parser() if parser is None else parser
    return [flag for flag in parser._option_string_actions if flag.startswith("--")]


def check_flags(argv: list[str], parser: flag_values.Parser | None = None) -> None:
    """ValueError for a `--flag` in argv that the parser does not know, naming the nearest that it does.

    And for a value that its flag does not take.
    """
    parser = megatron_parser() if parser is None else parser
    known = known_flags(parser)
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            raise ValueError(f"Megatron has no flag {flag}{nearest(flag, known) or '.'}")
    if not {"-h", "--help"} & set(argv):
        reason = flag_values.refusal(parser, argv)
        if reason is not None:
            raise ValueError(" ".join(reason.split()))


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


def split_config_files(argv: list[str]) -> tuple[list[str], list[tuple[int, RunConfig, str]]]:
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


def requests_host_mode(rest: list[str], found: list[tuple[int, RunConfig, str]]) -> bool:
    """Whether the command line or its files ask for host mode; the later of them says."""
    wanted, start = False, 0
    for position, config, _ in found:
        said = config.model_args.get(HOST_FLAG) if config.host is None else config.host
        wanted = bool(said) if said is not None else wanted or HOST_FLAG in rest[start:position]
        start = position
    return wanted or HOST_FLAG in rest[start:]


def join_argv(rest: list[str], found: list[tuple[int, RunConfig, str]]) -> list[str]:
    """The inverse of `split`: argv with every file's flags where `--helix-config FILE` stood.

    Call `integrate.install()` first: the flags are checked against Megatron's parser as it then is.
    """
    if not found:
        return list(rest)
    parser, argv, start = megatron_parser(), [], 0
    for position, config, path in found:
        argv += rest[start:position]
        start = position
        arguments = config.model_args
        if config.host is not None:
            arguments = {**arguments, HOST_FLAG: config.host}
        argv = _and_those_of_a_file(argv, arguments, f"{path}: MODEL_ARGS", parser)
    return argv + rest[start:]


def _and_those_of_a_file(
    argv: list[str], arguments: Mapping[str, Any], where: str, parser: flag_values.Parser
) -> list[str]:
    known, given = known_flags(parser), {}
    for flag, value in arguments.items():
        if flag not in known:
            raise ValueError(f"{where}: Megatron has no flag {flag}{nearest(flag, known) or '.'}")
        action = parser._option_string_actions[flag]
        if id(action) in given:
            raise ValueError(f"{where}: {given[id(action)]} and {flag} are the same flag; keep one.")
        given[id(action)] = flag
        if value is False:
            argv = flag_values.without(parser, argv, flag)
        try:
            argv = argv + flag_values.words(parser, flag, value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from None
    return argv
