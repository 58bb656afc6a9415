"""An arena in the making: questions, the answers of systems, and judgments that are added one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from adapterhub.cards.judgments import (
    ARENA,
    PAIRWISE,
    ArenaFile,
    Judgment,
    Rater,
    Source,
    System,
    Verdict,
    read_head,
    read_lines,
    to_line,
)
from adapterhub.errors import DataError
from adapterhub.packaging.files import check_target, sha256_file, write_atomic
from adapterhub.packaging.manifest import Frozen
from adapterhub.packaging.rowfiles import read_entries

_ANSWERS = "answers"
_IDS = ("question_id", "id")
_TEXTS = ("text", "question", "prompt")
_ANSWER_TEXTS = ("answer", "text", "output")
_ROLES = ("system", "user", "assistant")
Messages = tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Task:
    """One question to the systems."""

    id: str
    messages: Messages
    """The conversation that they go on; the last message is the user's."""
    where: str
    """Where it stands, like ``questions.jsonl, line 12``."""


class AnswerRow(Frozen):
    """One system's answer to one question, as the arena keeps it."""

    question: str
    text: str
    finished: bool = True
    """Whether it ended by itself, rather than at the token limit."""


@dataclass(frozen=True)
class Showing:
    """Two answers to one question, in the order in which a rater sees them."""

    task: Task
    first: str
    """The system whose answer comes first."""
    second: str
    first_text: str
    second_text: str

    def judged(self, verdict: Verdict, rater: str, reply: str | None = None) -> Judgment:
        """The rater's judgment of it."""
        return Judgment(
            question=self.task.id,
            first=self.first,
            second=self.second,
            verdict=verdict,
            rater=rater,
            reply=reply,
        )


def read_tasks(path: Path) -> tuple[tuple[Task, ...], Source]:
    """The questions of a JSONL file: ``question_id`` (or ``id``) and ``messages``, or ``text`` alone.

    An assistant's message at the end is the reference of a test row, and left away. Without an id the row's
    number stands for it. Raises DataError naming file and line.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file", "name a JSONL file of questions")
    tasks: dict[str, Task] = {}
    for number, (where, row) in enumerate(read_entries(path), 1):
        task = _read_task(where, row, number)
        if task.id in tasks:
            raise DataError(f"{where}: question {task.id} stands there twice", "give each its own id")
        tasks[task.id] = task
    if not tasks:
        raise DataError(f"{path} holds no questions", 'write rows like {"question_id": 1, "text": "…"}')
    return tuple(tasks.values()), Source(name=path.name, sha256=sha256_file(path), rows=len(tasks))


def kept_questions(folder: Path) -> Path:
    """The questions that the arena in ``folder`` was made with. Raises DataError where none are kept."""
    head = read_head(folder) if (folder / ARENA).is_file() else None
    path = _questions_path(folder, head.questions.name) if head and head.questions else None
    if path is None or not path.is_file():
        raise DataError(f"{folder} is no arena that keeps its questions", "name them: --questions FILE.jsonl")
    return path


def _questions_path(folder: Path, name: str) -> Path:
    """Where an arena keeps its questions; ``name`` is the file's that they came from."""
    return folder / f"questions{Path(name).suffix}"


def _read_task(where: str, row: Any, number: int) -> Task:
    if not isinstance(row, dict):
        raise DataError(f"{where}: not an object", 'write rows like {"question_id": 1, "text": "…"}')
    messages = row.get("messages")
    if messages is None:
        text = _first_text(row, _TEXTS, where)
        messages = [{"role": "user", "content": text}]
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise DataError(f"{where}: messages are no list of role and content", "write them as chat messages")
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise DataError(f"{where}: the last message is not the user's", "end with what the user asks")
    kept = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    return Task(_id_of(row, str(number)), kept, where)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in _ROLES
        and isinstance(message.get("content"), str)
        and _is_text(message["content"])
    )


def _is_text(text: str) -> bool:
    """JSON can spell half a surrogate pair, which no file can hold."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _first_text(row: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    text = next((row[name] for name in names if isinstance(row.get(name), str)), None)
    if text is None or not _is_text(text):
        raise DataError(f"{where}: no text under {' or '.join(names)}", f"write it under {names[0]}")
    return text


def _id_of(row: Mapping[str, Any], otherwise: str) -> str:
    found = next((row[name] for name in _IDS if isinstance(row.get(name), str | int)), otherwise)
    return str(found)


def read_answers(path: Path, tasks: Sequence[Task]) -> dict[str, AnswerRow]:
    """One system's answers by question, from JSONL with ``question_id`` and ``answer`` (or ``text``).

    Raises DataError for a malformed row, and when a question has no answer.
    """
    answers = {}
    for number, (where, row) in enumerate(read_entries(path), 1):
        if not isinstance(row, dict):
            raise DataError(f"{where}: not an object", 'write rows like {"question_id": 1, "answer": "…"}')
        question = _id_of(row, str(number))
        answers[question] = AnswerRow(question=question, text=_first_text(row, _ANSWER_TEXTS, where))
    missing = [task.id for task in tasks if task.id not in answers]
    if missing:
        raise DataError(
            f"{path} has no answer to {len(missing)} of {len(tasks)} questions, like {missing[0]}",
            "answer every question, under its question_id",
        )
    return {task.id: answers[task.id] for task in tasks}


class Contest:
    """An arena's folder, open to be added to. What is added is in the file when the call returns."""

    def __init__(self, folder: Path, tasks: tuple[Task, ...], head: ArenaFile) -> None:
        self.folder = folder
        self.tasks = tasks
        self.head = head

    @classmethod
    def open(cls, folder: Path, tasks: tuple[Task, ...], questions: Source) -> Contest:
        """Make the folder, or go on in one that was made with the same questions.

        Raises DataError for an arena of other questions, or of imported judgments; ReleaseError for a folder
        that is something else.
        """
        if not (folder / ARENA).is_file():
            check_target(folder)
            folder.mkdir(parents=True, exist_ok=True)
            contest = cls(folder, tasks, ArenaFile(questions=questions))
            contest._write_head()
            return contest
        head = read_head(folder)
        if head.questions is None or head.questions.sha256 != questions.sha256:
            other = "judgments that were imported" if head.questions is None else "other questions"
            raise DataError(f"{folder} is an arena of {other}", "choose another --out")
        for path in (folder / PAIRWISE, *(folder / _ANSWERS).glob("*.jsonl")):
            _drop_torn_line(path)
        return cls(folder, tasks, head)

    def keep_questions(self, path: Path) -> None:
        """Put the file of questions beside the judgments, so that another run need not name it."""
        assert self.head.questions is not None
        kept = _questions_path(self.folder, self.head.questions.name)
        if not kept.is_file():
            write_atomic(kept, path.read_bytes())

    def enter(self, system: System) -> None:
        """Take part. Raises DataError when the arena knows another system by this name, or other decoding."""
        known = next((it for it in self.head.systems if it.name == system.name), None)
        if known is not None and known != system:
            raise DataError(
                f"{self.folder} holds answers of another {system.name}, or of another decoding",
                "choose another --out, or name that file or folder otherwise",
            )
        if known is None:
            self.head = self.head.model_copy(update={"systems": (*self.head.systems, system)})
            self._write_head()

    def admit(self, rater: Rater) -> None:
        """Judge. Raises DataError when the arena knows a rater of this name who judges in another way."""
        known = next((it for it in self.head.raters if it.name == rater.name), None)
        if known is not None and known != rater:
            raise DataError(
                f"{self.folder} holds judgments of {rater.name} with other settings or another prompt",
                "choose another --out",
            )
        if known is None:
            self.head = self.head.model_copy(update={"raters": (*self.head.raters, rater)})
            self._write_head()

    def answers(self, system: str) -> dict[str, AnswerRow]:
        """The answers of a system that are there, by question."""
        return {row.question: row for row in read_lines(self._answers_path(system), AnswerRow)}

    def unanswered(self, system: str) -> list[Task]:
        """The questions that the system has not answered yet."""
        answers = self.answers(system)
        return [task for task in self.tasks if task.id not in answers]

    def add_answers(self, system: str, rows: Iterable[AnswerRow]) -> None:
        """Keep a system's answers."""
        path = self._answers_path(system)
        path.parent.mkdir(exist_ok=True)
        _append(path, rows)

    def add_judgment(self, judgment: Judgment) -> None:
        """Keep a judgment."""
        _append(self.folder / PAIRWISE, [judgment])

    def judgments(self, a: str, b: str, rater: str) -> list[Judgment]:
        """What one rater has judged of two systems."""
        return [
            judgment
            for judgment in read_lines(self.folder / PAIRWISE, Judgment)
            if judgment.rater == rater and {judgment.first, judgment.second} == {a, b}
        ]

    def unjudged(
        self, a: str, b: str, rater: str, orders: Callable[[Task], Sequence[tuple[str, str]]]
    ) -> list[Showing]:
        """What a rater has not judged yet of all that ``orders`` asks for, in the questions' order."""
        done = {(it.question, it.first, it.second) for it in self.judgments(a, b, rater)}
        texts = {system: self.answers(system) for system in (a, b)}
        return [
            Showing(task, first, second, texts[first][task.id].text, texts[second][task.id].text)
            for task in self.tasks
            for first, second in orders(task)
            if (task.id, first, second) not in done
        ]

    def _answers_path(self, system: str) -> Path:
        name = quote(system, safe="@ ")
        if len(name) > 100:
            name = f"{name[:80]}-{sha256(system.encode()).hexdigest()[:12]}"
        return self.folder / _ANSWERS / f"{name}.jsonl"

    def _write_head(self) -> None:
        write_atomic(self.folder / ARENA, (self.head.model_dump_json(indent=2) + "\n").encode())


def _append(path: Path, rows: Iterable[Frozen]) -> None:
    """One write for all, so that two processes do not mix their lines."""
    with path.open("ab") as file:
        file.write(b"".join(map(to_line, rows)))


def _drop_torn_line(path: Path) -> None:
    """Take away the end of a line that a crash or a full disk left behind."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        write_atomic(path, content[:whole])
