"""The fast path's products inside transformers' own layers, for architectures without a hand-written one.

Every adapted 4-bit linear keeps its input and nothing else; its weight is dequantized once a pass, with its
adapter folded in. Norms, attention and activations stay transformers'.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch

from adapterhub.trainer.fast import adapt
from adapterhub.trainer.fast.flat import FlatAdapters
from adapterhub.trainer.fast.products import Products
from adapterhub.trainer.fast.weights import Group


class LinearFunction(torch.autograd.Function):
    """One adapted linear in autograd's graph. Adapter gradients are added to their buffer; autograd sees only
    the input's.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, anchor: torch.Tensor, group: Group, products: Products, seed: int | None
    ) -> torch.Tensor:
        """``x`` (…, inputs) -> (…, outputs) in its dtype; ``anchor`` requires a gradient, so that backward
        runs though neither weights nor embeddings do.
        """
        ctx.save_for_backward(x)  # through autograd's hooks: a layer that is recomputed keeps nothing
        ctx.group, ctx.products, ctx.seed = group, products, seed
        with torch.autocast(x.device.type, enabled=False):
            y = products.forward(group, _rows(x, products), seed)
        return y.view(*x.shape[:-1], group.outputs).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        (x,) = ctx.saved_tensors
        group, products, seed = ctx.group, ctx.products, ctx.seed
        with torch.autocast(x.device.type, enabled=False):
            grad = _rows(grads[0], products)
            inner = products.inner_gradient(group, grad)
            products.adapter_gradients(group, _rows(x, products), grad, inner, seed)
            if not ctx.needs_input_grad[0]:
                return None, None, None, None, None
            grad_x = products.input_gradient(group, grad, inner, seed)
        return grad_x.view(x.shape).to(x.dtype), None, None, None, None


def adapted_modules(causal: Any) -> Iterator[Any]:
    """The modules of peft that have an adapter, in the model's order."""
    return (module for module in causal.modules() if adapt.is_adapted(module))


def adapter_parameters(causal: Any) -> Iterator[torch.nn.Parameter]:
    """Every adapter's weights in the order that the flat buffer needs: A, then B, module by module."""
    for module in adapted_modules(causal):
        yield module.lora_A[adapt.ADAPTER].weight
        yield module.lora_B[adapt.ADAPTER].weight


def take_over(causal: Any, flat: FlatAdapters, products: Products, anchor: torch.Tensor) -> None:
    """Send each adapted module's forward through ``products``; see ``give_back``."""
    for module in adapted_modules(causal):
        group = Group([adapt.linear_of(module, flat)])
        products.reserve(group)
        module.forward = MethodType(_forward(module.forward, group, products, anchor), module)


def give_back(causal: Any) -> None:
    """Let each adapted module compute as peft has it again."""
    for module in adapted_modules(causal):
        vars(module).pop("forward", None)


def _forward(plain: Any, group: Group, products: Products, anchor: torch.Tensor) -> Any:
    def forward(module: Any, x: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        if module.disable_adapters or arguments or named:
            return plain(x, *arguments, **named)
        # Drawn from torch's own generator, which recomputation winds back.
        seed = int(torch.randint(2**31, ())) if module.training and group.drops else None
        return LinearFunction.apply(x, anchor, group, products, seed)

    return forward


def _rows(x: torch.Tensor, products: Products) -> torch.Tensor:
    """``x`` (…, features) as (T, features), contiguous, in the dtype of the products."""
    return x.reshape(-1, x.shape[-1]).to(products.dtype).contiguous()
