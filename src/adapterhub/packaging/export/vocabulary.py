"""A tokenizer as GGUF keeps it: tokens, their kinds, merges, and which of llama.cpp's rules split text.

llama.cpp has no general pre-tokenizer but a list of known ones by name. A tokenizer is recognised by what its
own tokenizer.json does, not by its name, and one that llama.cpp would split otherwise is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.errors import ReleaseError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is split before bytes are merged -> llama.cpp's name for it (``tokenizer.ggml.pre``)
_SPLITTERS = {
    ("bytes with regex",): "gpt-2",
    ("digits", "bytes with regex"): "smollm",
    (_LLAMA_3, "bytes"): "llama-bpe",
    (_QWEN_2, "bytes"): "qwen2",
    (_TEKKEN, "bytes"): "tekken",
}
# Those for which llama.cpp takes a whole word from the vocabulary before it merges.
_WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NO_USE = "serve it with transformers or vLLM instead"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms."""

    model: str
    """``gpt2`` (merges of bytes) or ``llama`` (SentencePiece's)."""
    splitter: str
    """``tokenizer.ggml.pre``."""
    tokens: Sequence[str]
    """By id."""
    kinds: Sequence[int]
    """gguf's ``TokenType`` by id."""
    merges: Sequence[str]
    """Of ``gpt2``."""
    scores: Sequence[float]
    """Of ``llama``: the higher is merged first."""
    special: Mapping[str, int]
    """``bos``, ``eos``, ``unk`` and ``pad`` to their ids."""
    adds: Mapping[str, bool]
    """Whether ``bos`` and ``eos`` are put around a text, and a ``space`` before it."""
    template: str | None
    """The chat template."""

    def describe(self, writer: GGUFWriter) -> None:
        """Write everything under ``tokenizer.``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.splitter)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.kinds))
        if self.model == "gpt2":
            writer.add_token_merges(list(self.merges))
        else:
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.adds["space"])
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        if self.template is not None:
            writer.add_chat_template(self.template)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The tokenizer in ``folder``, as transformers loads it, for a model of ``size`` embeddings.

    Raises ReleaseError when there is none, when it has more tokens than the model, or when llama.cpp would
    split text otherwise.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, KeyError, AttributeError) as err:
        first = " ".join(str(err).split())[:200]
        raise ReleaseError(
            f"{folder} holds no tokenizer.json that transformers can read ({first})",
            "copy the base's tokenizer files into it",
        ) from err
    model = content["model"]
    if model["type"] != "BPE":
        raise ReleaseError(f"{folder} has a {model['type']} tokenizer, which is not known here", _NO_USE)
    of_bytes = not model.get("byte_fallback")
    unknown = model.get("unk_token")
    tokens, kinds = _number(folder, content, size, None if of_bytes else unknown)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    splitter, adds = _recognise_bytes(folder, content) if of_bytes else _recognise_pieces(folder, content)
    around = tokenizer("a", verbose=False)["input_ids"]
    adds |= {
        "bos": special["bos"] is not None and around[0] == special["bos"],
        "eos": special["eos"] is not None and len(around) > 1 and around[-1] == special["eos"],
    }
    template = tokenizer.chat_template
    return Vocabulary(
        model="gpt2" if of_bytes else "llama",
        splitter=splitter,
        tokens=tokens,
        kinds=kinds,
        merges=[" ".join(pair) for pair in merges] if of_bytes else [],
        scores=[] if of_bytes else _score(tokens, merges),
        special={name: number for name, number in special.items() if number is not None},
        adds=adds,
        template=template if isinstance(template, str) else None,
    )


def _number(
    folder: Path, content: Mapping[str, Any], size: int, unknown: str | None
) -> tuple[list[str], list[int]]:
    """Tokens and kinds by id; ids that only the embeddings have are unused ones."""
    from gguf import TokenType

    found: dict[int, tuple[str, int]] = {}
    for token, number in content["model"]["vocab"].items():
        kind = TokenType.NORMAL
        if unknown is not None:  # SentencePiece's
            kind = TokenType.BYTE if _BYTE.fullmatch(token) else kind
            kind = TokenType.UNKNOWN if token == unknown else kind
        found[number] = token, kind
    for added in content.get("added_tokens") or ():
        if found.get(added["id"], ("", 0))[1] != TokenType.UNKNOWN:
            kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            found[added["id"]] = added["content"], kind
    last = max(found, default=-1)
    if last >= size:
        raise ReleaseError(
            f"{folder}: the tokenizer has the token {last}, and the model embeddings for {size}",
            "take tokenizer and weights from one model",
        )
    listed = [found.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(size)]
    return [token for token, _kind in listed], [int(kind) for _token, kind in listed]


def _score(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """SentencePiece's scores, of which only the order counts: what is merged earlier has the higher one."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _recognise_bytes(folder: Path, content: Mapping[str, Any]) -> tuple[str, dict[str, bool]]:
    """llama.cpp's name for how a tokenizer of byte merges splits text."""
    steps = _steps(content.get("pre_tokenizer"), "pretokenizers")
    splitter = _SPLITTERS.get(tuple(_name_step(step) or "" for step in steps))
    if splitter is None:
        told = ", ".join(_name_step(step) or str(step.get("type")) for step in steps) or "not at all"
        raise _refuse(folder, f"splits text in a way that llama.cpp has no name for here ({told[:200]})")
    if content["model"].get("ignore_merges") and splitter not in _WHOLE_WORDS_FIRST:
        raise _refuse(folder, f"ignores merges, which llama.cpp's {splitter!r} does not")
    normalizers = [step.get("type") for step in _steps(content.get("normalizer"), "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise _refuse(folder, f"normalises text ({', '.join(map(str, normalizers))})")
    return splitter, {"space": False}


def _name_step(step: Mapping[str, Any]) -> str | None:
    """What a step of a pre-tokenizer does, as ``_SPLITTERS`` has it; None for any other."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "bytes with regex" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        pattern: str | None = step["pattern"].get("Regex")
        return pattern
    return None


def _recognise_pieces(folder: Path, content: Mapping[str, Any]) -> tuple[str, dict[str, bool]]:
    """Whether a tokenizer of SentencePiece's kind puts a space before a text: all that may differ."""
    normalizers = _steps(content.get("normalizer"), "normalizers")
    splitters = _steps(content.get("pre_tokenizer"), "pretokenizers")
    prepends = [step["type"] == "Prepend" and step.get("prepend") == _SPACE for step in normalizers]
    replaces = [
        step["type"] == "Replace" and step["pattern"].get("String") == " " and step["content"] == _SPACE
        for step in normalizers
    ]
    if not splitters and replaces and replaces[-1] and all(prepends[:-1]) and len(normalizers) <= 2:
        return "default", {"space": len(normalizers) == 2}
    if not normalizers and len(splitters) == 1 and splitters[0]["type"] == "Metaspace":
        step = splitters[0]
        if step.get("replacement") == _SPACE and not step.get("split", True):
            return "default", {"space": step.get("prepend_scheme") != "never"}
    raise _refuse(folder, "prepares text in a way that SentencePiece does not")


def _steps(part: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[inside]) if part["type"] == "Sequence" else [part]


def _refuse(folder: Path, why: str) -> ReleaseError:
    return ReleaseError(f"{folder}: its tokenizer {why}", _NO_USE)
