"""Who holds what: pure arithmetic, no torch, no Megatron. Everything else derives from this room.

T = n * m tensor-parallel ranks form a grid; rank r = i * m + j. H = 8 query heads of dimension d on 2 x 4:

                        slices of each head's dimension (fast axis, neighbours)
                   j = 0         j = 1         j = 2         j = 3
                +-------------+-------------+-------------+-------------+
    i = 0       | rank 0      | rank 1      | rank 2      | rank 3      |   a row is a dim group:
    heads 0-3   | dims 0..d/4 | ..d/2       | ..3d/4      | ..d         |   it exchanges inside attention
                +-------------+-------------+-------------+-------------+
    i = 1       | rank 4      | rank 5      | rank 6      | rank 7      |   a column is a head group:
    heads 4-7   |             |             |             |             |   the same dims of other heads
                +-------------+-------------+-------------+-------------+

grid.py       the n x m grid: which are legal, where a rank stands
layout.py     which rows of linear_qkv and columns of linear_proj a rank holds, in which order
config.py     the user's settings, and what they mean for one layer
derived.py    the configuration whose heads are slices
kv_layout.py  which position the KV cache keeps on which rank
tensor_sizes.py  what a tensor-parallel size must divide besides heads
resharding.py  weights from the ranks of one layout to those of another, row by row
choice.py     the grid without a search, and why
"""
