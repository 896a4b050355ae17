"""Attention over a rank's part of a paged cache, with log-sum-exp: torch and Triton, no Megatron.

merge.py                   partial attention with log-sum-exp, and its stable combination
paged_attention.py         attention over a rank's pages, in torch
paged_attention_triton.py  the same as a Triton kernel
backend.py                 which of them computes it, or flash-attn
"""
