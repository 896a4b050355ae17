"""The inner core attention, `core_attention.core`: its state has the names that it has without Helix."""

from __future__ import annotations

from typing import Any

import torch


def hide_inner_core(module: torch.nn.Module) -> None:
    """Register the hooks on a module that has its core attention (or None) as `core`."""
    module.loading_prefix = ""
    module.register_state_dict_post_hook(_without_core_prefix)
    module.register_load_state_dict_pre_hook(_with_core_prefix)
    module.register_load_state_dict_post_hook(_judged_without_core_prefix)


def _without_core_prefix(module: torch.nn.Module, state: dict, prefix: str, _: Any) -> None:
    """State of the core is saved under the name it has without Helix."""
    for key in [key for key in state if key.startswith(prefix + "core.")]:
        state[prefix + key.removeprefix(prefix + "core.")] = state.pop(key)


def _with_core_prefix(module: torch.nn.Module, state: dict, prefix: str, *_: Any) -> None:
    """Inverse of _without_core_prefix."""
    if module.core is None:  # what a core knows beyond weights (of FP8, say) is of no use here
        state.pop(f"{prefix}_extra_state", None)
        return
    module.loading_prefix = prefix
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}core.{key.removeprefix(prefix)}"] = state.pop(key)


def _judged_without_core_prefix(module: torch.nn.Module, keys: Any) -> None:
    """Missing and unexpected keys get the names they have without Helix, and the core forgives them by those.

    Transformer Engine's forgives a missing `core_attention._extra_state`: no distributed checkpoint has it.
    """
    if module.core is None:
        return
    prefix = module.loading_prefix
    for names in (keys.missing_keys, keys.unexpected_keys):
        names[:] = [
            prefix + name.removeprefix(f"{prefix}core.") if name.startswith(f"{prefix}core.") else name
            for name in names
        ]
    for hook in module.core._load_state_dict_post_hooks.values():
        hook(module.core, keys)
