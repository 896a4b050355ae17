"""What a program of the Triton kernel holds at a time: as much as shared memory takes. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from helix_megatron.partition.grid import HelixConfigError

SMALLEST_SHARED = 99 * 1024  # bytes of a block on sm_86, 89 and 120; A100 163 KiB, H100 227 KiB
_SPARE = 2 * 1024  # what reductions want
_SLOTS_AND_STAGES = ((64, 4), (64, 3), (32, 4), (32, 3), (64, 2), (32, 2), (16, 3), (16, 2), (16, 1))


@dataclass(frozen=True)
class Tile:
    """Args:
    rows: TOKENS * R_PAD, rows of a program's products.
    slots: of the cache in a step.
    stages: steps whose keys and values are under way at a time.
    warps: of a program.
    least: steps that are worth a program of their own.
    paged: a page holds whole steps, so that a step needs one page number.
    """

    rows: int
    slots: int
    stages: int
    warps: int
    least: int
    paged: bool


def tile_shape(
    rows: int, ratio: int, dim: int, itemsize: int, page: int, shared: int = SMALLEST_SHARED
) -> Tile:
    """The most that fits.

    Triton keeps in shared memory the tiles of keys and values, once for every stage but the one computed
    (with wgmma, on 64 rows in half precision, for that one too), and those of Q and of the probabilities.

    Args:
        rows: wanted, 16 (the least that a tensor core takes) or more. In fp32, which no tensor core computes
            exactly, registers hold 16 rows and steps of 16 slots.
        ratio: R, a power of two; all heads of a token are in one tile.
        dim: D, a power of two.
        itemsize: bytes of an element.
        page: slots of a page.
        shared: bytes that a block may have.

    Raises:
        HelixConfigError: no tile fits.
    """
    within = page & -page  # the greatest power of two that divides it
    rows = 16 if itemsize == 4 else rows
    while rows >= 16:
        height = max(rows, ratio)
        wgmma = height >= 64 and itemsize == 2
        for slots, stages in _SLOTS_AND_STAGES:
            if slots > within >= 16 or (itemsize == 4 and slots > 16):
                continue  # a page holds no whole step, or registers do not
            buffers = stages if wgmma else max(1, stages - 1)
            elements = 2 * slots * dim * buffers + height * (dim + slots)
            if itemsize * elements + _SPARE <= shared:
                least = 2 if height < 64 else 8
                warps = 4 if height < 64 and itemsize == 2 else 8
                return Tile(height, slots, stages, warps, least, page % slots == 0)
        rows //= 2
    raise HelixConfigError(
        f"{ratio} query heads of dimension {dim} (both rounded up to a power of two) for each KV head, "
        f"{itemsize} bytes an element, are more than the Triton kernel can hold in a GPU's shared memory; "
        "use half precision, or HELIX_PAGED_ATTENTION=torch"
    )
