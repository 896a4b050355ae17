"""Collectives of the grid: torch.distributed, no Megatron. Groups are arguments.

Exact attention with query placement "dims", one dim group of m = 2 ranks; L and R are the halves of a head:

               rank 0      rank 1                     rank 0          rank 1
    K, V       [L] x K     [R] x K    one         ->  [L R] x K'      [L R] x K'      the KV heads it needs
    Q          [L] x N     [R] x N    all-to-all  ->  [L R] x N/2     [L R] x N/2     half of the heads each
                                                      QK norm, RoPE,  attention
    output     [L] x N     [R] x N  <- all-to-all     [L R] x N/2     [L R] x N/2

With "heads" the queries are whole already and K, V are all that moves.

groups.py       the process groups of one rank; agreement of the ranks before the first collective
collectives.py  every collective, with its backward and its bytes
heads.py        whole heads before attention, slices after it: one collective each way
views.py        what is sent and what it comes from, as pairs of views
sums.py         sums of half-precision copies that are rounded once
slices.py       slices of whole heads where scores are summed; positions that ranks share
levels.py       reductions of the tensor-parallel group level by level over the grid
"""
