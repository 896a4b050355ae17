"""Time per output token: greedy decode through Megatron's static inference context.

Shape legend: b sequences, s new positions (the prompt, then 1), h hidden.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch

from helix_megatron.compare.comm import CommMeter


def decode(
    models: list[torch.nn.Module], prompt: torch.Tensor, new_tokens: int, meter: CommMeter | None
) -> dict[str, Any]:
    """Decode greedily from prompt [b, s] with a KV cache; the first token comes with the prompt.

    Returns seconds of the prompt, seconds of each of `new_tokens` later tokens, the tokens [b, 1 + new] and,
    with a meter, the collectives of the last token. ValueError with virtual pipeline stages.
    """
    from megatron.core import parallel_state
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.transformer.utils import set_model_to_sequence_parallel
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args

    args = get_args()
    if len(models) > 1:
        raise ValueError("decode is not measured with virtual pipeline stages; set decode_tokens: 0.")
    model = unwrap_model(models)[0]
    model.eval()
    if args.sequence_parallel:  # one token cannot be split over the ranks
        set_model_to_sequence_parallel(model, False)
    context = StaticInferenceContext(prompt.shape[0], prompt.shape[1] + new_tokens)
    pp = parallel_state.get_pipeline_model_parallel_group()
    tokens, made, seconds = prompt, [], []
    for _ in range(1 + new_tokens):
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad(), meter.counting() if meter else nullcontext():
            tokens = decode_step(model, tokens, context, pp, args)  # [b, 1]
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        made.append(tokens)
        context.enable_decode_mode()
    return {
        "prompt_seconds": seconds[0],
        "token_seconds": seconds[1:],
        "tokens": torch.cat(made, dim=1).tolist(),
        "token_comm": meter.as_json() if meter else {},
    }


def decode_step(model: Any, tokens: torch.Tensor, context: Any, pp: Any, args: Any) -> torch.Tensor:
    """tokens [b, s] (the prompt, then s = 1) → the next token of each sequence [b, 1], on every rank.

    Point to point along `pp`: hidden states [s, b, h]; at its end the tokens [b, 1] (int64) are broadcast.
    """
    b, s = tokens.shape
    done = context.sequence_len_offset
    positions = torch.arange(done, done + s, device=tokens.device)
    ranks = torch.distributed.get_process_group_ranks(pp)
    stage, last = pp.rank(), pp.size() - 1
    if stage:
        hidden = torch.empty((s, b, args.hidden_size), dtype=args.params_dtype, device=tokens.device)
        torch.distributed.recv(hidden, ranks[stage - 1], group=pp)
        model.set_input_tensor(hidden)
    positions = positions.expand(b, s)
    output = model(tokens, positions, None, inference_context=context, runtime_gather_output=True)
    if stage < last:
        torch.distributed.send(output.contiguous(), ranks[stage + 1], group=pp)
        chosen = torch.empty((b, 1), dtype=torch.int64, device=tokens.device)
    else:
        chosen = output[:, -1, :].argmax(dim=-1, keepdim=True)
    if last:
        torch.distributed.broadcast(chosen, ranks[last], group=pp)
    context.sequence_len_offset += s
    return chosen
