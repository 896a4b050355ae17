"""Slices and heads of tensors, without ranks."""

import pytest
import torch

from helix_megatron.exchange.slices import repeat_heads

REPEATS = [30, 1, 17]


def test_repeated_heads_in_order():
    heads = torch.randn(2, 3, 3, 4)
    expected = torch.stack([heads[:, :, k] for k, n in enumerate(REPEATS) for _ in range(n)], dim=2)
    assert torch.equal(repeat_heads(heads, REPEATS), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_repeated_head_is_summed_in_fp32(dtype):
    """Rounded once, at the end: what adding the copies one by one in half precision does not give."""
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(16, 2, 3, 8, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(16, 2, sum(REPEATS), 8, generator=generator).to(dtype)
    repeat_heads(heads, REPEATS).backward(grad)
    parts = grad.float().split(REPEATS, dim=2)
    assert torch.equal(heads.grad, torch.stack([part.sum(dim=2) for part in parts], dim=2).to(dtype))


def test_repeating_heads_asks_nothing_of_the_device():
    """On a device without values."""
    heads = torch.empty(2, 3, 3, 4, device="meta", requires_grad=True)
    repeated = repeat_heads(heads, REPEATS)
    repeated.backward(torch.empty_like(repeated))
    assert repeated.shape == (2, 3, sum(REPEATS), 4) and heads.grad.shape == heads.shape
