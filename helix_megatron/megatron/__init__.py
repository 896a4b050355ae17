"""Everything that knows Megatron's classes. integrate.py is what a user calls.

self_attention.py  HelixParallelSelfAttention, a subclass of Megatron's SelfAttention
sliced_modules.py  Megatron's submodules, built for slices
refusals.py        what sliced heads do not serve, by name
core_attention.py  an ordinary attention core, and what this rank hands to it
core_names.py      its state under the names that it has without Helix
position_share.py  attention of a share of the query positions
summed_scores.py   attention by partial scores of slices
te_backends.py     Transformer Engine's choice of a kernel, for every shape
sdpa.py            PyTorch's fused attention in place of Megatron's unfused local core
rope_tables.py     what of RoPE tables a rank rotates by
masks.py           what a mask tensor means to each attention core
qk_norm.py         QK norm over heads of which a rank holds a slice
gradient_range.py  adaptive gradient scaling of per-slice attention in fp16
process_groups.py  the groups of the grid, made and registered beside Megatron's own
sliced_linear.py   marks layers whose ranks do not hold contiguous chunks
weight_readers.py  Megatron's tools that read weights: taught, or refused by name
specs.py           layer specs for code that builds models itself
bridge.py          Megatron-Bridge: Hugging Face weights into slices and back
integrate.py       the one place that touches Megatron: explicit, version-guarded, undoable
run_settings.py    what the arguments of a run mean, and what all ranks must share
replacements.py, checkpoint_reading.py, level_reductions.py   parts of integrate.py
arguments.py       the flags
yaml_config.py     flags from a YAML file
flag_values.py     which values Megatron's parser takes
entry.py           what the entry points share: the way in, one-line refusals
"""
