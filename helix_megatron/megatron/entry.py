"""What the two entry points (pretrain_gpt.py and run.py) share: the way in, and one-line refusals."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from helix_megatron.megatron import yaml_config

# A ValueError or AssertionError raised in one of these is about the flags, not about the program.
_CONFIGURATION_MODULES = (
    "megatron.training.arguments",
    "megatron.training.argument_utils",
    "megatron.core.transformer.transformer_config",
    "megatron.core.model_parallel_config",
    "megatron.core.num_microbatches_calculator",
    "megatron.core.parallel_state",
    "helix_megatron.",
)


def prepare_argv(argv: list[str]) -> list[str]:
    """Files into flags, environment, host mode, Helix into Megatron, in the order that these need.

    Returns argv as Megatron's parser takes it. ValueError for a file that cannot be used.
    """
    rest, found = yaml_config.split_config_files(argv)
    for _, config, _ in found:
        os.environ.update(config.env_vars)
    if yaml_config.requests_host_mode(rest, found):
        from helix_megatron.host.mode import enable_host_mode

        enable_host_mode()
    from helix_megatron.megatron import integrate

    integrate.install()
    use_built_helpers()
    return yaml_config.join_argv(rest, found)


def use_built_helpers() -> None:
    """Let Megatron start from its wheel, which brings the data set helper built and no Makefile for it.

    Megatron compiles that helper whenever it starts and exits when `make` fails; a checkout still does.
    """
    import importlib.util
    from pathlib import Path

    from megatron.core.datasets import utils

    built = importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None
    if built and not Path(utils.__file__).with_name("Makefile").exists():
        utils.compile_helpers = lambda: None


def configuration_error(error: BaseException) -> str | None:
    """`error` in one line if it refuses the configuration; None for a fault of the program.

    Megatron refuses flags with AssertionErrors as well, some of them without a word: those are shown as
    the line of code that failed.
    """
    if not isinstance(error, ValueError | AssertionError) or error.__traceback__ is None:
        return None
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    module = frame.f_globals.get("__name__", "")
    if module == "__main__" and frame.f_globals.get("__spec__") is not None:  # run with `python -m`
        module = frame.f_globals["__spec__"].name
    if not module.startswith(_CONFIGURATION_MODULES):
        return None
    if str(error):
        return " ".join(str(error).split())
    code = traceback.extract_tb(error.__traceback__)[-1].line
    return f"Megatron requires `{code}` ({module}, line {line})."


def run_guarded(body: Callable[[], None], program: str) -> int:
    """Run `body`; a refused configuration becomes one line on stderr and 2, anything else is raised."""
    try:
        body()
    except (ValueError, AssertionError) as error:
        message = configuration_error(error)
        if message is None:
            raise
        rank = int(os.environ.get("RANK", "0"))
        print(f"{program}: {f'[rank {rank}] ' if rank else ''}{message}", file=sys.stderr, flush=True)
        return 2
    return 0
