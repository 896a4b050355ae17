"""Stands in for flash-linear-attention, whose kernels need a GPU: what Megatron's gated delta nets import.

With --deterministic-mode Megatron computes convolution and delta rule in torch; the norm alone is from here.
"""
