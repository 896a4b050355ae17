"""torch versions of the native kernels of Transformer Engine that its layers call: a stand-in for tests.

What is here: the enums its Python code reads at import, GEMM, LayerNorm and RMSNorm, the four fused
softmaxes, FusedAdam, the gradient norm, packed sequences to padded ones and
back, userbuffers without FP8, and FP8 with one scale per tensor, current or delayed (the latter with
NVTE_UNFUSED_FP8_UPDATE=1), or per block (scaled_blocks.py). Any other name exists, so that `import`
works, and raises NotImplementedError when it is called. Written from how the Python code calls the kernels
and what its documentation says of them; sums are in fp32 as theirs are.
"""

import enum
from itertools import pairwise

import scaled_blocks
import torch
from standin_userbuffers import CommOverlap, CommOverlapHelper, CommOverlapP2P, overlapped  # noqa: F401


def _enum(name: str, members: str) -> type[enum.IntEnum]:
    return enum.IntEnum(name, members.split(), start=0)


DType = _enum("DType", "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1")
CommOverlapType = _enum("CommOverlapType", "RS AG")
NVTERoutingMapFormat = _enum("NVTERoutingMapFormat", "BYTEMAP BITMAP_U8")
NVTEQBHistogramMode = _enum("NVTEQBHistogramMode", "TWO_KERNEL FUSED_ATOMIC")
FP8FwdTensors = _enum(
    "FP8FwdTensors",
    "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT "
    "GEMM3_OUTPUT",
)
FP8BwdTensors = _enum(
    "FP8BwdTensors", "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3"
)
NVTEScalingMode = _enum("NVTEScalingMode", "NVTE_DELAYED_TENSOR_SCALING NVTE_MXFP8_1D_SCALING")
NVTE_Bias_Type = _enum("NVTE_Bias_Type", "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI")
NVTE_Mask_Type = _enum(
    "NVTE_Mask_Type",
    "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK NVTE_CAUSAL_BOTTOM_RIGHT_MASK "
    "NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
)
NVTE_Softmax_Type = _enum(
    "NVTE_Softmax_Type", "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX"
)
NVTE_Fused_Attn_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend", {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
)
NVTE_QKV_Format = _enum(
    "NVTE_QKV_Format",
    "NVTE_QKV_Format_NOT_SET NVTE_SBHD NVTE_BSHD NVTE_THD NVTE_BSHD_2SBHD NVTE_SBHD_2BSHD NVTE_THD_2BSHD "
    "NVTE_THD_2SBHD NVTE_BHSD",
)
NVTE_QKV_Layout = _enum(
    "NVTE_QKV_Layout",
    "NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD NVTE_BS3HD NVTE_BSH3D "
    "NVTE_BSHD_BS2HD NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD NVTE_T3HD NVTE_TH3D NVTE_THD_T2HD NVTE_THD_TH2D "
    "NVTE_THD_THD_THD NVTE_SBHD_BSHD_BSHD NVTE_BSHD_SBHD_SBHD NVTE_THD_BSHD_BSHD NVTE_THD_SBHD_SBHD "
    "NVTE_Paged_KV_BSHD_BSHD_BSHD NVTE_Paged_KV_BSHD_SBHD_SBHD NVTE_Paged_KV_SBHD_BSHD_BSHD "
    "NVTE_Paged_KV_SBHD_SBHD_SBHD NVTE_Paged_KV_THD_BSHD_BSHD NVTE_Paged_KV_THD_SBHD_SBHD "
    "NVTE_BHSD_BHSD_BHSD NVTE_QKV_Layout_NOT_SET",
)

_TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}

# Classes that Python code names in annotations or passes to isinstance.
FP8TensorMeta = type("FP8TensorMeta", (), {})


def get_cublasLt_version() -> int:
    """A version no feature test asks more of."""
    return 130000


def get_cudnn_version() -> int:
    """Likewise."""
    return 91500


def get_num_cublas_streams() -> int:
    """Workspaces that GEMM allocates, which torch's matmul does not need."""
    return 1


def get_stream_priority_range() -> tuple[int, int]:
    """Lowest and highest, of streams that userbuffers would have."""
    return 0, 0


def device_supports_multicast() -> bool:
    """What userbuffers ask for."""
    return True


def ubuf_built_with_mpi() -> bool:
    """They start with torch's process groups."""
    return False


def _refuse(**given) -> None:
    used = [name for name, value in given.items() if value is not None and value is not False]
    if used:
        raise NotImplementedError(
            f"the stand-in for transformer_engine_torch does not compute {', '.join(used)}"
        )


# ---- FP8, one scale per tensor ----
_FP8 = {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}


def _current_scale(amax, top, quantizer):
    """Of the largest magnitude in the quantizer's group, if it has one."""
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(
            amax, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group
        )
    amax = amax.clamp_min(quantizer.amax_epsilon)
    scale = torch.where(amax > 0, top / amax, torch.ones_like(amax))
    return torch.exp2(torch.floor(torch.log2(scale))) if quantizer.force_pow_2_scales else scale


def _rounded(tensor, scale, kind):
    """The scale, and the scaled numbers in FP8."""
    top = torch.finfo(kind).max
    return scale, (tensor.float() * scale).clamp(-top, top).to(kind)


def quantize(tensor, quantizer, output=None, noop=None):
    """tensor as FP8 with scale = largest FP8 number / largest magnitude; delayed scaling: the quantizer's.

    Rows and, when the quantizer wants them, columns (the transposed bytes), as GPUs before Blackwell need.
    """
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    kind = _FP8[DType(int(quantizer.dtype))]
    if scaled_blocks.has_blocks(quantizer):
        if output is None:
            output = scaled_blocks.empty(quantizer, tensor.shape, tensor.dtype)
        return scaled_blocks.quantize(tensor, quantizer, output, kind)
    if not isinstance(quantizer, (Float8CurrentScalingQuantizer, Float8Quantizer)):
        raise NotImplementedError(f"the stand-in has no {type(quantizer).__name__}")
    amax = tensor.detach().float().abs().amax()
    if isinstance(quantizer, Float8Quantizer):
        scale = quantizer.scale.clone()
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    else:
        scale = _current_scale(amax, torch.finfo(kind).max, quantizer)
    scale, data = _rounded(tensor.detach(), scale, kind)
    data = data.view(torch.uint8)
    if output is None:
        output = quantizer.make_empty(tensor.shape, dtype=tensor.dtype)
    if output._data is not None:
        output._data.copy_(data)
    if quantizer.columnwise_usage:
        output._transpose = data.reshape(-1, data.shape[-1]).t().contiguous()
        output._transpose_invalid = False
    output._scale_inv.copy_((1 / scale).reshape(1))
    return output


def create_empty_quantized_tensor(quantizer, shape, dtype, device, *_):
    """An FP8 tensor of the given logical shape, bytes not set."""
    if scaled_blocks.has_blocks(quantizer):
        return scaled_blocks.empty(quantizer, shape, dtype)
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    parts = dict(
        data=torch.empty(shape, dtype=torch.uint8),
        fp8_scale_inv=torch.empty(1),
        fp8_dtype=quantizer.dtype,
        quantizer=quantizer,
    )
    if quantizer.internal:
        return Float8TensorStorage(fake_dtype=dtype, **parts)
    return Float8Tensor(shape=shape, dtype=dtype, device=torch.device("cpu"), **parts)


def bgrad_quantize(grad, quantizer):
    """Sum over tokens, and the quantised gradient."""
    return grad.reshape(-1, grad.shape[-1]).sum(0), quantize(grad, quantizer)


def _plain(tensor, rowwise):
    if not hasattr(tensor, "_fp8_dtype"):
        return tensor
    if hasattr(tensor, "_columnwise_data"):
        return scaled_blocks.plain(tensor, rowwise, _FP8[DType(int(tensor._fp8_dtype))])
    return tensor.dequantize(dtype=torch.float32)


# ---- GEMM ----
def generic_gemm(
    A, transa, B, transb, out, quantizer, out_dtype, bias, bias_type, gelu, gelu_in, grad, workspace,
    workspace_size, accumulate, use_split_accumulator, comm_overlap=None, comm_type=None, extra_output=None,
    bulk_overlap=False, alpha=1.0, beta=None,
):  # fmt: skip
    """out = alpha op(B) op(A) (+ beta out) (+ bias), in row-major terms; with `grad` also the sum of B.

    A [a, b] and B [..., c] are matrices over all leading dimensions; `transa` and `transb` transpose them.
    comm_overlap: a userbuffer; see standin_userbuffers.py.

    Returns (out, bias gradient or None, None, what was scattered or None).
    """
    _refuse(output_quantizer=quantizer, gelu=gelu)
    if comm_overlap is not None:

        def gemm():
            return generic_gemm(
                A, transa, B, transb, out, quantizer, out_dtype, bias, bias_type, gelu, gelu_in, grad,
                workspace, workspace_size, accumulate, use_split_accumulator, alpha=alpha, beta=beta,
            )  # fmt: skip

        reduces = comm_type is CommOverlapType.RS
        return overlapped(gemm, comm_overlap, reduces, extra_output, bulk_overlap)
    A, B = _plain(A, transa), _plain(B, not transb)  # along what is summed over
    left, right = B.reshape(-1, B.shape[-1]), A.reshape(-1, A.shape[-1])
    product = (left.t() if transb else left) @ (right.t() if transa else right)
    if alpha != 1.0:
        product = product * alpha
    if bias is not None and not grad:
        product = product + bias
    shape = product.shape if transb else (*B.shape[:-1], product.shape[-1])
    product = product.view(shape)
    if accumulate:
        out.mul_(1.0 if beta is None else beta).add_(product)
    elif out is not None:
        out.copy_(product)
    else:
        out = product.to(_TORCH[out_dtype]) if out_dtype is not None else product
    bias_grad = left.sum(0, dtype=torch.float32).to(bias.dtype) if grad and bias is not None else None
    return out, bias_grad, None, None


def te_general_grouped_gemm(
    A, transa, B, transb, out, out_dtype, m_splits, bias, bias_type, single_output, gelu_in, grad, workspaces,
    workspace_size, accumulate, use_split_accumulator, sm_count,
):  # fmt: skip
    """A GEMM for each expert, its part of `out` the next m_splits rows (`single_output`) or a tensor of its
    own; biases are added, or with `grad` their gradients written into `bias`."""
    parts = out[0].split(list(m_splits)) if single_output else out
    for expert, part in enumerate(parts):
        own = bias[expert] if len(bias) and bias[expert].numel() else None
        _, bias_grad, _, _ = generic_gemm(
            A[expert], transa, B[expert], transb, part, None, out_dtype, own, bias_type, False, None, grad,
            None, 0, accumulate, use_split_accumulator,
        )  # fmt: skip
        if bias_grad is not None:
            own.copy_(bias_grad)
    return bias


# ---- packed sequences ----
def convert_thd_to_bshd(packed, bounds, batch, longest):
    """[tokens, heads, dim] and the sequences' bounds [batch + 1] -> [batch, longest, heads, dim]."""
    parts = [packed[start:stop] for start, stop in pairwise(bounds.tolist())]
    padded = packed.new_zeros(batch, longest, *packed.shape[1:])
    for row, part in zip(padded, parts, strict=True):
        row[: len(part)] = part
    return padded


def convert_bshd_to_thd(padded, bounds, tokens):
    """The inverse."""
    packed = padded.new_zeros(tokens, *padded.shape[2:])
    for row, (start, stop) in zip(padded, pairwise(bounds.tolist()), strict=True):
        packed[start:stop] = row[: stop - start]
    return packed


# ---- norms ----
def _gain(weight, zero_centered):
    return weight.float() + 1 if zero_centered else weight.float()


def _written(result, out, dtype, quantizer):
    result = result.to(_TORCH.get(dtype, dtype))
    if quantizer is not None:
        return quantize(result, quantizer, out)
    return result if out is None else out.copy_(result)


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered):
    """x [n, h] -> (normalised, None, reciprocal RMS [n] fp32)."""
    rsigma = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
    return (
        _written(x.float() * rsigma.unsqueeze(-1) * _gain(weight, zero_centered), out, dtype, quantizer),
        None,
        rsigma,
    )


def rmsnorm_bwd(dz, x, rsigma, weight, sm_margin, zero_centered):
    """Gradients of x and weight."""
    dz, normal = dz.float().view(x.shape), x.float() * rsigma.unsqueeze(-1)
    d_normal = dz * _gain(weight, zero_centered)
    dx = rsigma.unsqueeze(-1) * (d_normal - normal * (d_normal * normal).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz * normal).sum(0).to(weight.dtype)


def layernorm_fwd(x, weight, bias, eps, out, quantizer, dtype, sm_margin, zero_centered):
    """x [n, h] -> (normalised, mean [n] fp32, reciprocal deviation [n] fp32)."""
    mu = x.float().mean(-1)
    centred = x.float() - mu.unsqueeze(-1)
    rsigma = torch.rsqrt(centred.pow(2).mean(-1) + eps)
    result = centred * rsigma.unsqueeze(-1) * _gain(weight, zero_centered) + bias.float()
    return _written(result, out, dtype, quantizer), mu, rsigma


def layernorm_bwd(dz, x, mu, rsigma, weight, sm_margin, zero_centered):
    """Gradients of x, weight and bias."""
    dz, normal = dz.float().view(x.shape), (x.float() - mu.unsqueeze(-1)) * rsigma.unsqueeze(-1)
    d_normal = dz * _gain(weight, zero_centered)
    inner = d_normal - d_normal.mean(-1, keepdim=True) - normal * (d_normal * normal).mean(-1, keepdim=True)
    dx = rsigma.unsqueeze(-1) * inner
    return dx.to(x.dtype), (dz * normal).sum(0).to(weight.dtype), dz.sum(0).to(weight.dtype)


# ---- softmax ----
def _softmax(x, scale, hidden=None, fill=-10000.0):
    scores = x.float() * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, fill)
    return torch.softmax(scores, -1).to(x.dtype)


def _softmax_backward(dy, y, scale):
    dy, y_ = dy.float(), y.float()
    return (scale * y_ * (dy - (dy * y_).sum(-1, keepdim=True))).to(y.dtype)


def _after_diagonal(x, shift):
    rows, columns = x.shape[-2:]
    return torch.ones(rows, columns, dtype=torch.bool, device=x.device).triu(1 + shift)


def scaled_softmax_forward(x, scale):
    """softmax(scale x) over the last dimension."""
    return _softmax(x, scale)


def scaled_masked_softmax_forward(x, mask, scale):
    """x [b, heads, sq, sk]; mask [b or 1, 1, sq, sk], true: hidden; a row that sees nothing gives zeros."""
    hidden = mask.bool()
    return _softmax(x, scale, hidden).masked_fill(hidden.all(-1, keepdim=True), 0)


def scaled_upper_triang_masked_softmax_forward(x, scale):
    """x [b * heads, s, s], causal."""
    return _softmax(x, scale, _after_diagonal(x, 0), float("-inf"))


def scaled_aligned_causal_masked_softmax_forward(x, scale):
    """x [b, heads, sq, sk], causal with the last query at the last key."""
    return _softmax(x, scale, _after_diagonal(x, x.shape[-1] - x.shape[-2]), float("-inf"))


scaled_softmax_backward = scaled_masked_softmax_backward = _softmax_backward
scaled_upper_triang_masked_softmax_backward = _softmax_backward
scaled_aligned_causal_masked_softmax_backward = _softmax_backward


# ---- optimizer ----
def multi_tensor_l2norm(chunk_size, noop, lists, per_tensor=False):
    """Norm of all tensors together [1], and of each of them when asked."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms[:0]


def _scale_into(noop, sources, targets, scale):
    for source, target in zip(sources, targets, strict=True):
        if not torch.isfinite(source).all():
            noop.fill_(1)
        target.copy_(source.float() * scale)


def multi_tensor_scale(chunk_size, noop, lists, scale):
    """lists[1] = scale * lists[0]; sets the flag when something is not finite."""
    _scale_into(noop, *lists, scale)


def multi_tensor_scale_tensor(chunk_size, noop, lists, scale):
    """The same with the scale in a tensor [1]."""
    _scale_into(noop, *lists, scale)


def multi_tensor_adam(
    chunk_size, noop, lists, lr, beta1, beta2, eps, step, decoupled, bias_correction, weight_decay
):
    """lists: gradients, parameters, first moments, second moments (and fp32 masters). decoupled: AdamW."""
    correct1 = 1 - beta1**step if bias_correction else 1.0
    correct2 = 1 - beta2**step if bias_correction else 1.0
    for grad, param, m, v, *master in zip(*lists, strict=True):
        p = (master[0] if master else param).float()
        g = grad.float() if decoupled else grad.float() + weight_decay * p
        m.copy_(beta1 * m.float() + (1 - beta1) * g)
        v.copy_(beta2 * v.float() + (1 - beta2) * g * g)
        update = (m.float() / correct1) / ((v.float() / correct2).sqrt() + eps)
        p = p - lr * (update + weight_decay * p if decoupled else update)
        for target in (param, *master):
            target.copy_(p)


def _missing(name):
    def kernel(*args, **kwargs):
        raise NotImplementedError(f"the stand-in for transformer_engine_torch has no kernel {name}")

    kernel.__name__ = name
    return kernel


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(name)
