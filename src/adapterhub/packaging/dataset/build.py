"""A dataset release from files of rows: validated, counted, written as parquet, and sealed.

The rows are read twice, never held together: once to check them all and to learn their columns, once to write
them. What must be compared across all rows goes to the disk, beside the release that is being made: 25 bytes
for a row, 18 for a sequence of words of the tests, 16 for one of the train split that the tests may share. It
is compared a piece at a time. In memory a row takes one bit for each body of tests that it is compared with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.errors import DataError
from adapterhub.packaging.dataset.columns import Columns, describe_columns
from adapterhub.packaging.dataset.counting import SplitCount, spoken_words
from adapterhub.packaging.dataset.duplicates import DuplicateSearch
from adapterhub.packaging.dataset.evidence import DATASET, DatasetEvidence, SplitEvidence
from adapterhub.packaging.dataset.inputs import Inputs, form_of, read_batches
from adapterhub.packaging.dataset.lengths import TokenCounter
from adapterhub.packaging.dataset.overlap import Overlaps
from adapterhub.packaging.dataset.personal import PersonalDataSearch
from adapterhub.packaging.dataset.words import SEQUENCE
from adapterhub.packaging.dataset.writing import SplitWriter
from adapterhub.packaging.manifest import DatasetLock, Manifest
from adapterhub.packaging.release import Release, new_release
from adapterhub.packaging.rows import canonical
from adapterhub.packaging.splits import Split

if TYPE_CHECKING:
    import pyarrow

README = "README.md"
DATA = "data"
SPLITS: tuple[Split, ...] = ("train", "test")
Render = Callable[[Manifest, DatasetEvidence], bytes]


@dataclass(frozen=True)
class _Survey:
    """What the first reading found."""

    schema: pyarrow.Schema
    form: str
    rows: Mapping[Split, int]


def build_dataset(
    out: Path,
    draft: Callable[[DatasetEvidence], Manifest],
    inputs: Inputs,
    *,
    source: str,
    benchmarks: Mapping[str, Path],
    counter: TokenCounter | None,
    render: Render,
) -> Release:
    """Make the dataset release ``out`` from ``inputs``, whole or not at all.

    ``draft`` makes its manifest, without rows and files, for what was found in the rows; ``source`` names
    where they come from, ``benchmarks`` the files to compare them with, ``counter`` the tokenizer that
    measures lengths (else words are counted), and ``render`` writes the card. Memory stays bounded however
    many rows there are.

    Raises DataError for malformed rows, by file and line, for a column of two types, and for a split without
    rows; ReleaseError when ``out`` exists.
    """
    with ExitStack() as stack:
        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent))
        )
        overlaps = stack.enter_context(closing(Overlaps(scratch / "sequences")))
        duplicates = stack.enter_context(closing(DuplicateSearch(scratch / "digests")))
        personal = PersonalDataSearch()
        for name, path in benchmarks.items():
            overlaps.add_benchmark(name, path)
        survey = _survey(inputs, overlaps)
        counts = {split: SplitCount(split, counter, duplicates, personal, overlaps) for split in survey.rows}
        shards = _write(scratch, inputs, survey, counts)
        splits = tuple(count.finish() for count in counts.values())
        evidence = DatasetEvidence(
            digest=dataset_digest(splits),
            form=survey.form,
            columns=describe_columns(survey.schema),
            splits=splits,
            duplicates=duplicates.finish(),
            personal_data=personal.finish(),
            overlap_words=SEQUENCE,
            overlaps=overlaps.finish(),
        )
        manifest = draft(evidence)
        locks = tuple(_lock(count, source, manifest.licence) for count in counts.values())
        manifest = manifest.model_copy(update={"datasets": locks})
        with new_release(out, manifest) as staging:
            for shard in shards:
                (staging / DATA).mkdir(exist_ok=True)
                shard.rename(staging / DATA / shard.name)
            (staging / DATASET).parent.mkdir()
            (staging / DATASET).write_bytes(evidence.to_bytes())
            (staging / README).write_bytes(render(manifest, evidence))
    return Release.open(out)


def dataset_digest(splits: Sequence[SplitEvidence]) -> str:
    """sha256 over each split's name, number of rows and content digest, as canonical JSON."""
    return sha256(canonical([[it.split, it.rows, it.content_sha256] for it in splits])).hexdigest()


def _survey(inputs: Inputs, overlaps: Overlaps) -> _Survey:
    """Read all rows once, checking them; the test split's words are noted."""
    columns, form = Columns(), ""
    rows: dict[Split, int] = {}
    for split, batch in read_batches(inputs):
        form = form or form_of(batch[0].content)
        columns.add(batch)
        rows[split] = rows.get(split, 0) + len(batch)
        if split == "test":
            overlaps.add_test([spoken_words(row) for row in batch])
    if "train" not in rows:
        names = ", ".join(path.name for path in inputs.train[:3])
        raise DataError(f"{names}: no rows for the train split", "name a file with at least one row")
    if inputs.test_share and "test" not in rows:
        raise DataError(
            f"none of the {rows['train']} rows falls into a test split of {inputs.test_share:g}",
            "name more rows, a larger --test-share, or a --test file",
        )
    if inputs.test and "test" not in rows:
        raise DataError(f"{inputs.test[0]}: no rows", "name a file with at least one row")
    return _Survey(columns.finish(), form, {split: rows[split] for split in SPLITS if split in rows})


def _write(folder: Path, inputs: Inputs, survey: _Survey, counts: Mapping[Split, SplitCount]) -> list[Path]:
    """Read all rows again, and write and count them."""
    import pyarrow

    writers = {split: SplitWriter(folder / DATA, split, survey.schema) for split in survey.rows}
    for split, batch in read_batches(inputs):
        if split in writers:
            table = pyarrow.Table.from_pylist([row.content for row in batch], schema=survey.schema)
            writers[split].add(table)
            counts[split].add(batch, table)
    for split, rows in survey.rows.items():
        if counts[split].rows != rows:
            raise DataError(
                f"the {split} rows changed while they were read: {rows}, then {counts[split].rows}",
                "run it again when nothing else writes to those files",
            )
    return [shard for writer in writers.values() for shard in writer.finish()]


def _lock(count: SplitCount, source: str, licence: str | None) -> DatasetLock:
    return DatasetLock(
        source=source, split=count.split, rows=count.rows, sha256=count.rows_sha256, licence=licence
    )
