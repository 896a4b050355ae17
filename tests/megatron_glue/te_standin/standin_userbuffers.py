"""Userbuffers of Transformer Engine in torch: the buffers that `--tp-comm-overlap` sends GEMM's inputs and
outputs through, one collective before or after the GEMM that it overlaps with on a GPU. Not for FP8.
"""

import torch


class CommOverlapHelper:
    """The groups that the buffers are made with: all ranks, and those of this tensor-parallel group."""

    def __init__(self, world_group, tensor_parallel_group):
        self.group = tensor_parallel_group


class CommOverlap:
    """A buffer [tokens of all ranks, hidden size], of which this rank owns a chunk of tokens.

    Args:
        shape, dtype: of the buffer.
        helper: CommOverlapHelper.
        tp_size: ranks that share the tokens.
        settings: how a GPU would overlap.
    """

    def __init__(self, shape, dtype, helper, tp_size, *args, **settings):
        assert torch.distributed.get_world_size(helper.group) == tp_size
        if dtype is torch.uint8:
            raise NotImplementedError("the stand-in has no userbuffers for FP8")
        self.group, self.buffer = helper.group, torch.zeros(shape, dtype=dtype)
        self.chunk = self.buffer.chunk(tp_size)[torch.distributed.get_rank(helper.group)]

    def with_cublasmp(self):
        return False

    def is_fp8_ubuf(self):
        return False

    def copy_into_buffer(self, tensor, local_chunk=False):
        """Copy a tensor into the buffer, or into this rank's chunk."""
        assert tensor.dtype == self.buffer.dtype
        target = self.chunk if local_chunk else self.buffer
        target.copy_(tensor.reshape(target.shape))

    def get_buffer(self, local_chunk=False, shape=None):
        """The buffer or this rank's chunk, the memory itself."""
        found = self.chunk if local_chunk else self.buffer
        return found if shape is None else found.view(shape)

    def gather(self):
        """Fill the buffer with all ranks' chunks."""
        torch.distributed.all_gather_into_tensor(self.buffer, self.chunk.clone(), group=self.group)

    def scatter(self, source, target):
        """Sum [tokens of all ranks, hidden size] over the ranks; this rank's chunk goes to target."""
        total = source.reshape(self.buffer.shape).clone()
        mine = torch.empty_like(self.chunk)
        torch.distributed.reduce_scatter_tensor(mine, total, group=self.group)
        target.copy_(mine.view(target.shape))


CommOverlapP2P = CommOverlap


def overlapped(gemm, buffer, reduces, extra_output, bulk):
    """Run `gemm` (which returns its results, the product first) with the buffer's collective.

    bulk: the collective is of the buffer, and the product has nothing to do with it. Otherwise the product's
    input is the gathered buffer, or the product is summed and scattered into extra_output.
    """
    if not reduces:
        buffer.gather()
        return gemm()
    if bulk:
        found = gemm()
        buffer.scatter(buffer.buffer, buffer.chunk)
        return found
    product, *rest, _ = gemm()
    buffer.scatter(product, extra_output)
    return product, *rest, extra_output
