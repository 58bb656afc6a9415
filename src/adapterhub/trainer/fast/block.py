"""One decoder layer with its backward written by hand, so that what it keeps is chosen and nothing else is
kept.

The layer is the pre-norm block of LLaMA and its relatives: x + o(attention(rotate(qkv(norm(x))))), then the
same with the gated MLP. Three levels of keeping, by layer (``ledger.kept_bytes`` counts them):

======  =========================================================================  ==========================
level   kept from forward to backward                                              computed again in backward
======  =========================================================================  ==========================
none    x; q, k, v; attention's output and log-sum-exp; the residual x₂; gate, up  norms, the gated product
mlp     the same without gate and up                                               also gate and up
all     x                                                                          all but the last product
======  =========================================================================  ==========================

The last product (down) is never computed again: nothing in the layer's backward needs its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from adapterhub.trainer.activations import Level
from adapterhub.trainer.fast.attention import Kept, Sequences, attend, attend_backward
from adapterhub.trainer.fast.offload import Offloader
from adapterhub.trainer.fast.products import Products
from adapterhub.trainer.fast.reference import Activation
from adapterhub.trainer.fast.weights import Group


@dataclass(frozen=True)
class Norm:
    """An RMSNorm."""

    weight: torch.Tensor
    """(features)."""
    eps: float
    offset: float
    """Added to the weight: 1 in Gemma."""


@dataclass(frozen=True)
class Batch:
    """What every layer of one forward pass shares."""

    cos: torch.Tensor
    """(T, d)."""
    sin: torch.Tensor
    """(T, d)."""
    sequences: Sequences
    seed: int | None
    """Draws dropout masks, one more for each layer and product; None: nothing is dropped."""
    backward: bool
    """Whether a backward pass follows, for which the layers keep something."""


@dataclass(frozen=True)
class Engine:
    """What all layers compute with."""

    products: Products
    operations: ModuleType
    """``kernels`` on CUDA, ``reference`` on the CPU."""
    offloader: Offloader | None
    """Moves the inputs of layers that keep nothing else to the host, if the plan says so."""


@dataclass
class Values:
    """A layer's intermediate values; the ones that are not kept are None.

    Mutable, so that backward gives up a value's memory as soon as it has been used, whoever else holds this
    object.
    """

    x: torch.Tensor
    """(T, h): the layer's input."""
    rstd: torch.Tensor | None = None
    """float32 (T), of the first norm."""
    qkv: torch.Tensor | None = None
    """(T, q + 2 kv): rotated, but raw where heads are normed (the norm's backward needs that)."""
    attention: Kept | None = None
    residual: torch.Tensor | None = None
    """(T, h): x₂, the input of the second half."""
    rstd_2: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    """(T, 2i)."""


class Block:
    """A decoder layer: frozen weights, adapters, and how much it keeps."""

    def __init__(
        self,
        engine: Engine,
        *,
        index: int,
        qkv: Group,
        output: Group,
        gate_up: Group,
        down: Group,
        norms: tuple[Norm, Norm],
        head_norms: tuple[Norm, Norm] | None,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        rotary: bool,
        window: int | None,
        activation: Activation,
        level: Level,
    ) -> None:
        self.engine = engine
        self.index = index
        self.qkv, self.output, self.gate_up, self.down = qkv, output, gate_up, down
        self.norms, self.head_norms = norms, head_norms
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.scale, self.rotary, self.window = scale, rotary, window
        self.activation, self.level = activation, level

    @property
    def groups(self) -> tuple[Group, ...]:
        """Its products' weights, in the order of use."""
        return (self.qkv, self.output, self.gate_up, self.down)

    @property
    def offloads(self) -> bool:
        """Whether the layer's input, the only thing it keeps, waits on the host."""
        return self.level == "all" and self.engine.offloader is not None

    @property
    def offloader(self) -> Offloader:
        """The engine's, which ``offloads`` says is there."""
        assert self.engine.offloader is not None
        return self.engine.offloader

    def forward(self, x: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Values]:
        """The layer's output for ``x``, both (T, h), and what its level keeps."""
        values = self._second_half(self._first_half(Values(x), batch), batch)
        assert values.gate_up is not None
        product = self.engine.operations.gate_forward(values.gate_up, self.activation)
        out = self.engine.products.forward(self.down, product, self._seed(batch, 3), values.residual)
        if self.level == "all":
            return out, Values(x)
        if self.level == "mlp":
            values.gate_up = None
        return out, values

    def backward(
        self, values: Values, grad: torch.Tensor, batch: Batch, *, input_needed: bool
    ) -> torch.Tensor | None:
        """Add the adapters' gradients; return the gradient of the input (T, h).

        ``grad`` (T, h) is overwritten: it carries the gradient along the residual connection. ``values`` is
        used up.
        """
        if values.qkv is None:
            self._first_half(values, batch)
        if values.gate_up is None:
            self._second_half(values, batch)
        self._mlp_backward(values, grad, batch)
        return self._attention_backward(values, grad, batch, input_needed=input_needed)

    def _first_half(self, values: Values, batch: Batch) -> Values:
        """Norm, query, key and value, attention, and its output added to x; all of them set in ``values``."""
        products, operations = self.engine.products, self.engine.operations
        norm = self.norms[0]
        normed, values.rstd = operations.norm_forward(values.x, norm.weight, norm.eps, norm.offset)
        values.qkv = qkv = products.forward(self.qkv, normed, self._seed(batch, 0))
        del normed
        if self.head_norms is None and self.rotary:
            for heads in self._split(qkv)[:2]:
                operations.rotate(heads, batch.cos, batch.sin, heads)
        q, k, v = self._queries(qkv, batch)
        values.attention = attend(q, k, v, batch.sequences, self.scale, self.window)
        out = values.attention.out.flatten(1)
        values.residual = products.forward(self.output, out, self._seed(batch, 1), values.x)
        return values

    def _second_half(self, values: Values, batch: Batch) -> Values:
        """Norm, gate and up; set in ``values``."""
        assert values.residual is not None
        operations, norm = self.engine.operations, self.norms[1]
        normed, values.rstd_2 = operations.norm_forward(values.residual, norm.weight, norm.eps, norm.offset)
        values.gate_up = self.engine.products.forward(self.gate_up, normed, self._seed(batch, 2))
        return values

    def _mlp_backward(self, values: Values, grad: torch.Tensor, batch: Batch) -> None:
        """Turn ``grad`` from the gradient of the output into that of the residual x₂, in place."""
        products, operations, norm = self.engine.products, self.engine.operations, self.norms[1]
        assert values.gate_up is not None
        assert values.residual is not None
        assert values.rstd_2 is not None
        inner = products.inner_gradient(self.down, grad)
        product = products.input_gradient(self.down, grad, inner, self._seed(batch, 3))
        operations.gate_backward(
            values.gate_up, product, self.activation
        )  # now the product and gate_up's gradient
        products.adapter_gradients(self.down, product, grad, inner, self._seed(batch, 3))
        del product, inner
        normed = operations.norm_again(values.residual, norm.weight, values.rstd_2, norm.offset)
        grad_normed = self._group_backward(self.gate_up, normed, values.gate_up, self._seed(batch, 2))
        values.gate_up = None
        operations.norm_backward(grad_normed, values.residual, norm.weight, values.rstd_2, norm.offset, grad)

    def _attention_backward(
        self, values: Values, grad: torch.Tensor, batch: Batch, *, input_needed: bool
    ) -> torch.Tensor | None:
        """From the gradient of the residual x₂ to that of x, in place."""
        operations, norm = self.engine.operations, self.norms[0]
        assert values.qkv is not None
        assert values.attention is not None
        assert values.rstd is not None
        out = values.attention.out
        grad_out = self._group_backward(self.output, out.flatten(1), grad, self._seed(batch, 1))
        q, k, v = self._queries(values.qkv, batch)
        grads = attend_backward(
            grad_out.view(out.shape), q, k, v, values.attention, batch.sequences, self.scale, self.window
        )
        del grad_out, q, k, v
        grad_qkv = self._join(grads, values.qkv, batch)
        del grads
        normed = operations.norm_again(values.x, norm.weight, values.rstd, norm.offset)
        if not input_needed:
            products = self.engine.products
            inner = products.inner_gradient(self.qkv, grad_qkv)
            products.adapter_gradients(self.qkv, normed, grad_qkv, inner, self._seed(batch, 0))
            return None
        grad_normed = self._group_backward(self.qkv, normed, grad_qkv, self._seed(batch, 0))
        operations.norm_backward(grad_normed, values.x, norm.weight, values.rstd, norm.offset, grad)
        return grad

    def _group_backward(
        self, group: Group, x: torch.Tensor, grad: torch.Tensor, seed: int | None
    ) -> torch.Tensor:
        """Add the group's adapter gradients and return its input's gradient."""
        products = self.engine.products
        inner = products.inner_gradient(group, grad)
        products.adapter_gradients(group, x, grad, inner, seed)
        return products.input_gradient(group, grad, inner, seed)

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query (T, heads, head_dim), key and value (T, kv heads, head_dim), as views."""
        counts = (self.heads, self.kv_heads, self.kv_heads)
        parts = qkv.split([count * self.head_dim for count in counts], dim=1)
        q, k, v = (
            part.unflatten(1, (count, self.head_dim)) for part, count in zip(parts, counts, strict=True)
        )
        return q, k, v

    def _queries(self, qkv: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What attention takes: views of rotated ``qkv``, or normed and rotated copies where heads are
        normed.
        """
        q, k, v = self._split(qkv)
        if self.head_norms is None:
            return q, k, v
        copies = []
        for heads, norm in zip((q, k), self.head_norms, strict=True):
            flat, _ = self.engine.operations.norm_forward(
                heads.reshape(-1, self.head_dim), norm.weight, norm.eps, norm.offset
            )
            normed = flat.view(heads.shape)
            if self.rotary:
                self.engine.operations.rotate(normed, batch.cos, batch.sin, normed)
            copies.append(normed)
        return copies[0], copies[1], v

    def _join(
        self, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor], qkv: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        """The gradient of the ``qkv`` product (T, q + 2 kv) from those of rotated q and k, and of v."""
        operations = self.engine.operations
        joined = torch.empty_like(qkv)
        targets, sources = self._split(joined), self._split(qkv)
        no_angles = batch.cos[:, :0]
        operations.rotate(grads[2], no_angles, no_angles, targets[2])  # a copy of strided heads
        for index in (0, 1):
            grad, target = grads[index], targets[index]
            if self.rotary:
                operations.rotate(grad, batch.cos, batch.sin, target, backward=True)
            else:
                target.copy_(grad)
            if self.head_norms is not None:
                norm = self.head_norms[index]
                raw = sources[index].reshape(-1, self.head_dim)
                _, rstd = operations.norm_forward(raw, norm.weight, norm.eps, norm.offset)
                into = torch.zeros_like(raw)
                operations.norm_backward(
                    target.reshape(-1, self.head_dim), raw, norm.weight, rstd, norm.offset, into
                )
                target.copy_(into.view(target.shape))
        return joined

    def _seed(self, batch: Batch, product: int) -> int | None:
        return None if batch.seed is None else batch.seed + 64 * self.index + 16 * product


class LayerFunction(torch.autograd.Function):
    """A block in autograd's graph. Adapter gradients are added to their buffer; autograd sees only the
    input's.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, anchor: torch.Tensor, block: Block, batch: Batch) -> torch.Tensor:
        """``anchor`` is any tensor that requires a gradient: it makes backward run though the embeddings are
        frozen.
        """
        with torch.autocast(x.device.type, enabled=False):
            out, kept = block.forward(x, batch)
        if batch.backward:
            ctx.block, ctx.batch = block, batch
            if block.offloads:
                block.offloader.store(block.index, x)
            else:
                ctx.kept = kept
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        block: Block = ctx.block
        if block.offloads:
            values = Values(block.offloader.fetch(block.index))
        else:
            values, ctx.kept = ctx.kept, None
        grad = grads[0].contiguous()
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = block.backward(values, grad, ctx.batch, input_needed=ctx.needs_input_grad[0])
        return grad_x, None, None, None
