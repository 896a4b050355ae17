"""How far rounding to FP8 moves the losses of test_te.py: its trainings, every scale at a phase of its own.

    PYTHONPATH=tests/megatron_glue/te_standin:.venv-te:. python -m tests.megatron_glue.fp8_noise

Note [What a scale changes]
    An FP8 number has a fixed number of mantissa bits (E4M3: 3, E5M2: 2). It is off by up to half of its last
    bit, in proportion to the number itself. A scale only says where in a binade a number lies when it is
    rounded: not how large its relative error is, but which of the possible errors it makes. Slices have
    scales of their own. Hence sliced FP8 makes other errors of the same size, and a loss of it is another
    draw of the same noise, not a number near vanilla FP8's loss.

Each draw trains on one rank, without slices, and multiplies every scale by 2^-u, u uniform in [0, 1). The
rounding is done here in float64 (`round_to`), not by the stand-in. Prints, for each recipe and step, the root
mean square of the loss's distance from bfloat16's.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import torch

from helix_megatron.host.launcher import run_ranks
from tests.megatron_glue.te_worker import claim_hopper
from tests.training import MODEL, rank_train

DRAWS = 8


def round_to(x: torch.Tensor, bits: int, exponent: int, top: float) -> torch.Tensor:
    """float64 numbers to the nearest of `bits` mantissa bits and at least `exponent`, ties to even."""
    x = x.clamp(-top, top)
    binade = torch.floor(torch.log2(x.abs().clamp_min(1e-300))).clamp_min(exponent)
    step = torch.exp2(binade - bits)
    return torch.round(x / step) * step


def to_fp8(x: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """float64 numbers to those of an FP8 type, in float64."""
    bits, exponent = (3, -6) if kind is torch.float8_e4m3fn else (2, -14)
    return round_to(x, bits, exponent, torch.finfo(kind).max)


def rank_draw(arguments: list[str], seed: int) -> None:
    """Train with the stand-in's scales, moved."""
    import transformer_engine_torch as te

    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"
    claim_hopper(lambda tensor, dtype: None)
    generator = torch.Generator().manual_seed(seed)

    def rounded(tensor, scale, kind):
        scale = scale * 2 ** -torch.rand((), generator=generator)
        return scale, to_fp8(tensor.double() * scale.double(), kind).to(kind)

    te._rounded = rounded
    rank_train(arguments)


def losses(function, flags: str, folder: Path, *more) -> torch.Tensor:
    """What Megatron's loop printed."""
    arguments = [*MODEL, "--transformer-impl", "transformer_engine", "--data-cache-path", str(folder.parent)]
    run_ranks(function, 1, [*arguments, *flags.split()], *more, timeout_s=300, log_dir=folder)
    found = re.findall(r"lm loss: (\S+) ", (folder / "rank_0.log").read_text())
    return torch.tensor([float(loss) for loss in found], dtype=torch.float64)


def main() -> None:
    from tests.megatron_glue.fp8_noise import rank_draw as by_name  # ranks import it by name
    from tests.megatron_glue.test_te import DELAYED, FP8, HALF

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        half = losses(rank_train, HALF, folder / "half")
        for recipe, flags in (("fp8", FP8), ("delayed", DELAYED)):
            draws = [losses(by_name, flags, folder / f"{recipe}{n}", n) - half for n in range(DRAWS)]
            noise = torch.stack(draws).square().mean(dim=0).sqrt()
            print(f'"{recipe}":', [round(x, 1) for x in (1e4 * noise).tolist()], flush=True)


if __name__ == "__main__":
    main()
