"""Inference of a plain GPT through Megatron's static context: prompts, then one token after the other.

Shape legend: b sequences on this data-parallel replica, s new positions (the prompt, then 1), h hidden.
"""

from __future__ import annotations

from typing import Any

import torch

from helix_megatron.measure.memory import storage_bytes


class Session:
    """A batch of sequences with its KV cache, on every rank of the replica."""

    def __init__(self, models: list[torch.nn.Module], prompt: torch.Tensor, new_tokens: int) -> None:
        """prompt: [b, s] (int64), not yet run; the cache has room for it and `new_tokens` - 1 more.

        ValueError with context parallelism.
        """
        from megatron.core import parallel_state
        from megatron.core.inference.contexts import StaticInferenceContext
        from megatron.core.transformer.utils import set_model_to_sequence_parallel
        from megatron.core.utils import unwrap_model
        from megatron.training import get_args

        self.args = get_args()
        if self.args.context_parallel_size > 1:
            raise ValueError("Megatron's inference does not know context parallelism.")
        self.chunks = unwrap_model(models)
        for chunk in self.chunks:
            chunk.eval()
            if self.args.sequence_parallel:  # one token cannot be split over the ranks
                set_model_to_sequence_parallel(chunk, False)
        self.context = StaticInferenceContext(prompt.shape[0], prompt.shape[1] + new_tokens)
        self.pipeline = parallel_state.get_pipeline_model_parallel_group()
        self.tokens = prompt
        """What the next step runs: [b, s], then [b, 1]."""

    def step(self) -> torch.Tensor:
        """Run `tokens`; the next token of each sequence [b, 1] (int64), on every rank, greedily chosen."""
        with torch.no_grad():
            self.tokens = decode_step(self.chunks, self.tokens, self.context, self.pipeline, self.args)
        self.context.enable_decode_mode()
        return self.tokens

    def cache_bytes(self) -> int:
        """Bytes of the KV cache on this rank: the storages that the context holds for it, each once."""
        held: list[Any] = [self.context.key_value_memory_dict]
        tensors = []
        while held:
            item = held.pop()
            if isinstance(item, torch.Tensor):
                tensors.append(item)
            elif isinstance(item, list | tuple):
                held += item
            else:
                held += (item if isinstance(item, dict) else getattr(item, "__dict__", {})).values()
        return storage_bytes(tensors, set())


def decode_step(models: list[Any], tokens: torch.Tensor, context: Any, pp: Any, args: Any) -> torch.Tensor:
    """tokens [b, s] (the prompt, then s = 1) → the next token of each sequence [b, 1], on every rank.

    At the end of the pipeline `pp` the tokens [b, 1] (int64) are broadcast to its other stages.
    """
    done = context.sequence_len_offset
    positions = torch.arange(done, done + tokens.shape[1], device=tokens.device).expand_as(tokens)
    output = run_pipeline(models, tokens, positions, context, pp, args)
    stage, last = pp.rank(), pp.size() - 1
    if stage < last:
        chosen = torch.empty((tokens.shape[0], 1), dtype=torch.int64, device=tokens.device)
    else:
        chosen = output[:, -1, :].argmax(dim=-1, keepdim=True)
    if last:
        ranks = torch.distributed.get_process_group_ranks(pp)
        torch.distributed.broadcast(chosen, ranks[last], group=pp)
    context.sequence_len_offset += tokens.shape[1]
    return chosen


def run_pipeline(
    models: list[Any], tokens: torch.Tensor, positions: torch.Tensor, context: Any, pp: Any, args: Any
) -> torch.Tensor:
    """Forward of tokens [b, s] at positions [b, s]; the last stage returns logits [b, s, V].

    models: this rank's chunks, one for each virtual pipeline stage: all stages pass their first chunk, then
    all their second, and so on. Point to point around `pp`: hidden states [s, b, h] of the parameters' dtype,
    s / TP of them with sequence parallelism and no context. Other stages return what they have sent.
    """
    b, s = tokens.shape
    ranks = torch.distributed.get_process_group_ranks(pp)
    stage, last = pp.rank(), pp.size() - 1
    split = args.tensor_model_parallel_size if args.sequence_parallel and context is None else 1
    shape = (s // split, b, args.hidden_size)
    for number, model in enumerate(models):
        if stage or number:
            hidden = torch.empty(shape, dtype=args.params_dtype, device=tokens.device)
            torch.distributed.recv(hidden, ranks[stage - 1], group=pp)  # the first's are from the last
            model.set_input_tensor(hidden)
        output = model(tokens, positions, None, inference_context=context, runtime_gather_output=True)
        if stage < last or number < len(models) - 1:
            torch.distributed.send(output.contiguous(), ranks[(stage + 1) % len(ranks)], group=pp)
    return output
