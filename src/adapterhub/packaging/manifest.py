"""adapterhub.json: what a release is, what it was made from, and the digest of every file in it."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from packaging.version import InvalidVersion
from packaging.version import Version as PyPIVersion
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from adapterhub.errors import ManifestError, VersionError
from adapterhub.packaging.bundles import SIGNATURE_NAME as SIGNATURE_NAME
from adapterhub.packaging.bundles import is_signature
from adapterhub.packaging.files import MANIFEST_NAME as MANIFEST_NAME
from adapterhub.packaging.files import check_relative_path
from adapterhub.packaging.problems import first_problem

SCHEMA_VERSION: Final = 1
MAX_MANIFEST_BYTES = 8 * 1024 * 1024

Kind = Literal["adapter", "merged", "quantized", "dataset"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
RelativePath = Annotated[str, AfterValidator(check_relative_path)]
_SEMVER = r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-(a|b|rc)\.(0|[1-9]\d*))?$"
SemVer = Annotated[str, Field(pattern=_SEMVER)]


class Frozen(BaseModel):
    """A value: immutable, and unknown keys are refused."""

    # Validators are built when they are first used: a command needs few of all models.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Quantization(Frozen):
    """How the base was quantized while the adapter was trained on it (bitsandbytes)."""

    type: Literal["nf4", "fp4", "int8"] = "nf4"
    """4-bit NormalFloat (QLoRA section 3), 4-bit float, or LLM.int8()."""
    double: bool = True
    """Whether the scales are quantized to 8 bits themselves (QLoRA section 3, double quantization)."""
    block_size: int = 64
    """Weights that share one scale."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Weights are dequantized to this to compute."""


class BaseLock(Frozen):
    """The base model an adapter belongs to, bound by digests."""

    name: str
    """``owner/name`` on the Hub, or the folder's name when the base has no Hub name."""
    revision: Commit | None = None
    """The Hub commit it was read from; absent for a local folder."""
    digest: Sha256
    """The base digest: see ``adapterhub.packaging.base.base_digest``."""
    weights: dict[RelativePath, Sha256]
    """sha256 of each weight file."""
    config_sha256: Sha256
    """sha256 of config.json."""
    tokenizer_sha256: Sha256 | None = None
    """sha256 of tokenizer.json."""
    chat_template_sha256: Sha256 | None = None
    """sha256 of the chat template's text, UTF-8."""
    quantization: Quantization | None = None
    """None when the base was not quantized."""
    licence: str | None = None
    """As the base's own card names it; None when it has no card, or that names none."""


class BaseMismatch(Frozen):
    """Another base than the locked one, used because somebody said why it will do."""

    reason: Annotated[str, Field(min_length=1, max_length=1000)]
    """In that person's words, one line."""
    differs: tuple[str, ...]
    """What is not as the lock has it, each in words."""
    digest: Sha256
    """The base digest that was found."""
    folder: str
    """The name of the base's folder."""


class DatasetLock(Frozen):
    """Rows that went into training or evaluation, bound by a digest."""

    source: str
    """A file's name, or ``owner/name`` on the Hub."""
    revision: Commit | None = None
    """The Hub commit; absent for local files."""
    split: Literal["train", "test"]
    rows: Annotated[int, Field(ge=1)]
    """Rows used, after those left out for their length."""
    sha256: Sha256
    """sha256 of the rows in their canonical form (``adapterhub.trainer.data.rows_digest``)."""
    licence: str | None = None
    """SPDX identifier, as the recipe names it."""


class Parent(Frozen):
    """The release this one follows, or was made from."""

    ref: str
    """``owner/name@version``, or a folder's name."""
    manifest_sha256: Sha256


class Hardware(Frozen):
    """The machine it was made on."""

    device: Literal["cpu", "cuda"]
    name: str
    """Model name of the processor or the GPU."""
    memory_bytes: Annotated[int, Field(gt=0)]
    """Memory of the device: host memory for the CPU."""
    count: Annotated[int, Field(ge=1)] = 1
    """Processor cores, or GPUs."""
    arithmetic: Literal["bfloat16", "float32"] = "bfloat16"
    """What products are computed in: float32 on processors that have no bfloat16 instructions."""


class MergedAdapter(Frozen):
    """An adapter that was merged together with the parent."""

    ref: str
    """``name@version`` of a release, or a plain adapter folder's name."""
    weights_sha256: Sha256
    """sha256 of its adapter_model.safetensors."""
    weight: Annotated[float, Field(allow_inf_nan=False)]


class Merge(Frozen):
    """How an adapter was added into its base."""

    onto: Literal["original", "trained"]
    """The 16-bit weights, or what 4-bit quantization makes of them, as training saw them."""
    dtype: Literal["bfloat16", "nf4", "fp4", "int8"] = "bfloat16"
    """What the sum, made in float32, was rounded to: in the linear layers for the quantized ones, whose other
    tensors are in bfloat16."""
    rounding: Literal["nearest", "calibrated"] = "nearest"
    """Each weight to its nearest code, or 4-bit codes chosen on text (evidence/rounding.json)."""
    others: tuple[MergedAdapter, ...] = ()
    """What was merged together with the parent."""
    weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """The parent's own, beside others."""
    combine: Literal["cat", "linear", "ties", "dare_linear", "dare_ties"] | None = None
    """How several became one; see ``adapterhub.packaging.combination``. None for one adapter."""
    density: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of numbers that pruning kept."""
    seed: int = 0
    """What pruning at random drew from."""
    base_mismatch: BaseMismatch | None = None
    """The base that was merged into, if it is not the one trained on, and why it was allowed."""


class FileEntry(Frozen):
    """One file of the release."""

    sha256: Sha256
    size: Annotated[int, Field(ge=0)]
    """Bytes."""


class Manifest(Frozen):
    """adapterhub.json. Lists every file of the release but itself and the signature, which covers it."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
    """The release's own name, without owner."""
    version: SemVer
    """Semantic version: 1.2.3, or 1.2.3-rc.1."""
    created: datetime
    """UTC."""
    kind: Kind = "adapter"
    task: str | None = None
    """One sentence: what it was trained to do."""
    licence: str | None = None
    """SPDX identifier or the Hub's name for the licence."""
    base: BaseLock | None = None
    """Absent for data sets only."""
    recipe: dict[str, Any] | None = None
    """The complete recipe; ``adapterhub train`` replays it."""
    datasets: tuple[DatasetLock, ...] = ()
    parent: Parent | None = None
    merge: Merge | None = None
    """For merged and quantized releases only."""
    tools: dict[str, str] = {}
    """Package name to version, of everything that had a hand in it."""
    hardware: Hardware | None = None
    files: dict[RelativePath, FileEntry] = {}

    @field_validator("created")
    @classmethod
    def _in_utc(cls, value: datetime) -> datetime:
        offset = value.utcoffset()
        if offset is None or offset.total_seconds() != 0:
            raise ValueError("must be in UTC, like 2026-01-31T12:00:00Z")
        return value

    @field_validator("files")
    @classmethod
    def _does_not_list_itself(cls, value: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in value:
            if name == MANIFEST_NAME or is_signature(name):
                raise ValueError(f"{name} cannot list itself")
        folded: dict[str, str] = {}
        for name in value:
            twin = folded.setdefault(name.casefold(), name)
            if twin != name:
                raise ValueError(f"{name!r} and {twin!r} are one file on some systems")
        return value

    def to_bytes(self) -> bytes:
        """The manifest as it is written: indented JSON, sorted files, UTF-8, a newline at the end."""
        content = self.model_dump(mode="json")
        content["files"] = dict(sorted(content["files"].items()))
        return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Parse a manifest; ``where`` names it in the error.

        Raises ManifestError for anything that is not a valid manifest of this schema version.
        """
        return _parse(data, where)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``folder/adapterhub.json``. Raises ManifestError when it is missing or malformed."""
        return _parse(cls.read_bytes(folder), str(folder / MANIFEST_NAME))

    @staticmethod
    def read_bytes(folder: Path) -> bytes:
        """``folder/adapterhub.json`` as it lies there, at most one byte over the limit.

        Raises ManifestError when it is missing.
        """
        path = folder / MANIFEST_NAME
        if not folder.is_dir():
            raise ManifestError(f"{folder}: no such folder", "check the path of the release")
        if not path.is_file():
            raise ManifestError(
                f"{folder} holds no {MANIFEST_NAME}, so it is not a release",
                "name a folder that `adapterhub train`, `merge` or `pull` made",
            )
        with path.open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES + 1)


@lru_cache(maxsize=2)  # one command reads the same manifest in several places
def _parse(data: bytes, where: str) -> Manifest:
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"{where} is {len(data)} bytes, over the limit of {MAX_MANIFEST_BYTES}",
            "ask its maker for a sound one",
        )
    try:
        content = json.loads(data, object_pairs_hook=_no_duplicate_keys)
    except (ValueError, RecursionError) as err:
        raise ManifestError(
            f"{where} is not valid JSON: {err}", "take the release from its source again"
        ) from err
    found = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(found, int) and found > SCHEMA_VERSION:
        raise ManifestError(
            f"{where} has schema version {found}; this adapterhub reads up to {SCHEMA_VERSION}",
            "upgrade: pip install -U adapterhub",
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as err:
        key, words = first_problem(err)
        raise ManifestError(
            f"{where}: {key}: {words}", "take the release from its source again, or re-create it"
        ) from err


def parse_version(text: str) -> PyPIVersion:
    """A semantic version (``1.2.3`` or ``v1.2.3-rc.1``) as a value that sorts.

    Raises VersionError for anything else.
    """
    import re

    bare = text.removeprefix("v")
    try:
        if not re.fullmatch(_SEMVER, bare):
            raise InvalidVersion(text)
        return PyPIVersion(bare)
    except InvalidVersion as err:
        raise VersionError(
            f"{text!r} is not a semantic version", "write it like 1.2.3 or 1.2.3-rc.1"
        ) from err


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return result
