"""What every measurement of a release needs: the release, its model, and rows to ask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.errors import ManifestError, ReleaseError
from adapterhub.packaging.unwrapping import unwrap

if TYPE_CHECKING:
    from adapterhub.cards.generation import Decoding
    from adapterhub.cards.questions import Question
    from adapterhub.packaging.evidence import Contamination, FailureCase
    from adapterhub.packaging.manifest import BaseMismatch
    from adapterhub.packaging.release import Release
    from adapterhub.trainer.data import Row


@dataclass(frozen=True)
class Base:
    """Which base to load a release on, as a command line says it."""

    named: Path | None
    """Its folder; None: the one that was trained on."""
    endpoint: str | None = None
    """The Hub to take it from; None: $HF_ENDPOINT."""
    allow_mismatch: str | None = None
    """Why another base than the one trained on will do."""


@dataclass(frozen=True)
class Loaded:
    """A release's model, ready to be asked."""

    release: Release
    model: Any
    """peft.PeftModel over the base."""
    tokenizer: Any
    base_mismatch: BaseMismatch | None
    """The base, if it is not the one trained on."""

    @property
    def context(self) -> int | None:
        """Tokens the model can hold; None when it sets no limit."""
        return context_of(self.model)

    @property
    def adapter_sha256(self) -> str:
        """Of the weights that are measured."""
        from adapterhub.cards.card import ADAPTER_WEIGHTS

        return self.release.manifest.files[ADAPTER_WEIGHTS].sha256

    def decoding(self, batch_size: int, max_new_tokens: int) -> Decoding:
        """Greedy decoding that ends where this model's answers do."""
        from adapterhub.cards.generation import Decoding

        return Decoding(max_new_tokens, batch_size, end_tokens(self.tokenizer, self.model), self.context)


def open_measurable(path: Path, anew: Iterable[str] = ()) -> Release:
    """The adapter release in the folder ``path``, whose evidence may be written and whose files are sound.

    Of ``anew``, the evidence that is measured again anyhow, files may be missing. A score belongs to the very
    weights that the manifest lists. Raises ReleaseError, SignatureError.
    """
    from adapterhub.cards.words import take_words
    from adapterhub.commands.targets import refuse_cached
    from adapterhub.packaging.release import Release

    refuse_cached(path)
    release = Release.open(path)
    refuse_what_cannot_be_measured(release)
    lost = {name for name in anew if not (path / name).exists()}
    files = {name: entry for name, entry in release.manifest.files.items() if name not in lost}
    release = Release(path, release.manifest.model_copy(update={"files": files}))
    release = take_words(release)
    release.check_files()
    return release


def refuse_what_cannot_be_measured(release: Release) -> None:
    """Before the long work, say what would only show after it."""
    if release.manifest.kind != "adapter":
        raise ReleaseError(
            f"{release.path} is a {release.manifest.kind} release; base beside adapter needs an adapter",
            "name the adapter release that it was made from",
        )
    if release.is_signed:
        raise ReleaseError(
            f"{release.path} is signed, and evidence would change what the signature covers",
            "remove model.sig, measure, and sign again",
        )


def load(release: Release, base: Base) -> Loaded:
    """The release on its base; see ``load.load_release``."""
    from adapterhub.load import load_release

    mismatches: list[BaseMismatch] = []
    model, tokenizer = load_release(
        release,
        base.named,
        endpoint=base.endpoint,
        allow_base_mismatch=base.allow_mismatch,
        note=mismatches.append,
    )
    return Loaded(release, model, tokenizer, next(iter(mismatches), None))


def end_tokens(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """What ends an answer: the template's end token, then the tokenizer's and the base's own."""
    from adapterhub.trainer.template import end_token_id

    inner = unwrap(model)
    configured = inner.generation_config.eos_token_id
    others = configured if isinstance(configured, list) else [configured]
    found = [end_token_id(tokenizer), tokenizer.eos_token_id, *others]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def context_of(model: Any) -> int | None:
    """Tokens that ``model`` can hold; None when its configuration sets no limit."""
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return limit


def pose_rows(
    tokenizer: Any, rows: list[Row], context: int | None, *, quiet: bool = False
) -> tuple[list[Row], list[Question], int]:
    """Rows as questions; those that do not fit the context are left out, counted and, once, said."""
    from adapterhub.cards.questions import pose
    from adapterhub.errors import DataError
    from adapterhub.trainer.template import encode

    kept: list[tuple[Row, Question]] = []
    too_long: list[str] = []
    for row in rows:
        try:
            encoded = encode(tokenizer, row.messages)
        except DataError as err:
            raise DataError(f"{row.where}: {err.what}", err.fix) from err
        question = pose(
            tokenizer, row.messages, row.where, input_ids=encoded.input_ids, labels=encoded.labels
        )
        if question.fits(context):
            kept.append((row, question))
        else:
            too_long.append(row.where)
    if too_long and not quiet:
        words = (
            f"left out {len(too_long)} of {len(rows)} rows that do not fit the context of {context} tokens"
        )
        click.echo(f"{words}, like {too_long[0]}", err=True)
    if not kept:
        raise DataError(
            f"none of the {len(rows)} rows fits the context of {context} tokens", "shorten the rows"
        )
    return [row for row, _ in kept], [question for _, question in kept], len(too_long)


def refuse_training_rows(release: Release, data: Path, rows: list[Row]) -> None:
    """Raise DataError when ``rows`` are the very rows that the release was trained on."""
    from adapterhub.errors import DataError

    if _is_trained_on(release, rows):
        raise DataError(
            f"{data} holds the rows that the adapter was trained on; they say nothing of others",
            "name held-out rows",
        )


def read_training_rows(release: Release, train: Path | None) -> tuple[Path, list[Row]] | None:
    """The rows that the release was trained on: of ``train``, or where its recipe has them, if they are here.

    None, said on stderr, when they are not. Raises DataError for a ``train`` that cannot be read.
    """
    from adapterhub.errors import DataError
    from adapterhub.trainer.data import read_rows

    if train is not None:
        return train, read_rows(train, "train")
    named = ((release.manifest.recipe or {}).get("data") or {}).get("train")
    for folder in (release.path.resolve().parent, Path()):
        path = folder / str(named)
        if named is not None and path.exists():
            try:
                rows = read_rows(path, "train")
            except DataError:
                continue
            if _is_trained_on(release, rows):
                return path, rows
    click.echo(
        "what was trained on is not here: contamination is not measured (name it as --train)", err=True
    )
    return None


def measure_contamination(
    release: Release, rows: list[Row], found: tuple[Path, list[Row]] | None
) -> Contamination | None:
    """What ``rows`` share with the training rows; None without those."""
    from adapterhub.cards.contamination import find_same_prompts, find_shared_sequences, text_of
    from adapterhub.packaging.evidence import Contamination

    if found is None:
        return None
    path, trained = found
    train = [row.messages for row in trained]
    same = find_same_prompts([row.messages for row in rows], train)
    shared = find_shared_sequences([text_of(row.messages) for row in rows], train)
    return Contamination(
        train=path.name,
        train_rows=len(trained),
        is_trained_on=_is_trained_on(release, trained),
        same_prompts=len(same),
        shared_sequences=len(shared),
        examples=tuple(rows[index].where for index in dict.fromkeys([*same, *shared]))[:5],
    )


def known_cases(release: Release) -> tuple[FailureCase, ...]:
    """The cases recorded before; a file that is damaged is said and replaced."""
    from adapterhub.packaging.evidence import read_failures

    try:
        return read_failures(release.path) or ()
    except ManifestError as err:
        click.echo(f"{err.what}; it is replaced", err=True)
        return ()


def tools() -> dict[str, str]:
    """Package name to version, of what generates and scores."""
    from importlib.metadata import version

    names = ("adapterhub", "bitsandbytes", "peft", "tokenizers", "torch", "transformers")
    return {name: version(name) for name in names}


def _is_trained_on(release: Release, rows: list[Row]) -> bool:
    from adapterhub.trainer.data import rows_digest

    digest = rows_digest(rows)
    return any(lock.split == "train" and lock.sha256 == digest for lock in release.manifest.datasets)
