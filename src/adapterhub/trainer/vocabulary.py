"""New tokens: added to the tokenizer, given rows in the model, and given them again when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.errors import RecipeError, ReleaseError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from adapterhub.packaging.adapter import Adapter


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> dict[int, list[int]]:
    """Add ``tokens``; for the id of each, the ids that it was spelled with before.

    They are matched as they stand and decoded like words. Raises RecipeError for one that is known already,
    or that the tokenizer's decoder does not give back.
    """
    from tokenizers import AddedToken

    spelled = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    known = [token for token in tokens if token in tokenizer.get_vocab()]
    if known:
        raise RecipeError(
            f"lora.new_tokens: the base's tokenizer knows {', '.join(map(repr, known))} already",
            "leave it out: its row of the embeddings is the base's",
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in tokens]
    garbled = [
        token for token, number in zip(tokens, ids, strict=True) if tokenizer.decode([number]) != token
    ]
    if garbled:
        raise RecipeError(
            f"lora.new_tokens: this tokenizer would decode {garbled[0]!r} as something else",
            "use ASCII characters without spaces at the ends",
        )
    return dict(zip(ids, spelled, strict=True))


def grow_vocabulary(model: PreTrainedModel, size: int) -> None:
    """Give the model rows for ``size`` tokens, if it has fewer; new ones hold nothing yet."""
    embeddings: Any = model.get_input_embeddings()
    if embeddings.weight.shape[0] < size:
        model.resize_token_embeddings(size, mean_resizing=False)


def start_rows(model: PreTrainedModel, spelled: Mapping[int, Sequence[int]]) -> None:
    """Set the row of each new token to the mean of the rows that it was spelled with before, in embeddings
    and head.
    """
    import torch

    with torch.no_grad():
        for module in _tables(model).values():
            for token, parts in spelled.items():
                module.weight[token] = module.weight[list(parts)].float().mean(dim=0)
    model.requires_grad_(False)  # resizing makes tables anew


def trained_rows(model: PreTrainedModel, token_ids: Sequence[int]) -> dict[str, list[int]]:
    """peft's ``trainable_token_indices`` for these rows: of the embeddings, and of a head that is not tied.

    peft gives a tied head the rows of the embeddings itself.
    """
    return {name: sorted(token_ids) for name in _tables(model)}


def grow_for_adapter(model: PreTrainedModel, rows: Mapping[str, Sequence[int]] | Sequence[int]) -> None:
    """Give ``model`` the rows that a release's ``trainable_token_indices`` fill. Raises ReleaseError when
    they would leave a gap.
    """
    listed = [list(numbers) for numbers in rows.values()] if isinstance(rows, Mapping) else [list(rows)]
    embeddings: Any = model.get_input_embeddings()
    held = int(embeddings.weight.shape[0])
    for numbers in listed:
        beyond = sorted(number for number in numbers if number >= held)
        if beyond != list(range(held, held + len(beyond))):
            raise ReleaseError(
                f"the adapter trains rows {beyond[:3]}… of embeddings with {held} rows",
                "load it on the base it was trained on",
            )
    grow_vocabulary(model, max((max(numbers) + 1 for numbers in listed if numbers), default=held))


def resize_for_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """Give ``model`` as many tokens as the embeddings have that ``adapter`` saved whole."""
    embeddings: Any = model.get_input_embeddings()
    own = next(name for name, module in model.named_modules() if module is embeddings)
    saved = adapter.whole.get(f"{own}.weight")
    if saved is not None and saved.shape[0] != embeddings.weight.shape[0]:
        model.resize_token_embeddings(saved.shape[0], mean_resizing=False)
        model.requires_grad_(False)  # resizing makes tables anew


def _tables(model: PreTrainedModel) -> dict[str, Any]:
    """The embeddings, and the head where it has weights of its own, by the last part of their names."""
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    apart = head is not None and head.weight.data_ptr() != embeddings.weight.data_ptr()
    wanted = [embeddings, head] if apart else [embeddings]
    return {
        name.rpartition(".")[2]: module
        for name, module in model.named_modules()
        if any(module is table for table in wanted)
    }
