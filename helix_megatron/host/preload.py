"""What every rank needs, imported once in the process that the ranks are forked from (see launcher.py).

Nothing is changed in what Megatron computes: host mode is switched on in the ranks, by a call.
"""

import argparse
import gc
import logging
import os
import signal
import warnings

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with its caller; ranks take the default again
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # of this process only: ranks bring their own environment
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it reports that there is no GPU


def read_help_once() -> None:
    """Have Megatron read its flags' help from source once, not four times in every rank of a run."""
    from megatron.training import argument_utils

    factory = getattr(argument_utils, "ArgumentGroupFactory", None)  # Megatron core 0.19's
    if factory is None:
        return
    read, texts = factory._get_field_docstrings, {}

    def _get_field_docstrings(self, config_class):
        if config_class not in texts:
            texts[config_class] = read(self, config_class)
        return texts[config_class]

    factory._get_field_docstrings = _get_field_docstrings


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron tells which optional packages are missing, once per import
    import megatron.core
    import torch

    from helix_megatron import compat
    from helix_megatron.host import megatron as host_megatron

    if compat.has_training():
        import megatron.core.tokenizers.text.libraries  # transformers, if installed: a second in every rank
        from megatron.training import arguments

        read_help_once()
        arguments.add_megatron_arguments(argparse.ArgumentParser())

gc.collect()
gc.freeze()  # a collection in a rank would otherwise write to, and so copy, every page it has inherited

__all__ = ["host_megatron", "megatron", "torch"]
