"""FP8 with a scale per block (blockwise: 128, MXFP8: 32 numbers) for transformer_engine_torch.py, in torch.

A tensor [..., K] is a matrix [M, K] over its leading dimensions. It is quantised along its rows and along its
columns, each with its own blocks, since a GEMM wants the blocks along the dimension that it sums over.
"""

import torch

MX_BLOCK, BLOCK = 32, 128


def _is_mx(kind) -> bool:
    return type(kind).__name__.startswith("MXFP8")


def has_blocks(quantizer) -> bool:
    """Is it one of the quantizers served here?"""
    return type(quantizer).__name__ in ("MXFP8Quantizer", "Float8BlockQuantizer")


def empty(quantizer, shape, dtype):
    """A tensor of the quantizer's class, bytes and scales not set."""
    meta = quantizer.storage_metadata(dtype)
    names = ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
    specs = quantizer.inner_tensor_specs(tuple(shape))
    parts = dict.fromkeys(names)
    parts |= {name[1:]: torch.zeros(size, dtype=kind) for name, (size, kind) in specs.items()}
    settings = dict(meta["nontensor_kwargs"])
    if not quantizer.internal:
        del settings["fake_dtype"]
        settings |= dict(shape=torch.Size(shape), dtype=dtype, device=torch.device("cpu"))
    return meta["cls"](**parts, **settings)


def _blocks(matrix, rows, columns):
    """[M, K] -> [M/rows, rows, K/columns, columns], padded with zeros."""
    m, k = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -k % columns, 0, -m % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def _block_size(quantizer, rowwise):
    if not _is_mx(quantizer) and quantizer.block_scaling_dim == 2:
        return BLOCK, BLOCK
    size = MX_BLOCK if _is_mx(quantizer) else BLOCK
    return (1, size) if rowwise else (size, 1)


def quantize(tensor, quantizer, output, kind):
    """Fill `output` with `tensor` as FP8 of type `kind`, along rows and columns as the quantizer wants."""
    matrix, top = tensor.detach().float().reshape(-1, tensor.shape[-1]), torch.finfo(kind).max
    for rowwise in (True, False):
        data = output._rowwise_data if rowwise else output._columnwise_data
        scales = output._rowwise_scale_inv if rowwise else output._columnwise_scale_inv
        if data is None:
            continue
        blocks = _blocks(matrix, *_block_size(quantizer, rowwise))
        amax = blocks.abs().amax((1, 3))  # [M/rows, K/columns]
        inverse = torch.where(amax > 0, amax / top, torch.ones_like(amax))
        if _is_mx(quantizer) or quantizer.force_pow_2_scales:
            inverse = torch.exp2(torch.ceil(torch.log2(inverse)))
        scaled = (blocks / inverse[:, None, :, None]).clamp(-top, top).flatten(2).flatten(0, 1)
        bytes_ = scaled[: matrix.shape[0], : matrix.shape[1]].to(kind).view(torch.uint8)
        if _is_mx(quantizer):
            data.copy_(bytes_.reshape(data.shape))
            inverse = (torch.log2(inverse) + 127).to(torch.uint8)
        else:
            data.copy_((bytes_ if rowwise else bytes_.t()).reshape(data.shape))
            if rowwise is (quantizer.block_scaling_dim == 1):  # how GEMMs want them
                inverse = inverse.t()
        scales[: inverse.shape[0], : inverse.shape[1]] = inverse
    return output


def plain(tensor, rowwise, kind):
    """fp32 numbers of a tensor, from its rows or from its columns."""
    data = tensor._rowwise_data if rowwise else tensor._columnwise_data
    scales = tensor._rowwise_scale_inv if rowwise else tensor._columnwise_scale_inv
    quantizer = tensor._quantizer
    if _is_mx(tensor):
        values, shape = data.reshape(-1, data.shape[-1]), data.shape
        scales = torch.exp2(scales.float() - 127)
    elif rowwise:
        values, shape = data.reshape(-1, data.shape[-1]), data.shape
    else:
        values, shape = data.reshape(data.shape[0], -1).t(), (*data.shape[1:], data.shape[0])
    if not _is_mx(tensor) and rowwise is not tensor._is_2D_scaled:
        scales = scales.t()
    rows, columns = _block_size(quantizer, rowwise)
    values = values.contiguous().view(kind).float()
    blocks = _blocks(values, rows, columns)
    blocks = blocks * scales[: blocks.shape[0], : blocks.shape[2]][:, None, :, None]
    return blocks.flatten(2).flatten(0, 1)[: values.shape[0], : values.shape[1]].reshape(shape)
