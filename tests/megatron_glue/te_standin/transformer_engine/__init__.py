"""Transformer Engine's own Python code, with its native module `transformer_engine_torch` stood in for.

Test equipment. Put on PYTHONPATH before the folder that holds the pure Python wheel `transformer-engine`
(`pip install --no-deps --target`), this package takes the wheel's place, tells it not to look for its native
libraries, and runs the wheel's own `__init__`. Everything but the native module is then NVIDIA's code.
"""

import os
import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
_wheel = next(
    (
        folder
        for folder in (Path(entry or ".").resolve() / "transformer_engine" for entry in sys.path)
        if folder != _here and (folder / "common" / "__init__.py").exists()
    ),
    None,
)
if _wheel is None:
    raise ImportError(
        "the stand-in needs the wheel's own code: pip install --no-deps --target FOLDER transformer-engine "
        "and put FOLDER on PYTHONPATH behind the stand-in"
    )
os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the wheel's way to be imported without its native libraries
__path__ = [str(_wheel)]
__file__ = str(_wheel / "__init__.py")

import torch  # noqa: E402

from transformer_engine import common  # noqa: E402

torch.Tensor.is_cuda = property(lambda tensor: True)  # its modules refuse host tensors by this
common.load_framework_extension = lambda framework: None  # transformer_engine_torch is beside this package
exec(compile((_wheel / "__init__.py").read_text(encoding="utf-8"), __file__, "exec"))
