"""evidence/dataset.json: what was counted in the rows of a dataset release; its card prints nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from adapterhub.errors import ManifestError
from adapterhub.packaging.manifest import Frozen, Sha256
from adapterhub.packaging.splits import Split

DATASET = "evidence/dataset.json"
Count = Annotated[int, Field(ge=0)]


class Column(Frozen):
    """One column of the parquet files."""

    name: str
    type: str
    """In words, like ``list of {role: text, content: text}``."""


class Lengths(Frozen):
    """How long rows are: all that their messages say, without the chat template."""

    unit: Literal["tokens", "words"]
    """Words are runs of letters and digits; of scripts without blanks, each character."""
    tokenizer: str | None
    """The name of the tokenizer that counted; None for words."""
    tokenizer_sha256: Sha256 | None
    """sha256 of its tokenizer.json."""
    upper: tuple[int, ...]
    """The highest length in each bin; a bin begins after the one before it."""
    rows: tuple[int, ...]
    """Rows in each bin."""
    total: Count
    longest: Count


class SplitEvidence(Frozen):
    """One split."""

    split: Split
    rows: Count
    messages: Count
    bytes: Count
    """Of the rows as canonical JSON in UTF-8."""
    content_sha256: Sha256
    """sha256 over each row as canonical JSON, all columns, absent and null keys alike left out."""
    lengths: Lengths


class Duplicates(Frozen):
    """Rows that say the same in all their messages, whatever their other columns hold."""

    repeated: dict[Split, int]
    """Rows of each split that repeat an earlier one of it."""
    test_in_train: Count
    """Test rows that stand in train too."""
    examples: tuple[str, ...]
    """Like ``train row 7``, of the repeating rows; at most five."""


class PersonalData(Frozen):
    """What looks like one kind of personal or secret data; a pattern finds what has its shape, no more."""

    kind: str
    rows: Count
    examples: tuple[str, ...]
    """Where, like ``train row 7``; at most three. What stands there is not repeated here."""


class Overlap(Frozen):
    """Word sequences that a text to be tested with shares with the train split."""

    name: str
    """``test`` for this release's own test split, else as the user named it."""
    sha256: Sha256 | None
    """Of the benchmark's file; None for the test split."""
    texts: Count
    """Its rows, or the lines of a plain text."""
    short: Count
    """Those without a single sequence of that many words: they cannot be found."""
    found: Count
    """Those that share at least one sequence with a train row."""
    train_rows: Count
    """Train rows that share at least one sequence with it."""
    examples: tuple[str, ...]
    """Of those found, like ``row 7``; at most five."""


class DatasetEvidence(Frozen):
    """Everything that was counted when the dataset release was made."""

    digest: Sha256
    """sha256 over the splits' names, rows and content digests: the same however the files are cut."""
    form: str
    """The form that all rows have: ``messages``, ``prompt and completion``, ``instruction and output``."""
    columns: tuple[Column, ...]
    splits: tuple[SplitEvidence, ...]
    duplicates: Duplicates
    personal_data: tuple[PersonalData, ...]
    """One entry for each kind that was looked for."""
    overlap_words: int
    """Length of the sequences in ``overlaps``, in words; case and punctuation do not count."""
    overlaps: tuple[Overlap, ...]

    def to_bytes(self) -> bytes:
        """As it is written: indented JSON, UTF-8, a newline at the end."""
        return (self.model_dump_json(indent=2) + "\n").encode()


def read_dataset_evidence(folder: Path) -> DatasetEvidence:
    """The evidence of a dataset release. Raises ManifestError when it is missing or malformed."""
    path = folder / DATASET
    try:
        return DatasetEvidence.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as err:
        said = " ".join(str(err).split())[:200]
        raise ManifestError(
            f"{path} cannot be read: {said}", "take the release from its source again"
        ) from err
