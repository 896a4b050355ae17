"""The Triton kernel under Triton's interpreter (TRITON_INTERPRET=1, before Triton is imported)."""

import itertools

import torch

from helix_megatron.kernels import backend as attention_backend
from helix_megatron.kernels.paged_attention import Sight
from helix_megatron.kernels.paged_attention_triton import paged_attention
from helix_megatron.partition.kv_layout import KvInterleave
from tests.kernels.test_paged_attention import HEADS, check, draw

STEPS = {  # tokens of each request, how many of them are new
    "decode": ([1, 9, 150, 33], [1, 1, 1, 1]),
    "prompts": ([5, 40, 1, 17], [5, 40, 1, 17]),
    "both, chunks, padding": ([70, 0, 12, 80, 1], [1, 0, 12, 23, 1]),
}


def main() -> None:
    number = 0
    for (name, (lengths, new)), heads, left in itertools.product(STEPS.items(), HEADS, (None, 6)):
        ranks, size = [(1, 4), (3, 2), (4, 5)][number % 3]
        sight = Sight(0.4, left, KvInterleave(ranks, size), number % ranks)
        drawn = draw(lengths, new, ranks, size, sight.rank, heads, 12, "scattered", number, cycles=3)
        splits = 1 + number % 3
        try:
            check(lambda *given, s=splits: paged_attention(*given, splits=s), *drawn, sight)
        except AssertionError as error:
            raise AssertionError(f"{name} {heads} {sight} splits {splits}") from error
        number += 1
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        drawn = draw([50, 7], [1, 7], 2, 4, 0, (4, 2), 16, "scattered", dtype=dtype)
        check(paged_attention, *drawn, Sight(0.25, None, KvInterleave(2, 4), 0), tolerance)
    drawn = draw([9], [1], 1, 4, 0, (4, 2), 16, "in order")  # as the engine would reach it
    as_backend = lambda *given: attention_backend.attend(*given, singles=True)  # noqa: E731
    check(as_backend, *drawn, Sight(0.5, None, KvInterleave(1, 4), 0))
    print(f"{number} cases")


if __name__ == "__main__":
    main()
