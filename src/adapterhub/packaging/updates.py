"""What an adapter does to each tensor of its base: matched by name, checked by shape, nothing left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256

from adapterhub.errors import ReleaseError
from adapterhub.packaging.adapter import Adapter, LoraPair, is_in
from adapterhub.packaging.checkpoint import Checkpoint
from adapterhub.packaging.combination import CombinedAdapter, CombinedPair
from adapterhub.packaging.tensors import FLOATS, TensorEntry, TensorFile, read_bytes

UNMERGED = "load it unmerged with PEFT, or merge it with PEFT's merge_and_unload"

EMBEDDING_MODULES = ("embed_tokens", "wte")
HEAD = "lm_head.weight"
_WRONG_BASE = "merge it into the base it was trained on"
# Models whose decoder layers hold transformers' Conv1D, which stores its weight as (in, out); a square weight
# does not show it.
_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_IN_A_BLOCK = re.compile(r"(?:.*\.)?h\.\d+\..+")
_CHUNK = 16 * 1024 * 1024


@dataclass(frozen=True)
class Update:
    """What becomes of one tensor, in this order: begun as ``origin``, given rows, added to, rescaled."""

    origin: tuple[TensorFile, TensorEntry] | None = None
    """Where it begins, when that is not the base's tensor of this name."""
    rows: tuple[tuple[int, ...], TensorEntry] | None = None
    """Rows that were trained whole: their numbers, and a tensor (rows, columns) of the adapter."""
    grown: int = 0
    """How many of those rows, the last, follow the base's own: those of new tokens."""
    pair: LoraPair | CombinedPair | None = None
    """The factors of s·B·A."""
    magnitude: TensorEntry | None = None
    """DoRA's lengths of the rows, (out,) in the adapter."""

    @property
    def computes(self) -> bool:
        """Whether anything but the origin has a part in it."""
        return any(part is not None for part in (self.rows, self.pair, self.magnitude))


@dataclass(frozen=True)
class Updates:
    """Everything an adapter does to a checkpoint."""

    by_name: dict[str, Update]
    """By the tensor's name; a head that the base ties to its embeddings may be among them."""
    untied_from: str | None
    """The name of the embeddings that the head no longer shares; None when nothing is untied."""
    vocabulary: int | None
    """Rows of the embeddings, where they were resized."""


def match_updates(adapter: Adapter | CombinedAdapter, checkpoint: Checkpoint) -> Updates:
    """Find what each tensor of the adapter belongs to in the base.

    Where the base ties its head to its embeddings and only one of them changes, or each differently, the
    head becomes a tensor of its own, as the live model has it. Raises ReleaseError when the adapter has
    settings or tensors that cannot be merged right, when a tensor or a module that the configuration names
    matches nothing, and when a shape does not fit.
    """
    _check_settings(adapter)
    names = _match_names(adapter, checkpoint)
    for each in adapter.adapters if isinstance(adapter, CombinedAdapter) else (adapter,):
        _check_named(each)
    updates: dict[str, Update] = {}

    def change(module: str, **parts: object) -> None:
        name = names[f"{module}.weight"]
        updates[name] = replace(updates.get(name, Update()), **parts)  # type: ignore[arg-type]

    if isinstance(adapter, Adapter):
        for name, entry in adapter.whole.items():
            updates[names[name]] = Update(origin=(adapter.file, entry))
        for module, entry in adapter.tokens.items():
            change(module, rows=(tuple(adapter.config.tokens_of(module)), entry))
        for module, pair in adapter.embeddings.items():
            change(module, pair=pair)
    for module, found in adapter.pairs.items():
        change(module, pair=found)
    if isinstance(adapter, Adapter):
        for module, entry in adapter.magnitudes.items():
            change(module, magnitude=entry)
    untied_from = _settle_head(adapter, checkpoint, updates)
    for name, update in updates.items():
        updates[name] = _fit(adapter, checkpoint, name, update, untied_from)
    return Updates(updates, untied_from, _vocabulary(checkpoint, updates))


def _check_settings(adapter: Adapter | CombinedAdapter) -> None:
    obstacles = adapter.config.obstacles()
    if obstacles:
        raise ReleaseError(
            f"{adapter.folder} cannot be merged right yet: it sets {'; '.join(obstacles)}", UNMERGED
        )
    if isinstance(adapter, CombinedAdapter):
        return
    path = adapter.file.path
    if adapter.unknown:
        raise ReleaseError(
            f"{path} holds tensors that its configuration does not explain: {some(adapter.unknown)}", UNMERGED
        )
    odd = [module for module in adapter.magnitudes if module not in adapter.pairs]
    odd += [
        module for module in adapter.pairs if adapter.config.use_dora and module not in adapter.magnitudes
    ]
    if odd:
        raise ReleaseError(
            f"{path}: DoRA's lengths and factors do not belong together: {some(odd)}", UNMERGED
        )
    both = [module for module in adapter.tokens if module in {*adapter.pairs, *adapter.embeddings}]
    if both:
        raise ReleaseError(f"{path}: {some(both)} has both factors and rows trained whole", UNMERGED)


def _check_named(adapter: Adapter) -> None:
    """Refuse a configuration that names modules which the adapter's file has nothing for."""
    config = adapter.config
    adapted = {*adapter.pairs, *adapter.embeddings}
    targets = config.target_modules if isinstance(config.target_modules, list) else []
    saved = {name.rpartition(".")[0] for name in adapter.whole}
    missing = [name for name in targets if not any(_ends_with(module, name) for module in adapted)]
    missing += [
        name for name in config.modules_to_save or () if not any(is_in(module, name) for module in saved)
    ]
    if config.trainable_token_indices and not adapter.tokens:
        missing.append("the tokens of trainable_token_indices")
    if missing:
        raise ReleaseError(
            f"{adapter.folder / 'adapter_config.json'} names modules that its tensors have nothing for: "
            f"{some(missing)}",
            "the base it was trained on lacks them: correct the names and train again",
        )
    if not (adapted or adapter.tokens or adapter.whole):
        raise ReleaseError(f"{adapter.file.path} holds no LoRA factors", UNMERGED)


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _match_names(adapter: Adapter | CombinedAdapter, checkpoint: Checkpoint) -> dict[str, str]:
    """The checkpoint's name for each tensor; a bare model's checkpoint lacks the first part of each name."""
    wanted = sorted(_wanted(adapter))
    known = {*checkpoint.tensors, *([HEAD] if tied_embeddings(checkpoint) else [])}
    missing: list[str] = []
    for strip in (False, True):
        names = {name: name.partition(".")[2] if strip and name != HEAD else name for name in wanted}
        unmatched = [name for name in names.values() if name not in known]
        if not unmatched:
            return names
        missing = missing or unmatched
    raise ReleaseError(
        f"{len(missing)} of the adapter's {len(wanted)} modules match no weight in "
        f"{checkpoint.folder}: {some(missing)}",
        _WRONG_BASE,
    )


def _wanted(adapter: Adapter | CombinedAdapter) -> Iterator[str]:
    yield from (f"{module}.weight" for module in adapter.pairs)
    if isinstance(adapter, Adapter):
        yield from (f"{module}.weight" for module in (*adapter.embeddings, *adapter.tokens))
        yield from adapter.whole


def tied_embeddings(checkpoint: Checkpoint) -> str | None:
    """The name of the embeddings that the head shares; None when it has weights of its own, or is none."""
    if HEAD in checkpoint.tensors or not checkpoint.config.get("tie_word_embeddings", True):
        return None
    return next((name for name in checkpoint.tensors if is_embedding(name)), None)


def _settle_head(
    adapter: Adapter | CombinedAdapter, checkpoint: Checkpoint, updates: dict[str, Update]
) -> str | None:
    """Untie the head where the live model has it apart from the embeddings; see ``Updates.untied_from``."""
    embeddings = tied_embeddings(checkpoint)
    if embeddings is None:
        return None
    body, head = updates.get(embeddings), updates.get(HEAD)
    if head is None and (body is None or (body.origin is None and body.pair is None)):
        return None  # PEFT gives rows trained whole to a tied head too
    if body is not None and head is not None and _are_same(adapter, body, head):
        updates.pop(HEAD, None)
        return None
    if head is not None and (adapter.config.model_extra or {}).get("ensure_weight_tying"):
        raise ReleaseError(
            f"{adapter.folder} sets ensure_weight_tying, and changes head and embeddings differently",
            UNMERGED,
        )
    if any(update is not None and update.rows is not None for update in (body, head)):
        raise ReleaseError(
            f"{adapter.folder} trains rows of embeddings that {checkpoint.folder} ties to its head, and "
            "changes one of them in another way too",
            UNMERGED,
        )
    origin = _find(checkpoint, embeddings)
    updates[HEAD] = replace(head, origin=head.origin or origin) if head else Update(origin=origin)
    return embeddings


def _are_same(adapter: Adapter | CombinedAdapter, body: Update, head: Update) -> bool:
    """Whether both become the same: PEFT saves resized tied embeddings twice, and factors that it ties."""
    import torch

    if body.rows is not None or head.rows is not None or (body.pair is None) != (head.pair is None):
        return False
    if body.pair is not None and head.pair is not None:
        (a, b), (head_a, head_b) = (adapter.load_pair(pair.module) for pair in (body.pair, head.pair))
        if body.pair.scale != head.pair.scale or not (torch.equal(a.T, head_b) and torch.equal(b.T, head_a)):
            return False
    if body.origin is None or head.origin is None:
        return body.origin is head.origin
    return body.origin[1].shape == head.origin[1].shape and _digest(*body.origin) == _digest(*head.origin)


def _digest(file: TensorFile, entry: TensorEntry) -> str:
    digest = sha256()
    for start in range(0, entry.size, _CHUNK):
        digest.update(read_bytes(file, entry.offset + start, min(_CHUNK, entry.size - start)))
    return digest.hexdigest()


def _find(checkpoint: Checkpoint, name: str) -> tuple[TensorFile, TensorEntry]:
    entry = checkpoint.tensors[name]
    return next(shard for shard in checkpoint.shards if entry in shard.entries), entry


def _fit(
    adapter: Adapter | CombinedAdapter,
    checkpoint: Checkpoint,
    name: str,
    update: Update,
    untied_from: str | None,
) -> Update:
    """The update with its factors the way round that the weight has; refuses what does not fit."""
    base = checkpoint.tensors[untied_from if name == HEAD and untied_from else name]
    origin = update.origin[1] if update.origin else base
    of_tokens = name == HEAD or is_embedding(name)
    if origin.shape != base.shape and not (of_tokens and origin.shape[1:] == base.shape[1:]):
        raise ReleaseError(
            f"{name!r} has shape {list(base.shape)} in {checkpoint.folder} and {list(origin.shape)} in the "
            "adapter",
            _WRONG_BASE,
        )
    if (update.computes or update.origin) and origin.dtype not in FLOATS:
        raise ReleaseError(
            f"{name!r} is {origin.dtype} in {checkpoint.folder}", "name the base in 16-bit weights"
        )
    if update.rows is not None:
        numbers, entry = update.rows
        held = origin.shape[0]
        beyond = len([number for number in numbers if number >= held]) if of_tokens else 0
        if entry.shape != (len(numbers), *origin.shape[1:]) or not _are_rows(numbers, held + beyond):
            raise ReleaseError(
                f"{adapter.folder}: the rows trained of {name!r} are not what trainable_token_indices says",
                "the adapter is damaged, or its adapter_config.json belongs to another one",
            )
        if beyond and update.origin:
            raise ReleaseError(f"{adapter.folder} adds rows to {name!r} and replaces it too", UNMERGED)
        update = replace(update, grown=beyond)
    if update.pair is not None:
        update = replace(update, pair=_turn(checkpoint, name, update.pair, origin))
    if update.magnitude is not None:
        assert update.pair is not None
        if update.magnitude.shape != (update.pair.out_features,):
            raise ReleaseError(
                f"{adapter.folder}: DoRA has {list(update.magnitude.shape)} lengths for "
                f"{update.pair.out_features} rows of {name!r}",
                "the adapter is damaged",
            )
    return update


def _are_rows(numbers: Iterable[int], count: int) -> bool:
    listed = list(numbers)
    return all(0 <= number < count for number in listed) and len(set(listed)) == len(listed)


def _turn(
    checkpoint: Checkpoint, name: str, pair: LoraPair | CombinedPair, origin: TensorEntry
) -> LoraPair | CombinedPair:
    """The pair as the weight lies in the base."""
    transposed = (
        pair.transposed if is_embedding(name) else is_transposed(checkpoint, name, pair, origin.shape)
    )
    straight = (pair.out_features, pair.in_features)
    if origin.shape == (straight[::-1] if transposed else straight):
        return replace(pair, transposed=transposed)
    raise ReleaseError(
        f"{name!r} has shape {list(origin.shape)} in {checkpoint.folder}; the factors are for "
        f"{pair.out_features} outputs and {pair.in_features} inputs",
        _WRONG_BASE,
    )


def is_transposed(
    checkpoint: Checkpoint, name: str, pair: LoraPair | CombinedPair, shape: tuple[int, ...]
) -> bool:
    """Whether the linear layer's weight ``name``, of ``shape``, is stored as (in, out).

    PEFT goes by the layer's class, and sets fan_in_fan_out as it wraps one: what it saves is right for the
    last, not for each. So the setting counts only where the model type does not tell and the shape agrees.
    """
    if checkpoint.config.get("model_type") in _CONV1D_TYPES and _IN_A_BLOCK.fullmatch(name):
        return True
    return pair.transposed and shape != (pair.out_features, pair.in_features)


def is_embedding(name: str) -> bool:
    """Whether the weight ``name`` is that of the embeddings."""
    return name.removesuffix(".weight").endswith(EMBEDDING_MODULES)


def _vocabulary(checkpoint: Checkpoint, updates: Mapping[str, Update]) -> int | None:
    """The new number of tokens. Raises ReleaseError where head and embeddings differ in it."""
    sizes = {
        update.origin[1].shape[0] if update.origin else checkpoint.tensors[name].shape[0] + update.grown
        for name, update in (
            (name, updates.get(name, Update()))
            for name in {*checkpoint.tensors, *updates}
            if name == HEAD or is_embedding(name)
        )
    }
    if len(sizes) > 1:
        raise ReleaseError(
            f"the merged head and embeddings would have {' and '.join(map(str, sorted(sizes)))} rows",
            "the adapter resized one of them alone: train it with both saved",
        )
    named = checkpoint.config.get("vocab_size")
    size = next(iter(sizes), None)
    resized = any(
        update.grown
        or (
            update.origin
            and name in checkpoint.tensors
            and update.origin[1].shape != checkpoint.tensors[name].shape
        )
        for name, update in updates.items()
    )
    if not resized or size is None:
        return None
    if not isinstance(named, int):
        raise ReleaseError(f"{checkpoint.folder / 'config.json'} names no vocab_size to change", UNMERGED)
    return size


def some(names: Iterable[str]) -> str:
    """At most three names in words."""
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
