"""Caches of sliced heads in Megatron's inference contexts; no KV head is stored twice.

contexts.py        a layer's step in Megatron's static context and dynamic engine
position_cache.py  KV cache "sequence": whole heads of 1/m of the positions on each rank
slice_cache.py     KV cache "dim": slices of all positions on each rank
"""
