"""What a device computes in: bfloat16 where it multiplies that itself, float32 where it would be emulated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Arithmetic = Literal["bfloat16", "float32"]


def arithmetic_of(device: Literal["cpu", "cuda"]) -> Arithmetic:
    """The dtype of products on ``device``: bfloat16 on CUDA and on processors that oneDNN has kernels for.

    On others (x86 before AVX-512, most desktops among them) torch emulates bfloat16 products, at a quarter of
    the speed of float32 ones and less.
    """
    import torch

    if device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bfloat16"
    return "float32"


def compute_in_float32(model: torch.nn.Module) -> None:
    """Make a loaded model compute in float32, in place, with the very weights that it was loaded with.

    Weights that are not quantized are widened, which is exact; quantized ones stay as they are. bitsandbytes
    dequantizes them to bfloat16, as before, and widens them where gradients are wanted, and straight to
    float32 where not. The products' own rounding to bfloat16 is what goes.
    """
    import torch
    from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
            module.compute_type_is_set = True
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for tensor in tensors:
            if tensor.dtype == torch.bfloat16 and not isinstance(tensor, (Int8Params, Params4bit)):
                tensor.data = tensor.data.float()
