"""Training rows: three forms, files and folders, and what is said about malformed ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub import DataError
from adapterhub.packaging.rows import to_messages
from adapterhub.trainer.data import Row, read_rows, rows_digest

CHAT = {
    "messages": [{"role": "user", "content": "Two pears."}, {"role": "assistant", "content": '{"pears":2}'}]
}
PAIR = {"prompt": "Two pears.", "completion": '{"pears":2}'}
ALPACA = {"instruction": "Two pears.", "input": "", "output": '{"pears":2}'}


def test_the_three_forms_give_the_same_messages() -> None:
    assert to_messages(CHAT) == to_messages(PAIR) == to_messages(ALPACA)


def test_alpacas_input_follows_the_instruction() -> None:
    messages = to_messages({"instruction": "Sum up.", "input": "A text.", "output": "Text."})
    assert messages[0]["content"] == "Sum up.\n\nA text."


def test_conversational_prompt_and_completion() -> None:
    row = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    assert to_messages(row) == to_messages(CHAT)


def test_jsonl_json_parquet_and_folder_give_the_same_rows(tmp_path: Path, write_jsonl: Callable) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [CHAT, CHAT]
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train-1.jsonl", rows[:1])
    write_jsonl(folder / "train-2.jsonl", rows[1:])
    write_jsonl(folder / "test.jsonl", [PAIR])
    sources = [jsonl, tmp_path / "b.json", tmp_path / "c.parquet", folder]
    assert len({rows_digest(read_rows(source)) for source in sources}) == 1
    assert len(read_rows(folder, "test")) == 1


def test_windows_line_ends_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n" + json.dumps(PAIR).encode())
    assert [row.where for row in read_rows(path)] == ["rows.jsonl, line 1", "rows.jsonl, line 3"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ('"text"', "this is text"),
        ("null", "this is null"),
        ("{}", "no keys"),
        ('{"text": "a"}', "neither messages, nor prompt"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the assistant must answer"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "'bot'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no prompt"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content of text"),
        ('{"prompt": "a", "completion": ""}', "answer is empty"),
        ('{"prompt": "a", "completion": null}', "completion must be text, this is null"),
        ('{"instruction": "a", "output": 3}', "output must be text, this is a number"),
        ("\udcff", "not valid JSON"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{json.dumps(PAIR)}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: ") as caught:
        read_rows(path)
    assert problem in caught.value.what


def test_all_malformed_rows_are_counted(tmp_path: Path, write_jsonl: Callable) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [PAIR, {}, PAIR, {}, {}])
    with pytest.raises(DataError, match=r"line 2.*2 more malformed rows"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.jsonl", None),
        ("empty.jsonl", ""),
        ("blank.jsonl", "\n\n"),
        ("rows.csv", "a,b"),
        ("rows.json", "{}"),
        ("rows.parquet", "PAR1"),
    ],
)
def test_a_source_without_rows_is_refused(tmp_path: Path, name: str, content: str | None) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read_rows(tmp_path / name)


def test_folders_named_after_splits_are_splits(tmp_path: Path, write_jsonl: Callable) -> None:
    for split, count in (("train", 3), ("test", 2)):
        (tmp_path / split).mkdir()
        write_jsonl(tmp_path / split / "part-0.jsonl", [PAIR] * count)
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / ".hidden.jsonl").write_text("x")
    assert len(read_rows(tmp_path, "train")) == 3
    assert len(read_rows(tmp_path, "test")) == 2


def test_a_folder_without_the_split_is_refused(tmp_path: Path, write_jsonl: Callable) -> None:
    with pytest.raises(DataError, match="no data files"):
        read_rows(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", [PAIR])
    with pytest.raises(DataError, match="no files of the test split"):
        read_rows(tmp_path, "test")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "prompt", "completion", "instruction", "input", "output", "role", "content"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(JSON_VALUES)
def test_any_row_gives_messages_or_a_value_error(content: object) -> None:
    try:
        messages = to_messages(content)
    except ValueError:
        return
    assert messages[-1]["role"] == "assistant"
    assert all(set(message) == {"role", "content"} for message in messages)


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=4))
def test_the_digest_depends_on_rows_and_their_order(texts: list[str]) -> None:
    rows = [Row(to_messages({"prompt": "say", "completion": text}), "x") for text in texts]
    moved = [Row(row.messages, "elsewhere") for row in rows]
    assert rows_digest(rows) == rows_digest(moved)
    if texts != texts[::-1]:
        assert rows_digest(rows) != rows_digest(rows[::-1])
