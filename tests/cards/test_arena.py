"""Judgments in, ratings out: held to the paper's Table 1, to closed forms, and to what bad files do."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub.cards.agreement import (
    cohen_kappa,
    fleiss_kappa,
    kendall_tau,
    measure_agreement,
    measure_position_bias,
    spearman_rho,
)
from adapterhub.cards.duels import hold_duels
from adapterhub.cards.judgments import Judgment, Verdict, import_files, read_arena, write_arena
from adapterhub.cards.ratings import rate_by_bradley_terry, rate_by_elo
from adapterhub.cards.relative import compare_with_reference
from adapterhub.errors import DataError, ReleaseError

TABLE_1 = {
    "gpt-4": 1348,
    "guanaco-65b": 1022,
    "guanaco-33b": 992,
    "vicuna-13b": 974,
    "chatgpt": 966,
    "guanaco-13b": 916,
    "bard": 902,
    "guanaco-7b": 879,
}
RunCli = Callable[..., tuple[int, str, str]]


def judged(question: int, first: str, second: str, verdict: Verdict, rater: str = "verdict") -> Judgment:
    return Judgment(question=str(question), first=first, second=second, verdict=verdict, rater=rater)


@pytest.fixture(scope="module")
def paper(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's judgments, imported."""
    folder = tmp_path_factory.mktemp("arena") / "paper"
    files = [shared_data / "gpt4_pairwise_vicuna.csv", shared_data / "gpt4_relative_vicuna.csv"]
    write_arena(import_files(files), folder)
    return folder


@pytest.mark.slow
def test_k_of_4_gives_the_papers_table_and_its_ranks(paper: Path, run_cli: RunCli) -> None:
    code, out, err = run_cli(
        "arena", "report", paper, "--rating", "elo", "--k", 4, "--orderings", 10000, "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    rated = {system["system"]: system["rating"] for system in report["ratings"]["systems"]}
    assert list(rated) == list(TABLE_1)
    assert rated == {name: pytest.approx(points, abs=1) for name, points in TABLE_1.items()}
    assert (report["judgments"], report["unparsed"]) == (4480, 13)
    pooled = {standing["system"]: standing["share"] for standing in report["relative"]}
    assert pooled["guanaco-65b"] == pytest.approx(0.993, abs=0.0005)


def test_the_k_of_the_papers_text_does_not_give_its_table(paper: Path) -> None:
    ratings = rate_by_elo(read_arena(paper).pairwise, k=32, orderings=1000)
    rated = {system.system: system.rating for system in ratings.systems}
    assert max(abs(rated[name] - points) for name, points in TABLE_1.items()) > 10


def test_bradley_terry_ranks_the_papers_systems_alike_and_gpt_4_favours_the_first(paper: Path) -> None:
    arena = read_arena(paper)
    ratings = rate_by_bradley_terry(arena.pairwise, resamples=200)
    assert [system.system for system in ratings.systems] == list(TABLE_1)
    assert all(low < system.rating < high for system in ratings.systems for low, high in [system.interval])
    bias = measure_position_bias(arena.pairwise)
    assert bias is not None
    assert bias.first_interval is not None
    assert bias.first_interval[0] > 0.5


def test_elo_of_one_match_is_the_formula() -> None:
    ratings = rate_by_elo([judged(1, "a", "b", "second")], k=32, orderings=3)
    best, worst = ratings.systems
    assert (best.system, best.rating, best.interval) == ("b", 1016, (1016, 1016))
    assert (worst.system, worst.rating, worst.wins, worst.losses) == ("a", 984, 0, 1)


def test_elo_over_orderings_is_the_mean_of_every_order() -> None:
    """Two matches have two orders: each is played by hand, and their mean is what comes out."""

    def play(points: list[float]) -> float:
        lead = 0.0
        for won in points:
            lead += 2 * 16 * (won - 1 / (1 + 10 ** (-lead / 400)))
        return 1000 + lead / 2

    expected = (play([1, 0]) + play([0, 1])) / 2
    rows = [judged(1, "a", "b", "first"), judged(2, "a", "b", "second")]
    ratings = rate_by_elo(rows, k=16, orderings=5000)
    rated = {system.system: system for system in ratings.systems}
    error = rated["a"].mean_error
    assert error is not None
    assert rated["a"].rating == pytest.approx(expected, abs=2 * error)


def test_bradley_terry_of_two_systems_is_the_log_odds() -> None:
    rows = [judged(n, "a", "b", "first" if n < 30 else "second") for n in range(40)]
    a, b = rate_by_bradley_terry(rows).systems
    assert a.rating - b.rating == pytest.approx(400 * math.log10(3), abs=1e-6)
    assert a.rating + b.rating == pytest.approx(2000)
    assert a.interval[0] < a.rating < a.interval[1]


def test_bradley_terry_finds_the_strengths_that_drew_the_judgments() -> None:
    generator = random.Random(7)
    strengths = {"a": 1200.0, "b": 1000.0, "c": 800.0}
    rows = []
    for question in range(600):
        for first, second in (("a", "b"), ("b", "c"), ("c", "a")):
            odds = 10 ** ((strengths[first] - strengths[second]) / 400)
            won: Verdict = "first" if generator.random() < odds / (1 + odds) else "second"
            rows.append(judged(question, first, second, won))
    for system in rate_by_bradley_terry(rows).systems:
        low, high = system.interval
        assert low - 10 < strengths[system.system] < high + 10
        assert high - low < 100


def test_a_tie_is_half_a_win_and_unparsed_is_no_match() -> None:
    rows = [judged(1, "a", "b", "tie"), judged(2, "a", "b", "unparsed")]
    for ratings in (rate_by_elo(rows, k=4, orderings=10), rate_by_bradley_terry(rows)):
        assert [(s.rating, s.wins, s.ties, s.losses) for s in ratings.systems] == [(1000, 0, 1, 0)] * 2


def test_what_has_no_rating_is_said() -> None:
    with pytest.raises(DataError, match="none of the 1 verdicts was parsed"):
        rate_by_elo([judged(1, "a", "b", "unparsed")], k=4, orderings=10)
    with pytest.raises(DataError, match="no finite ratings"):
        rate_by_bradley_terry([judged(1, "a", "b", "first"), judged(2, "b", "a", "second")])


def test_kappas_are_those_of_the_worked_examples() -> None:
    # The worked example of Wikipedia's article on Fleiss' kappa: 10 subjects, 14 raters, 5 categories.
    table = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    items = [[category for category, count in enumerate(row) for _ in range(count)] for row in table]
    assert fleiss_kappa(items) == pytest.approx(0.210, abs=0.0005)
    # And of that on Cohen's: 20 times yes and yes, 5 yes and no, 10 no and yes, 15 no and no.
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    assert cohen_kappa([("a", "a"), ("a", "a")]) is None
    assert fleiss_kappa([["a", "a"]]) is None
    assert (cohen_kappa([]), fleiss_kappa([])) == (None, None)


def test_rank_correlations_with_ties() -> None:
    one, other = [12, 2, 1, 12, 2], [1, 4, 7, 1, 0]  # the example of scipy.stats.kendalltau's documentation
    assert kendall_tau(one, other) == pytest.approx(-0.47140452079103173)
    assert spearman_rho([1, 2, 3, 4, 5], [5, 6, 7, 8, 7]) == pytest.approx(0.8207826816681233)  # scipy's too
    assert (kendall_tau([1, 1], [1, 2]), spearman_rho([1, 1], [1, 2])) == (None, None)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_correlations_are_symmetric_bounded_and_turn_with_the_sign(pairs: list[tuple[int, int]]) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    for correlate in (kendall_tau, spearman_rho):
        value = correlate(one, other)
        assert value == correlate(other, one)
        if value is not None:
            assert -1 - 1e-12 <= value <= 1 + 1e-12
            assert correlate(one, [-b for b in other]) == pytest.approx(-value)


def test_agreement_takes_pairs_whichever_was_shown_first() -> None:
    rows = [
        judged(1, "a", "b", "first", "v1"),
        judged(1, "b", "a", "second", "v2"),  # the same choice, shown the other way
        judged(2, "a", "b", "second", "v1"),
        judged(2, "a", "b", "second", "v2"),
        judged(3, "a", "b", "tie", "v1"),
        judged(3, "a", "b", "unparsed", "v2"),
    ]
    agreement = measure_agreement(rows, lambda own: {"a": 1.0, "b": 2.0})
    assert agreement is not None
    (pair,) = agreement.pairs
    assert (agreement.items, agreement.fleiss_kappa) == (2, 1)
    assert (pair.raters, pair.items, pair.kappa, pair.tau, pair.rho) == (("v1", "v2"), 2, 1, 1, 1)
    assert measure_agreement(rows[:1], lambda own: {}) is None


def test_position_bias_counts_only_pairs_judged_in_both_orders() -> None:
    rows = [
        judged(1, "a", "b", "first"),
        judged(1, "b", "a", "first"),
        judged(2, "a", "b", "first"),
        judged(2, "b", "a", "second"),
        judged(3, "a", "b", "second"),
    ]
    bias = measure_position_bias(rows)
    assert bias is not None
    assert (bias.pairs, bias.consistent, bias.decided, bias.first) == (2, 0.5, 4, 0.75)
    assert measure_position_bias(rows[4:]) is None


def test_three_raters_in_one_file_and_the_whole_report(tmp_path: Path, run_cli: RunCli) -> None:
    path = tmp_path / "people.csv"
    path.write_text("question_id,first,second,v1,v2,v3\n1,a,b,1,1,2\n2,b,c,3,1,-1\n3,c,a,2,2,1\n")
    code, out, err = run_cli("arena", "import", path, "--out", tmp_path / "people")
    assert (code, out) == (0, f"{tmp_path / 'people'}\n"), err
    assert "9 pairwise judgments and 0 relative scores, 1 of them not parsed" in err
    code, out, err = run_cli("arena", "report", tmp_path / "people", "--orderings", 50)
    assert code == 0, err
    assert "agreement of 3 raters on 3 items: Fleiss' kappa" in out
    assert "v1 and v2" in out
    assert "position bias: not measured" in out


def test_a_rater_without_finite_ratings_of_his_own_stops_no_report(tmp_path: Path, run_cli: RunCli) -> None:
    path = tmp_path / "people.csv"  # by v2 alone, a never wins
    path.write_text("question_id,first,second,v1,v2\n1,a,b,1,2\n2,b,a,1,1\n3,a,b,1,2\n4,a,b,3,2\n")
    run_cli("arena", "import", path, "--out", tmp_path / "people")
    code, out, err = run_cli("arena", "report", tmp_path / "people", "--rating", "bt", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["ratings"]["method"] == "bt"
    (pair,) = report["agreement"]["pairs"]
    assert (pair["tau"], pair["rho"], pair["systems"]) == (None, None, 0)
    assert pair["kappa"] is not None


def test_scores_beside_a_reference_pool_both_orders(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    rows = [
        ("1", "ref_first", 8, 6),
        ("1", "system_first", 8, 8),
        ("2", "ref_first", -1, -1),
        ("3", "system_first", 4, 6),
    ]
    lines = [
        json.dumps({"question_id": q, "system": "mine", "order": order, "ref": ref, "score": score})
        for q, order, ref, score in rows
    ]
    path.write_text("\n".join(lines))
    (standing,) = compare_with_reference(import_files([path]).relative)
    assert (standing.system, standing.reference, standing.judgments, standing.unparsed) == (
        "mine",
        "ref",
        3,
        1,
    )
    assert (standing.share, standing.reference_first, standing.system_first) == (
        1.0,
        0.75,
        pytest.approx(14 / 12),
    )
    assert standing.interval is not None
    assert standing.interval[0] < 1 < standing.interval[1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "question_id,first,second,verdict\n1,a,b,4\n", "line 2: verdict is '4'"),
        ("a.csv", "question_id,first,second,verdict\n1,a,a,1\n", "two different systems"),
        ("a.csv", "question_id,first,second,verdict\n1,a,b\n", "line 2: not as many cells"),
        ("a.csv", "question_id,first,second\n1,a,b\n", "no column verdict"),
        ("a.csv", "question_id,first,first,verdict\n1,a,b,1\n", "named twice"),
        ("a.csv", "x,y\n1,2\n", "its columns are x, y"),
        ("a.csv", "question_id,first,second,verdict\n", "holds no judgments"),
        ("a.csv", "", "holds no judgments"),
        ("a.csv", "question_id,system,order,ref,score\n1,a,other_first,1,1\n", "does not say which answer"),
        ("a.csv", "question_id,system,order,ref,score\n1,a,ref_first,1,nan\n", "score is 'nan'"),
        ("a.csv", "question_id,system,order,score\n1,a,ref_first,1\n", "no columns could be the reference's"),
        ("a.jsonl", "{}\n", "its columns are none"),
        ("a.jsonl", "[1]\n", "line 1: not an object"),
        ("a.jsonl", "{\n", "line 1: not JSON"),
        ("a.jsonl", '{"question_id": "\\ud800"}\n', "line 1: not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_by_line(
    tmp_path: Path, run_cli: RunCli, name: str, content: str, words: str
) -> None:
    (tmp_path / name).write_text(content)
    code, out, err = run_cli("arena", "import", tmp_path / name, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert words in err
    assert "fix: " in err
    assert not (tmp_path / "out").exists()


@given(st.binary(max_size=300), st.sampled_from(["x.csv", "x.jsonl"]))
def test_any_bytes_are_judgments_or_an_error(content: bytes, name: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(b"question_id,first,second,verdict\n" * (name == "x.csv") + content)
        try:
            arena = import_files([path])
        except DataError:
            return
        write_arena(arena, Path(folder) / "out")
        assert read_arena(Path(folder) / "out") == arena


def test_an_arena_is_not_overwritten_and_a_damaged_one_is_named(tmp_path: Path, run_cli: RunCli) -> None:
    path = tmp_path / "one.csv"
    path.write_text("question_id,first,second,verdict\n1,a,b,1\n")
    folder = tmp_path / "one"
    write_arena(import_files([path]), folder)
    with pytest.raises(ReleaseError, match="exists already"):
        write_arena(import_files([path]), folder)
    (folder / "pairwise.jsonl").write_text("{}\n")
    code, _, err = run_cli("arena", "report", folder)
    assert (code, "pairwise.jsonl, line 1" in err) == (2, True)
    code, _, err = run_cli("arena", "report", tmp_path)
    assert (code, "arena.json is missing" in err) == (2, True)
    code, _, err = run_cli("arena", "report", folder, "--rating", "bt", "--k", 4)
    assert (code, "belong to --rating elo" in err) == (2, True)


def test_a_duel_counts_questions_and_calls_no_noise_a_win() -> None:
    sweep = [judged(at, "a", "b", "first") for at in range(10)] + [
        judged(at, "b", "a", "second") for at in range(10)
    ]
    even = [judged(at, "c", "a", "first" if at % 2 else "second") for at in range(10)]
    odd = [judged(1, "c", "b", "tie"), judged(2, "c", "b", "unparsed")]
    won, close, level = hold_duels(sweep + even + odd)
    assert (won.a, won.b, won.judgments, won.share, won.won, won.lost) == ("a", "b", 20, 1.0, 10, 0)
    assert won.p_value == pytest.approx(3 * 2 / 2**10)
    assert won.finding == "better"
    assert (close.a, close.b, close.won, close.lost, close.finding) == ("a", "c", 5, 5, "no difference shown")
    assert (level.judgments, level.share, level.level, level.p_value) == (1, 0.5, 1, 1.0)


def test_every_two_of_the_papers_systems_are_held_against_each_other(paper: Path, run_cli: RunCli) -> None:
    report = json.loads(run_cli("arena", "report", paper, "--orderings", 10, "--json")[1])
    assert len(report["duels"]) == 28
    found = {(duel["a"], duel["b"]): duel for duel in report["duels"]}
    assert found["gpt-4", "guanaco-7b"]["finding"] == "better"
    assert all(duel["won"] + duel["lost"] + duel["level"] <= 80 for duel in report["duels"])
