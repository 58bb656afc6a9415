"""How faithfully one model stands in for another: two loaded models over the same tokens, streamed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from adapterhub.errors import ReleaseError
from adapterhub.packaging.evidence import FidelityFigures, LayerError
from adapterhub.packaging.unwrapping import unwrap

if TYPE_CHECKING:
    import torch

Report = Callable[[int, int], None]
"""Told the texts that are done, and all of them."""

# Tokens whose distributions are compared at a time: bounds the float32 work at a few hundred MB for a
# vocabulary of 256k.
_TOKENS_AT_ONCE = 64


def compare_models(
    reference: Any, candidate: Any, texts: Sequence[Sequence[int]], *, report: Report = lambda _d, _a: None
) -> FidelityFigures:
    """Run both models over ``texts`` (token ids, each at least 2) and compare what they predict.

    ``reference`` and ``candidate`` are causal language models of transformers, a PeftModel among them, on any
    device, in evaluation mode. Distributions are compared in float32; memory holds one text's logits of
    each and a number a token. Raises ReleaseError when the vocabularies or the numbers of layers differ, or
    when a model's answer is not a finite number.
    """
    import torch

    _check_alike(reference, candidate)
    kl: list[torch.Tensor] = []
    agreeing, reference_nats, candidate_nats = 0, 0.0, 0.0
    with torch.inference_mode(), _watched_layers(reference, candidate) as watch:
        for number, ids in enumerate(texts, 1):
            watch.begin_text()
            expected, found = _logits(reference, ids), _logits(candidate, ids)
            targets = torch.tensor(ids[1:], device=expected.device)
            for at in range(0, len(targets), _TOKENS_AT_ONCE):
                rows = slice(at, at + _TOKENS_AT_ONCE)
                p = torch.log_softmax(expected[rows].float(), dim=-1)
                q = torch.log_softmax(found[rows].to(p.device).float(), dim=-1)
                kl.append((p.exp() * (p - q)).sum(dim=-1).cpu())
                agreeing += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
                own = targets[rows, None]
                reference_nats -= float(p.gather(1, own).double().sum())
                candidate_nats -= float(q.gather(1, own).double().sum())
            report(number, len(texts))
    all_kl = torch.cat(kl).double()
    tokens = len(all_kl)
    if not torch.isfinite(all_kl).all():
        raise ReleaseError(
            "a model's predictions are not finite numbers", "its weights are damaged or overflow: verify both"
        )
    return FidelityFigures(
        tokens=tokens,
        kl_mean=float(all_kl.mean()),
        # By sorting: torch.quantile refuses more than 16 million numbers.
        kl_p99=float(all_kl.sort().values[math.ceil(0.99 * tokens) - 1]),
        top1_agreement=agreeing / tokens,
        reference_nll=reference_nats / tokens,
        candidate_nll=candidate_nats / tokens,
        reference_perplexity=math.exp(reference_nats / tokens),
        candidate_perplexity=math.exp(candidate_nats / tokens),
        layers=watch.errors(),
    )


def decoder_layers(model: Any) -> list[tuple[str, torch.nn.Module]]:
    """The decoder layers of a causal language model with their names in it, first to last.

    A PeftModel's are named as in its base. Raises ReleaseError for a model that keeps them elsewhere.
    """
    plain = unwrap(model)
    layers = getattr(plain.get_decoder(), "layers", None)
    if layers is None:
        raise ReleaseError(
            f"where a {type(plain).__name__} keeps its decoder layers is not known here",
            "name a decoder whose layers transformers lists as model.layers",
        )
    names = {module: name for name, module in plain.named_modules()}
    return [(names[layer], layer) for layer in layers]


def hidden_states(output: Any) -> torch.Tensor:
    """A decoder layer's hidden states; some models return them first in a tuple."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class _LayerWatch:
    """Sums over tokens of each layer's relative error; holds one text's outputs of the reference."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._outputs: dict[int, torch.Tensor] = {}
        self._sums = [0.0] * len(names)
        self._tokens = 0

    def begin_text(self) -> None:
        self._outputs.clear()

    def keep(self, layer: int, output: Any) -> None:
        self._outputs[layer] = hidden_states(output)

    def compare(self, layer: int, output: Any) -> None:
        expected = self._outputs.pop(layer).float()
        difference = hidden_states(output).to(expected.device).float() - expected
        shares = difference.norm(dim=-1) / expected.norm(dim=-1)  # (1, tokens)
        self._sums[layer] += float(shares.double().sum())
        self._tokens += shares.numel() if layer == 0 else 0

    def errors(self) -> tuple[LayerError, ...]:
        return tuple(
            LayerError(name=name, relative_error=total / self._tokens)
            for name, total in zip(self._names, self._sums, strict=True)
        )


@contextmanager
def _watched_layers(reference: Any, candidate: Any) -> Iterator[_LayerWatch]:
    layers = decoder_layers(reference)
    watch = _LayerWatch([name for name, _layer in layers])

    def hook(index: int, tell: Callable[[int, Any], None]) -> Callable[[Any, Any, Any], None]:
        return lambda _module, _inputs, output: tell(index, output)

    handles = [
        layer.register_forward_hook(hook(index, watch.keep)) for index, (_name, layer) in enumerate(layers)
    ]
    handles += [
        layer.register_forward_hook(hook(index, watch.compare))
        for index, (_name, layer) in enumerate(decoder_layers(candidate))
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """The predictions for all tokens but the first, (tokens - 1, vocabulary), in the model's dtype."""
    import torch

    logits: torch.Tensor = model(
        input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False
    ).logits
    return logits[0, :-1]


def _check_alike(reference: Any, candidate: Any) -> None:
    for what, expected, found in (
        ("vocabulary", reference.config.vocab_size, candidate.config.vocab_size),
        ("number of decoder layers", len(decoder_layers(reference)), len(decoder_layers(candidate))),
    ):
        if expected != found:
            raise ReleaseError(
                f"the two models differ in their {what}: {expected} and {found}",
                "compare models of the same base",
            )
