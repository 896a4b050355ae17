"""Registers Helix when it is imported, for frameworks that import modules by name and build models.

    import helix_megatron.plugin                  or by a framework's own option, such as verl's external_lib
    HELIX_ARGS="--helix-dim-parallel-size 2"      Helix's flags from the environment; none: the grid is chosen

Megatron's argument parser gains the Helix flags. Every GPT or hybrid provider of Megatron-Bridge gets Helix
attention when it is finalized, as `with_helix(provider)` gives it, with the settings of HELIX_ARGS.
The only module that changes anything by being imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
from typing import NoReturn

from helix_megatron import compat
from helix_megatron.megatron import integrate
from helix_megatron.megatron.arguments import add_helix_arguments, helix_config_from_args
from helix_megatron.partition.config import HelixConfig
from helix_megatron.partition.grid import HelixConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise HelixConfigError(f"HELIX_ARGS: {message}; it takes Helix's flags, such as {self.epilog}")


def settings_from(words: str) -> HelixConfig | None:
    """The settings in HELIX_ARGS; None with `--attention-impl megatron`.

    Raises:
        HelixConfigError: another flag, one that acts elsewhere, or values that cannot work.
    """
    parser = _Parser(epilog="--helix-dim-parallel-size 2", allow_abbrev=False, add_help=False)
    add_helix_arguments(parser).set_defaults(attention_impl="helix")
    args = parser.parse_args(shlex.split(words))
    elsewhere = {
        "--helix-host-mode": args.helix_host_mode,
        "--helix-no-verify-checkpoint": args.helix_no_verify_checkpoint,
    }
    for flag, given in elsewhere.items():
        if given:
            raise HelixConfigError(f"HELIX_ARGS has {flag}, which acts elsewhere; leave it out")
    args.position_embedding_type, args.rotary_percent = "none", 1.0  # a provider's own
    return helix_config_from_args(args)


def register() -> None:
    """What the import does. Idempotent."""
    if compat.has_training():
        integrate.install()
    helix = settings_from(os.environ.get("HELIX_ARGS", ""))
    if helix is not None and importlib.util.find_spec("megatron.bridge") is not None:
        from helix_megatron.megatron import bridge

        bridge.register(helix)


register()
