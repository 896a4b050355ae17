"""What every rank needs, imported once in the process that the ranks are forked from (see launcher.py).

Nothing is patched here: host mode is switched on in the ranks, by a call.
"""

import gc
import logging
import os
import signal
import warnings

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends with its caller; ranks take the default again
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # of this process only: ranks bring their own environment
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it reports that there is no GPU
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Megatron tells which optional packages are missing, once per import
    import megatron.core
    import torch

    from helix_megatron import compat
    from helix_megatron.host import megatron as host_megatron

    if compat.has_training():
        import megatron.training

gc.collect()
gc.freeze()  # a collection in a rank would otherwise write to, and so copy, every page it has inherited

__all__ = ["host_megatron", "megatron", "torch"]
