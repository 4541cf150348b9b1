"""Kernels of Transformer Engine as shapes: what its C++ extension would return, without numbers.

Seen with Transformer Engine 2.20. Each kernel makes its results with PyTorch on the simulated
device, so that memory is counted there, and says what it costs.

Symbols as in the extension's own signatures; ``A``, ``B`` are in column-major order there, so that
``generic_gemm(A, True, B, False)`` is B A^T.
"""

import enum
from typing import Any

import torch
from torch import Tensor

from megatron_espo.simulate.cuda import device


class DType(enum.IntEnum):
    """Element types as the extension numbers them."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


_TORCH = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    """Backends of fused attention."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


def _kernel(name: str, flops: float, moved: float, *, fp8: bool = False) -> None:
    device().ledger.kernel(name, flops, moved, fp8=fp8)


def _bytes(*tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def is_quantized(value: object) -> bool:
    """Whether a value is one of Transformer Engine's quantized tensors."""
    return hasattr(value, "_fp8_dtype")


def _item(value: Any) -> int:
    return 1 if is_quantized(value) else int(value.element_size())


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, where: Any, pinned: bool = False
) -> Any:
    """Make a quantized tensor with the buffers that the quantizer's usage asks for."""
    inner = quantizer.alloc_tensors(tuple(shape), device=where)
    context = quantizer.create_metadata(shape, dtype=dtype)
    return context["cls"].__tensor_unflatten__(inner, context, tuple(shape), None)


def quantize(tensor: Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    """Cast to FP8: one kernel a tensor, and one more for its largest entry with current scaling."""
    copies = int(quantizer.rowwise_usage) + int(quantizer.columnwise_usage)
    _kernel("quantize", 0, _bytes(tensor) + copies * tensor.numel())
    if type(quantizer).__name__ == "Float8CurrentScalingQuantizer":
        _kernel("amax", 0, _bytes(tensor))
        if quantizer.with_amax_reduction:
            largest = torch.empty(1, dtype=torch.float32, device=tensor.device)
            torch.distributed.all_reduce(
                largest, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group
            )
    if out is None:
        out = create_empty_quantized_tensor(
            quantizer, list(tensor.shape), tensor.dtype, tensor.device
        )
    return out


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    """Cast from FP8."""
    out = torch.empty(tuple(tensor.size()), dtype=_TORCH[int(dtype)], device=tensor.device)
    _kernel("dequantize", 0, _bytes(out) + out.numel())
    return out


def bgrad_quantize(grad: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """Sum a gradient over the tokens for the bias, and cast it."""
    bias = torch.empty(grad.size(-1), dtype=grad.dtype, device=grad.device)
    return bias, quantize(grad, quantizer)


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """Transpose FP8 data: the last dimension first."""
    _kernel("fp8_transpose", 0, 2 * _bytes(data))
    if out is not None:
        return out
    shape = (data.size(-1), *data.shape[:-1])
    return torch.empty(shape, dtype=data.dtype, device=data.device)


def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Exchange the first two dimensions."""
    _kernel("swap_first_dims", 0, 2 * _bytes(tensor))
    if out is not None:
        return out
    shape = (tensor.size(1), tensor.size(0), *tensor.shape[2:])
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    out: Any,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    split: bool,
    **rest: Any,
) -> tuple[Any, Tensor | None, None, Any]:
    """Multiply matrices; operands in FP8 must have dimensions in multiples of 16."""
    a, b = tuple(A.size()), tuple(B.size())
    rows_a, rows_b = _rows(a), _rows(b)
    n, inner_a = (rows_a, a[-1]) if transa else (a[-1], rows_a)
    lead, inner = ((b[-1],), rows_b) if transb else (b[:-1], b[-1])
    if inner != inner_a:
        raise RuntimeError(f"matrix product of {a} and {b} ({transa}, {transb})")
    m = 1
    for length in lead:
        m *= length
    fp8 = is_quantized(A) or is_quantized(B)
    if fp8:
        for length in (m, n, inner):
            if length % 16:
                raise RuntimeError(
                    f"FP8 matrix product of {m} x {inner} x {n}: dimensions must be multiples of 16"
                )
    dtype = _TORCH[int(out_dtype)] if out_dtype is not None else getattr(out, "dtype", B.dtype)
    if out is None:
        out = torch.empty(*lead, n, dtype=dtype, device=A.device)
    moved = m * inner * _item(B) + n * inner * _item(A)
    moved += m * n * out.element_size() * (2 if accumulate else 1)
    _kernel("generic_gemm", 2.0 * m * n * inner, moved, fp8=fp8)
    bias_grad = None
    if grad and bias is not None:
        bias_grad = torch.empty(bias.shape, dtype=bias.dtype, device=A.device)
    return out, bias_grad, None, rest.get("extra_output")


def _rows(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape[:-1]:
        total *= length
    return total


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    otype: Any,
    margin: int,
    zero_centered: bool,
) -> tuple[Any, None, Tensor]:
    """Normalise rows; with a quantizer the result is cast in the same kernel or after it."""
    dtype = otype if isinstance(otype, torch.dtype) else _TORCH.get(int(otype), x.dtype)
    scales = torch.empty(x.numel() // x.size(-1), dtype=torch.float32, device=x.device)
    _kernel("rmsnorm_fwd", 0, 2 * _bytes(x))
    if quantizer is None:
        return (torch.empty_like(x, dtype=dtype) if out is None else out), None, scales
    if out is not None:
        return quantize(x, quantizer, out), None, scales
    if type(quantizer).__name__ in ("Float8Quantizer", "MXFP8Quantizer"):
        # The norm's own kernel casts.
        made = create_empty_quantized_tensor(quantizer, list(x.shape), x.dtype, x.device)
        return made, None, scales
    return quantize(torch.empty_like(x, dtype=dtype), quantizer), None, scales


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the norm's input and weight."""
    _kernel("rmsnorm_bwd", 0, 3 * _bytes(x))
    return torch.empty_like(x), torch.empty_like(gamma)


def get_fused_attn_backend(parameters: Any) -> tuple[NVTE_Fused_Attn_Backend, str]:
    """Choose cuDNN's kernel for any length; that cuDNN takes the shape is not checked here."""
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


def fused_attn_fwd(*arguments: Any) -> list[Tensor]:
    """Attention of q, k, v ``[s, b, heads, d]``; the scores are never held."""
    training, mask = bool(arguments[2]), arguments[10]
    q, k, v = arguments[16:19]
    s, b, h, d = q.shape
    mode = str(getattr(mask, "name", mask)).removeprefix("NVTE_").lower()
    mode += " training" if training else ""
    device().ledger.attention("cuDNN", b, s, k.size(0), mode)
    _kernel("fused_attn_fwd", 4.0 * b * h * s * k.size(0) * d, 2 * _bytes(q) + _bytes(k, v))
    out = torch.empty(s, b, h, v.size(-1), dtype=q.dtype, device=q.device)
    # The softmax's statistics: made in any case, kept for the backward pass only.
    stats = torch.empty(b, h, s, 1, dtype=torch.float32, device=q.device)
    return [out, stats, torch.empty(2, dtype=torch.int64, device=q.device)]


def fused_attn_bwd(*arguments: Any) -> list[Any]:
    """Gradients of q, k and v."""
    q, k, v = arguments[19:22]
    s, b, h, d = q.shape
    _kernel("fused_attn_bwd", 10.0 * b * h * s * k.size(0) * d, 4 * _bytes(q) + 4 * _bytes(k, v))
    return [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None]


def fused_rope_forward(x: Tensor, freqs: Tensor, *rest: Any) -> Tensor:
    """Rotate q or k."""
    _kernel("fused_rope", 0, 2 * _bytes(x))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


fused_rope_backward = fused_rope_forward


def swiglu(x: Tensor, quantizer: Any, *rest: Any) -> Any:
    """Gate of a feed-forward part."""
    out = torch.empty(*x.shape[:-1], x.size(-1) // 2, dtype=x.dtype, device=x.device)
    _kernel("swiglu", 0, _bytes(x, out))
    return out if quantizer is None else quantize(out, quantizer)


def dswiglu(grad: Tensor, x: Tensor, quantizer: Any, *rest: Any) -> Tensor:
    """Gradient of the gate."""
    _kernel("dswiglu", 0, 2 * _bytes(x) + _bytes(grad))
    return torch.empty_like(x)


def multi_tensor_l2norm(
    chunk: int, flag: Tensor, lists: list[list[Tensor]], per_tensor: bool = False, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Norm over many tensors."""
    _kernel("multi_tensor_l2norm", 0, sum(_bytes(t) for t in lists[0]))
    where = lists[0][0].device
    each = len(lists[0]) if per_tensor else 0
    return torch.zeros(1, device=where), torch.zeros(each, device=where)


def over_tensors(name: str) -> Any:
    """Make a kernel that works in place on lists of tensors, such as Adam's step."""

    def kernel(chunk: int, flag: Tensor, lists: list[list[Tensor]], *rest: Any) -> None:
        _kernel(name, 0, 2 * sum(_bytes(t) for tensors in lists for t in tensors))

    return kernel
