"""Caches of sliced heads in Megatron's inference contexts; no KV head is stored twice.

contexts.py          a layer's step in Megatron's static context and dynamic engine
warm_up.py           kernels compiled when an engine starts, before it captures
dynamic_context.py   Megatron's dynamic context, made and checked for sliced heads
step_tokens.py       what all layers of a dynamic step share, where a CUDA graph finds it
position_cache.py    KV cache "sequence": whole heads of 1/m of the positions on each rank
agreement.py         all ranks take the same kernel for several new tokens of a request
partial_exchange.py  its second exchange: partial outputs to the ranks that merge them
prompts.py           whole prompts beside it: the core that trains, kept by position
slice_cache.py       KV cache "dim": slices of all positions on each rank
"""
