"""What a rank does in test_gradient_range.py: one attention layer in fp16, its gradients, its training."""

from __future__ import annotations

import torch

from helix_megatron.check.reference import Case
from helix_megatron.partition.config import HelixConfig
from tests.megatron_glue.layer_worker import Groups, load, make_layer, run, start

HALF = dict(params_dtype=torch.float16, fp16=True)


def one_batch(case: Case, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of two kinds, and the mean of the first kind: attention has to find out which are of it.

    Returns:
        input and target, [S, B, H] fp32: a token is a sign, and the mean of its kind plus noise.
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    means = normal(2, 1, case.batch, case.hidden)
    kind = torch.randint(2, (case.seq, case.batch, 1), generator=generator)
    tokens = torch.where(kind == 0, means[0], means[1]) + 0.1 * normal(case.seq, case.batch, case.hidden)
    tokens[..., :1] = 2.0 * kind - 1
    target = means[0].expand(case.seq, -1, -1).clone()
    target[..., 0] = 0
    return tokens, target


def as_they_are(case: Case) -> None:
    """Values are the tokens, the output is the mean of the heads: what is left to learn is where to look."""
    rows, eye = case.tensors["qkv_weight"], torch.eye(case.dim).double()
    rows[-case.dim :] = eye
    case.tensors["qkv_bias"][-case.dim :] = 0
    case.tensors["proj_weight"] = eye.repeat(1, case.heads) / case.heads
    rows[: -case.dim] *= 0.2


def train(tp: int, case: Case, helix: HelixConfig, loss_scale: float, half: bool, steps: int) -> dict:
    """Adam on float32 masters, as Megatron's mixed precision has it: losses, and the gradients of step 1.

    Returns:
        "losses" of all steps; "query_key" and "value": gradients of the rows of `linear_qkv` at step 1.
    """
    start(tp)
    rank, dtype = torch.distributed.get_rank(), torch.float16 if half else torch.float32
    plan = helix.resolve(case.heads, case.groups, case.dim, tp)
    layer = make_layer(case, helix, tp, Groups().of(plan.grid), **(HALF if half else {}))
    case.draw()
    as_they_are(case)
    load(layer, case, plan.layout.qkv_rows(rank), plan.layout.proj_columns(rank), dtype)
    masters = [p.detach().float().requires_grad_() for p in layer.parameters()]
    adam = torch.optim.Adam(masters, lr=1e-2)
    generator, losses, first = torch.Generator().manual_seed(case.seed), [], {}
    for _ in range(steps):
        tokens, target = one_batch(case, generator)
        out, _ = layer(tokens.to(dtype), None)
        loss = (out.float() - target).square().mean()
        (loss * loss_scale).backward()
        for master, p in zip(masters, layer.parameters(), strict=True):
            master.grad = p.grad.float() / loss_scale
        if not first:
            parts = layer.linear_qkv.weight.grad.float() / loss_scale
            values = plan.layout.kv_heads * plan.layout.slice_dim
            first = {"query_key": parts[:-values].clone(), "value": parts[-values:].clone()}
        adam.step()
        with torch.no_grad():
            for master, p in zip(masters, layer.parameters(), strict=True):
                p.copy_(master)
                p.grad = None
        losses.append(loss.item())
    return {"losses": losses, **first}


def layer_results(tp: int, dtype: torch.dtype, jobs: list[tuple[Case, HelixConfig, dict]]) -> list[dict]:
    """Output and gradients of layers, in `dtype` throughout."""
    start(tp)
    groups, found, rank = Groups(), [], torch.distributed.get_rank()
    flags = dict(params_dtype=dtype, bf16=dtype is torch.bfloat16, fp16=dtype is torch.float16)
    for case, helix, overrides in jobs:
        plan = helix.resolve(case.heads, case.groups, case.dim, tp)
        layer = make_layer(case, helix, tp, groups.of(plan.grid), **flags, **overrides)
        case.draw()
        load(layer, case, plan.layout.qkv_rows(rank), plan.layout.proj_columns(rank), dtype)
        case.tensors["loss"] *= 1e-5
        found.append(run(layer, case, tp, dtype))
    return found


def rank_steps(arguments: list[str], broken_pass: int, broken_rank: int, agree: bool) -> list[dict]:
    """Train with Megatron's loop; one entry of one rank's slice of a gradient is infinite in one pass.

    Args:
        arguments: Megatron's.
        broken_pass: number of the backward pass, from 1; its gradient is that of layer 1's `linear_qkv`.
        broken_rank: the only rank where it is.
        agree: False takes Megatron's agreement on found-inf over the ranks away.
    Returns:
        for each step: was the weight updated, and the loss scale after it.
    """
    from megatron.core.optimizer import optimizer as megatron_optimizer

    from helix_megatron import pretrain_gpt
    from helix_megatron.megatron import entry, integrate
    from helix_megatron.megatron import self_attention as attention

    passes, steps = [], []
    original_init = attention.HelixParallelSelfAttention.__init__
    mixed = megatron_optimizer.MixedPrecisionOptimizer
    originals = mixed.prepare_grads, mixed.step_with_ready_grads, mixed._unscale_main_grads_and_check_for_nan

    def break_once(grad: torch.Tensor) -> torch.Tensor | None:
        passes.append(1)
        if len(passes) != broken_pass:
            return None
        assert torch.isfinite(grad).all()
        grad = grad.clone()
        grad[0, 0] = float("inf")
        return grad

    def with_break(self, *args, **kwargs) -> None:
        original_init(self, *args, **kwargs)
        if self.layer_number == 1 and torch.distributed.get_rank() == broken_rank:
            self.linear_qkv.weight.register_hook(break_once)

    def prepared(self):
        found_inf = originals[0](self)
        steps.append({"updated": False, "loss scale": self.grad_scaler.scale.item()})
        return found_inf

    def stepped(self):
        before = [p.detach().clone() for p in self.get_parameters()]
        result = originals[1](self)
        pairs = zip(before, self.get_parameters(), strict=True)
        steps[-1]["updated"] = not all(torch.equal(old, new) for old, new in pairs)
        return result

    def alone(self):
        ranks = range(torch.distributed.get_world_size())
        own = [torch.distributed.new_group([rank]) for rank in ranks][torch.distributed.get_rank()]
        group, self.get_grad_stats_parallel_group = self.get_grad_stats_parallel_group, lambda: own
        try:
            return originals[2](self)
        finally:
            self.get_grad_stats_parallel_group = group

    attention.HelixParallelSelfAttention.__init__ = with_break
    mixed.prepare_grads, mixed.step_with_ready_grads = prepared, stepped
    # The norm is of all ranks: without the agreement some would wait for it, others have left.
    megatron_optimizer.ChainedOptimizer.get_grad_norm = lambda self: 0.0
    if not agree:
        mixed._unscale_main_grads_and_check_for_nan = alone
    entry.use_built_helpers()
    integrate.install()
    pretrain_gpt.train(arguments)
    return steps
