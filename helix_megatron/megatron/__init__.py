"""Everything that knows Megatron's classes. integrate.py is what a user calls.

self_attention.py  HelixParallelSelfAttention, a subclass of Megatron's SelfAttention
core_attention.py  the exchange around an ordinary attention core; summed scores
sdpa.py            PyTorch's fused attention in place of Megatron's unfused local core
masks.py           what a mask tensor means to each attention core
qk_norm.py         QK norm over heads of which a rank holds a slice
gradient_range.py  adaptive gradient scaling of per-slice attention in fp16
sliced_linear.py   marks layers whose ranks do not hold contiguous chunks
specs.py           layer specs for code that builds models itself
bridge.py          Megatron-Bridge: Hugging Face weights into slices and back
integrate.py       the one place that touches Megatron: explicit, version-guarded, undoable
arguments.py       the flags
yaml_config.py     flags from a YAML file
entry.py           what the entry points share: the way in, one-line refusals
"""
