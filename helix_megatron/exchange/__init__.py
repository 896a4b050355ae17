"""Collectives of the grid: torch.distributed, no Megatron. Groups are arguments.

Exact attention with query placement "dims", one dim group of m = 2 ranks; L and R are the halves of a head:

               rank 0      rank 1                     rank 0          rank 1
    K, V       [L] x K     [R] x K    all-gather  ->  [L R] x K       [L R] x K       whole KV heads on both
    Q          [L] x N     [R] x N    all-to-all  ->  [L R] x N/2     [L R] x N/2     half of the heads each
                                                      attention       attention
    output     [L] x N     [R] x N  <- all-to-all     [L R] x N/2     [L R] x N/2

With "heads" the queries are whole already and K, V are all that moves.

groups.py       process groups of the grid; agreement of the ranks before the first collective
collectives.py  every collective, with its backward and its bytes
slices.py       whole heads from slices, and back
levels.py       reductions of the tensor-parallel group level by level over the grid
"""
