"""Where a release comes from, as named facts, and the commands that check it."""

from __future__ import annotations

from dataclasses import dataclass
from shlex import quote

from adapterhub.cards.card import ADAPTER_WEIGHTS, Card
from adapterhub.cards.escaping import one_line
from adapterhub.cards.formats import hardware_in_words, in_days, quantization_in_full
from adapterhub.cards.snippets import base_source, is_pinned
from adapterhub.packaging.manifest import DatasetLock
from adapterhub.packaging.retarget import RetargetEvidence

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Fact:
    """One line of the provenance table."""

    name: str
    value: str
    is_code: bool = False
    """Whether the value is a digest or another identifier."""


def list_facts(card: Card) -> list[Fact]:
    """The provenance table of a release, top to bottom."""
    manifest, base = card.manifest, card.base
    weights = manifest.files.get(ADAPTER_WEIGHTS)
    facts = [
        Fact("version", manifest.version),
        Fact("created", in_days(manifest.created)),
        Fact("licence", _licence_in_words(card)),
        Fact("base model", base.name),
        Fact("base commit", base.revision or "none: read from a folder", is_code=base.revision is not None),
        Fact("base digest", base.digest, is_code=True),
        Fact("base licence", base.licence or NOT_RECORDED),
        Fact("base held as", quantization_in_full(base.quantization)),
    ]
    if weights:
        facts.append(Fact("adapter sha256", weights.sha256, is_code=True))
    for data in manifest.datasets:
        facts += _describe_data(data)
    if not manifest.datasets:
        facts.append(Fact("data", NOT_RECORDED))
    if manifest.parent:
        facts.append(Fact("made from", manifest.parent.ref))
        facts.append(Fact("its manifest's sha256", manifest.parent.manifest_sha256, is_code=True))
    if manifest.merge:
        onto = {"original": "the base's 16-bit weights", "trained": "the weights as training quantized them"}
        facts.append(Fact("merged onto", f"{onto[manifest.merge.onto]}, rounded to {manifest.merge.dtype}"))
    facts.append(
        Fact("hardware", hardware_in_words(manifest.hardware) if manifest.hardware else NOT_RECORDED)
    )
    tools = ", ".join(f"{name} {version}" for name, version in sorted(manifest.tools.items()))
    facts.append(Fact("made with", tools or NOT_RECORDED))
    if card.scores and card.scores.tools:
        measured = ", ".join(f"{name} {version}" for name, version in sorted(card.scores.tools.items()))
        facts.append(Fact("measured with", measured))
    return facts


def commands_to_verify(card: Card) -> str:
    """Two ways to check the signature: ours, and OpenSSF's own tool."""
    return (
        f"adapterhub verify {card.folder} --key PUBLIC_KEY.pub\n"
        f"model_signing verify key {card.folder} "
        f"--signature {card.folder}/model.sig --public_key PUBLIC_KEY.pub\n"
    )


def command_to_measure(card: Card) -> str:
    """The command that measures the same rows with the same settings again."""
    if card.scores is None:
        return f"adapterhub eval {card.folder} --data FILE.jsonl\n"
    settings = {"limit": card.scores.limit, **card.scores.decoding}
    options = [f"--data {quote(one_line(card.scores.data.source))}"]
    options += [
        f"--{name.replace('_', '-')} {settings[name]}"
        for name in ("limit", "max_new_tokens", "batch_size")
        if isinstance(settings.get(name), int)
    ]
    return f"adapterhub eval {card.folder} {' '.join(options)}\n"


def command_to_digest(card: Card) -> str:
    """The command that prints the base digest of the folder that a reader names."""
    return f"(cd {quote(base_source(card))} && sha256sum *.safetensors | LC_ALL=C sort -k2 | sha256sum)\n"


def command_to_compare(card: Card) -> str:
    """The command that measures how true a merged model is to what it was made from."""
    reference = quote(card.manifest.parent.ref) if card.manifest.parent else "ADAPTER"
    merge = card.manifest.merge
    if merge is not None and merge.others:  # several adapters are live only while they are merged
        together = " ".join(f"--with {quote(f'{other.ref}={other.weight:g}')}" for other in merge.others)
        together += f" --weight {merge.weight:g} --combine {merge.combine}"
        together += f" --density {merge.density:g}" if merge.density != 1 else ""
        together += f" --seed {merge.seed}" if merge.seed else ""
        to = "bf16" if merge.dtype == "bfloat16" else merge.dtype
        return (
            f"adapterhub merge {reference} {together} --onto {merge.onto} --to {to} "
            "--held-out FILE.jsonl --out DIR\n"
        )
    return f"adapterhub fidelity {reference} {card.folder} --text FILE.jsonl\n"


def command_to_refit(card: Card, retarget: RetargetEvidence) -> str:
    """The command that re-fits the adapter once more, and measures what that did."""
    new, old = card.base, retarget.old_base
    # Another base's files may say themselves how they are held; of the same base the command must.
    held = new.quantization.type if new.quantization else "bf16"
    to = f" --to {held}" if new.digest == old.digest else ""
    release = quote(one_line(f"./{retarget.parent.partition('@')[0]}"))
    options = f"--base {quote(base_source(card))}{to} --text FILE.jsonl --out DIR"
    return f"adapterhub retarget {release} {options}\n"


def command_to_tell_changes(card: Card) -> str:
    """The command that holds a release against an earlier version."""
    return f"adapterhub card {card.folder} --since EARLIER\n"


def command_to_replay(card: Card) -> str:
    """The command that asks the recorded failure cases again."""
    base = "" if is_pinned(card) else f" --base {quote(base_source(card))}"
    return f"adapterhub failures run {card.folder}{base}\n"


def _licence_in_words(card: Card) -> str:
    licensing = card.licensing
    if licensing.licence is None:
        return "not stated"
    return licensing.licence + (
        ", carried from base and data; its author states none" if licensing.is_carried else ""
    )


def _describe_data(data: DatasetLock) -> list[Fact]:
    licence = f", licence {data.licence}" if data.licence else ""
    at = f" at commit {data.revision}" if data.revision else ""
    name = {"train": "training rows", "test": "held-out rows"}[data.split]
    return [
        Fact(name, f"{data.rows:,} of {data.source}{at}{licence}"),
        Fact(f"sha256 of the {name}", data.sha256, is_code=True),
    ]
