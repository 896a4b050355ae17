"""Attention over a rank's part of a paged cache, with log-sum-exp: torch and kernels for GPUs, no Megatron.

placement.py               where a rank keeps the new tokens of a step
merge.py                   partial attention with log-sum-exp, and its stable combination
paged_attention.py         attention over a rank's pages, in torch
paged_attention_triton.py  the same as Triton kernels
triton_plan.py             a step's work dealt to programs in equal shares
triton_merge.py            parts merged by one kernel: of programs, of other libraries' kernels, of ranks
triton_tiles.py            what a program holds at a time
new_tokens.py              which rank attends over new keys, where they are apart from cached ones
flash.py                   FlashAttention's kernels, found and given what they ask for
known_case.py              the same compared with a known answer
selection.py               which of them is taken, and why
backend.py                 attention by it, and its warm-up
"""
