"""arena people: blind, shuffled, on a local page or in the terminal, and gone on with after a break."""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
from click.testing import CliRunner

from adapterhub.cards.ballot import Ballot, serve_ballot
from adapterhub.cards.contest import AnswerRow, Contest, read_tasks
from adapterhub.cards.judgments import System
from adapterhub.cli import cli

HIDDEN = re.compile(r'name="(token|showing)" value="([^"]+)"')
SYSTEMS = ("acme-9b", "zeta-1b")


@pytest.fixture
def contest(tmp_path: Path, write_jsonl: Callable[[Path, list[dict]], Path]) -> Contest:
    """Twelve questions, and both systems' answers."""
    rows = [{"question_id": at, "text": f"Question <b>{at}</b>?"} for at in range(12)]
    tasks, source = read_tasks(write_jsonl(tmp_path / "questions.jsonl", rows))
    contest = Contest.open(tmp_path / "arena", tasks, source)
    for system, word in zip(SYSTEMS, ("good", "<script>bad</script>"), strict=True):
        contest.enter(System(name=system, kind="answers", sha256="0" * 64))
        contest.add_answers(system, [AnswerRow(question=task.id, text=word) for task in tasks])
    return contest


@pytest.fixture
def page(contest: Contest) -> Iterator[str]:
    """The page's address, while it is served."""
    ballot = Ballot(contest, *SYSTEMS, "ann")
    addresses: queue.Queue[str] = queue.Queue()
    thread = threading.Thread(target=serve_ballot, args=(ballot, 0, addresses.put), daemon=True)
    thread.start()
    yield addresses.get(timeout=30)
    for _ in range(ballot.total):  # it ends when everything is judged
        if ballot.open:
            ballot.give("tie")
    thread.join(0)


def fields(html: str) -> dict[str, str]:
    return dict(HIDDEN.findall(html))


def test_a_person_judges_blind_until_all_is_judged_and_the_page_ends_itself(
    page: str, contest: Contest
) -> None:
    with httpx2.Client(base_url=page, follow_redirects=True) as client:
        html = client.get("/").text
        for _ in contest.tasks:
            assert not any(system in html for system in SYSTEMS)
            assert "<script>bad" not in html
            assert "&lt;script&gt;bad" in html
            first = html.index("good") < html.index("&lt;script&gt;bad")
            html = client.post(
                "/verdict", data={**fields(html), "verdict": "first" if first else "second"}
            ).text
    assert "All 12 pairs are judged" in html
    judgments = contest.judgments(*SYSTEMS, "ann")
    assert {judgment.first for judgment in judgments} == set(SYSTEMS)  # shuffled
    winners = {judgment.first if judgment.verdict == "first" else judgment.second for judgment in judgments}
    assert (len(judgments), winners) == (12, {SYSTEMS[0]})


def test_a_form_counts_once_and_only_of_this_run_and_this_machine(page: str, contest: Contest) -> None:
    with httpx2.Client(base_url=page) as client:
        form = fields(client.get("/").text)
        assert client.post("/verdict", data={**form, "token": "stolen", "verdict": "tie"}).status_code == 403
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
        assert client.post("/verdict", data={**form, "verdict": "x" * 5000}).status_code == 413
        assert contest.judgments(*SYSTEMS, "ann") == []
        for _ in range(2):  # a double click
            assert client.post("/verdict", data={**form, "verdict": "tie"}).status_code == 303
        assert len(contest.judgments(*SYSTEMS, "ann")) == 1
        client.post("/verdict", data={**fields(client.get("/").text), "verdict": "best"})
        assert len(contest.judgments(*SYSTEMS, "ann")) == 1
        headers = client.get("/").headers
        assert "default-src 'none'" in headers["content-security-policy"]


def test_the_order_is_the_same_after_a_break_and_another_for_another_person(contest: Contest) -> None:
    def plan(rater: str) -> list[tuple[str, str]]:
        return [(showing.task.id, showing.first) for showing in Ballot(contest, *SYSTEMS, rater).open]

    ballot = Ballot(contest, *SYSTEMS, "ann")
    before = plan("ann")
    ballot.give("first")
    ballot.skip()
    assert plan("ann") == before[1:]
    assert Ballot(contest, *reversed(SYSTEMS), "ann").judged == 1
    assert plan("bob") != before
    assert {first for _, first in plan("bob")} == set(SYSTEMS)


def test_in_the_terminal_keys_judge_and_q_stops(tmp_path: Path, contest: Contest) -> None:
    for system in SYSTEMS:
        rows = [{"question_id": task.id, "answer": f"by \x1b[31m{task.id}"} for task in contest.tasks]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{system}.jsonl").write_text(lines)
    files = [str(tmp_path / f"{system}.jsonl") for system in SYSTEMS]
    arguments = ["arena", "people", *files, "--questions", str(tmp_path / "questions.jsonl"), "--terminal"]
    arguments += ["--out", str(tmp_path / "other"), "--rater", "cat"]
    ran = CliRunner().invoke(cli, arguments, input="1\n9\n3\nl\nq\n")
    assert ran.exit_code == 0, ran.output
    assert "2 of 12 pairs judged by cat" in ran.stderr
    assert "\x1b[31m" not in ran.stderr
    assert not any(system in ran.stderr for system in SYSTEMS)
    ran = CliRunner().invoke(cli, arguments, input="2\n" * 10)
    assert "12 of 12 pairs judged by cat" in ran.stderr
    ran = CliRunner().invoke(cli, arguments)
    assert (ran.exit_code, "12 of 12" in ran.stderr) == (0, True)


def test_an_arena_keeps_its_questions_and_a_new_one_asks_for_them(
    tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "asked.jsonl").write_text('{"question_id": 7, "text": "Why?"}\n')
    sides = [tmp_path / f"{name}.jsonl" for name in ("one", "two")]
    for side in sides:
        side.write_text('{"question_id": 7, "answer": "So."}\n')
    command = ["arena", "people", *sides, "--out", tmp_path / "new", "--terminal"]
    code, _, err = run_cli(*command)
    assert (code, "name them: --questions FILE.jsonl" in err) == (2, True)
    assert not (tmp_path / "new").exists()
    arguments = [str(it) for it in command]
    asked = [*arguments, "--questions", str(tmp_path / "asked.jsonl")]
    assert "0 of 1 pairs" in CliRunner().invoke(cli, asked, input="q\n").stderr
    ran = CliRunner().invoke(cli, arguments, input="3\n")
    assert "1 of 1 pairs judged by person" in ran.stderr
    assert json.loads((tmp_path / "new" / "pairwise.jsonl").read_text())["question"] == "7"
    (tmp_path / "new" / "questions.jsonl").write_text('{"question_id": 7, "text": "How?"}\n')
    code, _, err = run_cli(*command)
    assert (code, "other questions" in err) == (2, True)
