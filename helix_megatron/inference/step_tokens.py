"""What all layers of a dynamic engine's step share: made once a step, where a CUDA graph will find it.

Note [What a replay reads]
    A CUDA graph repeats launches with the addresses and the numbers of its capture; no Python of a layer runs
    again. So a layer decides nothing of a step. What differs from step to step (where a new token is kept,
    positions, ends and lengths of requests, block tables, who attends over what) lies in memory that stays
    where it is: Megatron's own view of its bookkeeping, and what is worked out here and by the kernels
    (Requests.keep). `begin` fills all of it after Megatron's transfer to the GPU, before layers run or are
    replayed, from values on the device alone. The number of tokens and requests is that of the graph.
    Steps without a graph take the same way, with requests of their own: their sizes are any.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helix_megatron.inference.prompts import Prompts, count_singles, find_prompts
from helix_megatron.kernels.paged_attention import Requests
from helix_megatron.kernels.placement import place_tokens
from helix_megatron.partition.kv_layout import KvInterleave


class StepTokens:
    """The new tokens of a step, on this rank.

    Args:
        interleave: how positions of a block are dealt; (1, 1) where every rank keeps all.
        rank: this rank in its dim group.
        graphs: Megatron captures CUDA graphs of the steps whose sizes have one.
    """

    def __init__(self, interleave: KvInterleave, rank: int, graphs: bool):
        self.interleave, self.rank, self._graphs = interleave, rank, graphs
        self._memory: Tensor | None = None  # blocks and slots of as many tokens as a step may have
        self._of_graphs: dict[Any, Requests] = {}
        self.tokens, self.requests = 0, Requests(*torch.zeros(3, 0, dtype=torch.int32))
        self.in_graph, self.singles = False, 0
        self.prompts: Prompts | None = None

    def begin(self, context: Any) -> None:
        """The next step: Megatron's context has its bookkeeping on the GPU."""
        view, self.tokens = context.gpu_view, context.padded_active_token_count
        if self._memory is None or self._memory.shape[1] < self.tokens:
            assert not self._of_graphs, "a step has more tokens than the engine allows"
            size = max(self.tokens, len(view.token_to_block_idx))
            with torch.inference_mode(False):  # to be filled in any mode
                self._memory = torch.zeros(2, size, dtype=torch.int64, device=view.token_to_block_idx.device)
        place_tokens(
            self.blocks,
            self.slots,
            view.token_to_block_idx[: self.tokens],
            view.token_to_local_position_within_kv_block[: self.tokens],
            self.interleave,
            self.rank,
            context.kv_block_allocator.dummy_block_idx,
        )
        metadata = context.active_attn_metadata["mha_metadata"].state_data
        self.in_graph = self._graphs and context.using_cuda_graph_this_step()
        requests = Requests(
            metadata["cu_query_seq_lengths"],
            metadata["kv_seq_lengths"],
            metadata["block_table"],
            longest=None if self.in_graph else metadata.get("max_seqlen_q"),
        )
        only_singles = context.is_decode_only() and context.num_speculative_tokens == 0
        self.singles = self.tokens if only_singles else 0
        if self.in_graph:
            requests = self._that_stay(context.padded_batch_dimensions, requests)
        self.requests, self.prompts = requests, None
        requests.refill()
        if context.num_prefill_requests and not self.in_graph:
            active = slice(context.paused_request_count, context.total_request_count)
            of_requests = (context.request_query_lengths, context.request_kv_length_offsets)  # on the host
            new, before = (x[active].tolist() for x in of_requests)
            self.singles = count_singles(new)
            if self.singles == len(new):
                self.singles = self.tokens  # padding is behind them
            self.prompts = find_prompts(new, before, requests)

    @property
    def blocks(self) -> Tensor:
        """[tokens] where each is kept, int64: a block; the spare one takes the tokens of other ranks."""
        assert self._memory is not None
        return self._memory[0, : self.tokens]

    @property
    def slots(self) -> Tensor:
        """[tokens] and its slot in there."""
        assert self._memory is not None
        return self._memory[1, : self.tokens]

    def _that_stay(self, sizes: Any, requests: Requests) -> Requests:
        """The requests that the graph of these sizes was captured with: views of the same memory."""
        kept = self._of_graphs.get(sizes)
        if kept is None or kept.lengths.data_ptr() != requests.lengths.data_ptr():
            kept = self._of_graphs[sizes] = requests
        return kept
