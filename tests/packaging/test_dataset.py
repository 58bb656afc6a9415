"""Dataset releases made of rows: what is checked and counted, and is the same however files are cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub import DataError
from adapterhub.packaging.dataset import writing
from adapterhub.packaging.dataset.build import build_dataset
from adapterhub.packaging.dataset.evidence import DatasetEvidence, read_dataset_evidence
from adapterhub.packaging.dataset.inputs import find_inputs
from adapterhub.packaging.dataset.personal import find_personal_data
from adapterhub.packaging.dataset.words import SEQUENCE, hash_sequences
from adapterhub.packaging.manifest import Manifest
from adapterhub.packaging.release import Release
from adapterhub.trainer.data import read_rows, rows_digest

WORDS = [f"word{letter}" for letter in "abcdefghijklmnop"]


def chat(user: str, answer: str = "ok", **columns: object) -> dict:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}


def build(out: Path, source: Path, test: Path | None = None, share: float = 0.0, **options) -> Release:
    draft = Manifest(name="rows", version="1.0.0", created=datetime(2026, 1, 2, tzinfo=UTC), kind="dataset")
    options = {"benchmarks": {}, "counter": None, "render": lambda manifest, evidence: b"card"} | options
    return build_dataset(
        out, lambda _: draft, find_inputs(source, test, share), source=source.name, **options
    )


def evidence_of(release: Release) -> DatasetEvidence:
    release.check_files()
    return read_dataset_evidence(release.path)


def test_what_is_read_back_is_what_went_in(tmp_path: Path, write_jsonl: Callable) -> None:
    rows = [
        chat(f"row {number} ünïcode", id=number, note=None if number % 2 else "n") for number in range(50)
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    release = build(tmp_path / "out", source, write_jsonl(tmp_path / "held.jsonl", rows[:5]))
    train, test = release.manifest.datasets
    assert (train.split, train.rows, test.split, test.rows) == ("train", 50, "test", 5)
    assert train.sha256 == rows_digest(read_rows(source))
    assert train.sha256 == rows_digest(read_rows(release.path, "train"))

    from datasets import load_dataset

    loaded = load_dataset(str(release.path / "data"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 50, "test": 5}
    assert loaded["train"][3] == rows[3]


def test_the_digest_is_that_of_the_rows_however_files_are_cut(
    tmp_path: Path, write_jsonl: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [chat(f"question {number}", score=number / 2, tags=["a", None]) for number in range(40)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    plain = evidence_of(build(tmp_path / "plain", source))
    monkeypatch.setattr(writing, "ROW_GROUP_BYTES", 1)
    monkeypatch.setattr("adapterhub.packaging.dataset.inputs._BATCH_ROWS", 7)
    monkeypatch.setattr(writing, "SHARD_BYTES", 500)
    cut = build(tmp_path / "cut", source)
    files = [name for name in cut.manifest.files if name.endswith(".parquet")]
    assert len(files) > 2
    assert files[0] == f"data/train-00000-of-{len(files):05d}.parquet"
    table = pyarrow.Table.from_pylist([dict(reversed(row.items())) for row in rows])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=3)
    again = evidence_of(build(tmp_path / "parquet", tmp_path / "rows.parquet"))
    assert plain.digest == evidence_of(cut).digest == again.digest
    changed = write_jsonl(tmp_path / "other.jsonl", [*rows[:-1], chat("question 39", score=1.0, tags=[])])
    assert evidence_of(build(tmp_path / "changed", changed)).digest != plain.digest


def test_duplicates_lengths_and_overlap_are_counted(tmp_path: Path, write_jsonl: Callable) -> None:
    long = " ".join(WORDS)
    train = [chat(long, id=1), chat("short", id=2), chat("short", id=3), chat("another one", id=4)]
    test = [chat("short", id=5), chat(f"Before: {long.upper()}!", id=6), chat("nothing of it", id=7)]
    bench = tmp_path / "bench.txt"
    bench.write_text(f"{', '.join(WORDS[:13])}\n{' '.join(WORDS[:12])}\n{' '.join(reversed(WORDS))}\n")
    release = build(
        tmp_path / "out",
        write_jsonl(tmp_path / "train.jsonl", train),
        write_jsonl(tmp_path / "held.jsonl", test),
        benchmarks={"bench": bench},
    )
    found = evidence_of(release)
    assert found.duplicates.repeated == {"train": 1, "test": 0}
    assert (found.duplicates.test_in_train, found.duplicates.examples) == (1, ("train row 3",))
    overlaps = {it.name: it for it in found.overlaps}
    assert (overlaps["bench"].texts, overlaps["bench"].short, overlaps["bench"].found) == (3, 1, 1)
    assert (overlaps["test"].texts, overlaps["test"].short, overlaps["test"].found) == (3, 2, 1)
    assert overlaps["test"].examples == ("row 2",)
    assert overlaps["bench"].train_rows == overlaps["test"].train_rows == 1
    lengths = found.splits[0].lengths
    assert (lengths.unit, lengths.rows, lengths.upper, lengths.longest) == ("words", (4,), (32,), 17)


def test_what_is_compared_a_piece_at_a_time_is_found_all_the_same(
    tmp_path: Path, write_jsonl: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many rows that say one thing fall into one bucket, which is read three records at a time."""
    said = [f"{number % 4} " + " ".join(WORDS[:14]) for number in range(23)] + ["alone", "alone too"]
    train = write_jsonl(tmp_path / "train.jsonl", [chat(text) for text in said])
    test = write_jsonl(tmp_path / "held.jsonl", [chat(text) for text in (*said[2:12], "never")])
    whole = evidence_of(build(tmp_path / "whole", train, test))
    monkeypatch.setattr("adapterhub.packaging.dataset.bits.PIECE", 3)
    assert evidence_of(build(tmp_path / "pieces", train, test)) == whole
    assert whole.duplicates.repeated == {"train": 19, "test": 6}
    assert whole.duplicates.test_in_train == 10
    assert (whole.overlaps[0].found, whole.overlaps[0].train_rows) == (10, 23)


def test_a_share_for_the_test_split_stays_put_when_rows_are_added(
    tmp_path: Path, write_jsonl: Callable
) -> None:
    rows = [chat(f"question {number}") for number in range(200)]
    few = build(tmp_path / "few", write_jsonl(tmp_path / "few.jsonl", rows[:100]), share=0.2)
    many = build(tmp_path / "many", write_jsonl(tmp_path / "many.jsonl", [*rows, *rows]), share=0.2)
    split = {
        name: {row.messages[0]["content"] for row in read_rows(release.path, "test")}
        for name, release in (("few", few), ("many", many))
    }
    assert 5 < len(split["few"]) < 40
    assert split["few"] == {text for text in split["many"] if int(text.split()[1]) < 100}
    assert evidence_of(many).duplicates.test_in_train == 0


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (b"", "no rows for the train split"),
        (b"{bad\n", "line 1: not valid JSON"),
        (b"%s\n\x00\xff\xfe\n", "line 2: not valid JSON"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "line 1: this is a binary file"),
        ("%s".encode("utf-16"), "UTF-16"),
        (b"%s\n" + b" " * 70_000 + b"\n", "line 2 is longer"),
        (b'%s\n{"prompt": "a", "completion": "b"}\n', "line 2: this row has prompt and completion, and"),
        (b'%s\n{"messages": [{"role": "assistant", "content": "a"}]}\n', "line 2: there is no prompt"),
        (
            b'{"messages": [{"role":"user","content":"a"},{"role":"user","content":"b"},'
            b'{"role":"assistant","content":"c"}]}\n',
            "line 1: messages[1] is the user's where the assistant's turn is",
        ),
        (
            b'{"messages": [{"role":"user","content":"a"},{"role":"system","content":"b"},'
            b'{"role":"assistant","content":"c"}]}\n',
            "messages[1] is the system's",
        ),
        (
            b'{"prompt":"a","completion":"b","id":"x"}\n{"prompt":"a","completion":"b","id":7}\n',
            "line 2: 'id' does not fit the rows before",
        ),
        (
            b'{"prompt":"a","completion":"b","id":7}\n{"prompt":"a","completion":"b","id":NaN}\n',
            "line 2: not valid JSON: NaN",
        ),
        (b'%s\n{}\n3\n"x"\n[]\n', "line 2: neither messages"),
    ],
)
def test_wrong_rows_are_named_by_line_and_leave_nothing(
    tmp_path: Path, lines: bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterhub.packaging.rowfiles.MAX_LINE_BYTES", 65_536)
    good = json.dumps(chat("a", id="x")).encode()
    source = tmp_path / "rows.jsonl"
    source.write_bytes(lines.replace(b"%s", good).replace("%s".encode("utf-16-le"), b"{\0}\0"))
    with pytest.raises(DataError) as caught:
        build(tmp_path / "out", source)
    assert says in caught.value.what
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_malformed_rows_are_listed_up_to_a_few(tmp_path: Path, write_jsonl: Callable) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [chat("a"), {}, chat("b"), {}, {}, {}])
    with pytest.raises(
        DataError, match=r"line 2: .*too: rows.jsonl, line 4; rows.jsonl, line 5 and 1 more"
    ) as err:
        build(tmp_path / "out", source)
    assert "\n" not in err.value.what


def test_the_first_bad_line_is_named_though_a_later_one_is_no_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(chat("one")) + '\n{"messages": []}\nnot json\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: "):
        build(tmp_path / "out", path)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    rows = [chat("one"), chat("two")]
    (tmp_path / "plain.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    odd = "\r\n\r\n".join(json.dumps(row) for row in rows) + "\r\n"
    (tmp_path / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + odd.encode())
    releases = [build(tmp_path / name, tmp_path / f"{name}.jsonl") for name in ("plain", "odd")]
    assert len({evidence_of(release).digest for release in releases}) == 1


def test_the_test_rows_are_named_once(tmp_path: Path, write_jsonl: Callable) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train", "test"):
        write_jsonl(folder / f"{name}.jsonl", [chat(name)])
    assert [lock.rows for lock in build(tmp_path / "out", folder).manifest.datasets] == [1, 1]
    with pytest.raises(DataError, match="a test split of its own"):
        find_inputs(folder, None, 0.1)
    with pytest.raises(DataError, match="named twice"):
        find_inputs(folder / "train.jsonl", folder / "test.jsonl", 0.1)
    write_jsonl(folder / "validation.jsonl", [chat("x")])
    with pytest.raises(DataError, match="validation split"):
        find_inputs(folder, None, 0.0)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to ann.smith+x@mail.co.uk now", ["e-mail address"]),
        ("write to you@example.com, or a@b", []),
        ("call +49 (30) 123 4567-8", ["telephone number"]),
        ("12 + 4 = 16 and (3) 4", []),
        ("card 4111 1111 1111 1111", ["payment card number"]),
        ("card 4111 1111 1111 1112", []),
        ("pay to DE89 3704 0044 0532 0130 00", ["bank account number (IBAN)"]),
        ("pay to DE88 3704 0044 0532 0130 00", []),
        ("from 8.8.8.8, not 10.0.0.1 or 1.2.3.4.5", ["public IP address"]),
        ("my number is 123-45-6789", ["US social security number"]),
        ("export HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyzABCDEFGH", ["access token or private key"]),
        ("-----BEGIN RSA PRIVATE KEY-----", ["access token or private key"]),
    ],
)
def test_personal_data_is_found_by_its_shape(text: str, kinds: list[str]) -> None:
    assert find_personal_data(text) == kinds


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=40), max_size=6))
def test_sequences_are_hashed_as_they_stand(texts: list[list[str]]) -> None:
    """Equal runs of 13 words have equal hashes, others differ, and none spans two texts."""
    hashes, owners = hash_sequences(texts)
    runs = [
        (owner, tuple(text[at : at + SEQUENCE]))
        for owner, text in enumerate(texts)
        for at in range(len(text) - SEQUENCE + 1)
    ]
    assert owners.tolist() == [owner for owner, _ in runs]
    assert len({run for _, run in runs}) == len(set(hashes.tolist()))
    assert len({(run, number) for (_, run), number in zip(runs, hashes.tolist(), strict=True)}) == len(
        set(hashes.tolist())
    )


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Three times the rows, a tenth of them test rows, within 40 MiB of the same peak.

    The fewer rows are as many as fill what is buffered on the way.
    """
    program = """
import json, random, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_dataset import build, chat
folder, count = Path(sys.argv[1]), int(sys.argv[2])
random.seed(0)
with (folder / f"{count}.jsonl").open("w") as out:
    for number in range(count):
        words = " ".join(f"w{random.randrange(5000)}" for _ in range(150))
        out.write(json.dumps(chat(words, f"answer {number}")) + "\\n")
build(folder / f"out{count}", folder / f"{count}.jsonl", share=0.1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for count in (40_000, 120_000):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), str(count), str(Path(__file__).parent)],
            capture_output=True,
            text=True,
            check=True,
            env=dict(os.environ),
        )
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 40, peaks
