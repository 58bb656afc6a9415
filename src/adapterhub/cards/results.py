"""Scores in the two forms that the Hub reads: the README's model-index, and ``.eval_results/*.yaml``."""

from __future__ import annotations

from typing import Any

from adapterhub.cards.card import Card, is_hub_name
from adapterhub.cards.escaping import one_line
from adapterhub.cards.formats import METRICS, quantization_in_words
from adapterhub.packaging.evidence import Score, ScoresEvidence
from adapterhub.packaging.tasks import TaskScore, TasksEvidence

RESULTS = ".eval_results/adapterhub.yaml"
_DIGITS = 6


def model_index(card: Card) -> dict[str, Any]:
    """Arguments of huggingface_hub's ModelCardData: the adapter's figures, the base's in their args."""
    results = []
    if card.scores is not None:
        results += [_score_result(score, card.scores) for score in card.scores.scores]
    if card.tasks is not None:
        results += [_task_result(score, card.tasks) for score in card.tasks.scores]
    return {"model_name": card.manifest.name, "eval_results": results} if results else {}


def results_files(card: Card) -> dict[str, bytes]:
    """What the Hub's leaderboards read (https://huggingface.co/docs/hub/eval-results), by path.

    Nothing without a figure on rows of the Hub's own: an entry names a data set there.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    scores = card.scores
    if scores is None or not is_hub_name(scores.data.source):
        return {}
    held = quantization_in_words(card.base.quantization)
    entries = [
        EvalResultEntry(
            dataset_id=scores.data.source,
            task_id="default",
            value=round(score.adapter, _DIGITS),
            dataset_revision=scores.data.revision,
            notes=f"{METRICS[score.metric]}, {score.unit}; {score.rows} rows; adapter on {card.base.name} "
            f"in {held}; the base alone: {score.base:.{_DIGITS}g}",
        )
        for score in scores.scores
        if score.metric == "exact_match"
    ]
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    return {RESULTS: text.encode()} if entries else {}


def _score_result(score: Score, scores: ScoresEvidence) -> Any:
    from huggingface_hub import EvalResult

    source = one_line(scores.data.source)
    args: dict[str, Any] = {
        "rows": score.rows,
        "base": round(score.base, _DIGITS),
        "rows_sha256": scores.data.sha256,
    }
    return EvalResult(
        task_type="text-generation",
        dataset_type=source,
        dataset_name=source,
        dataset_split=scores.data.split,
        dataset_revision=scores.data.revision,
        metric_type=score.metric,
        metric_name=f"{METRICS[score.metric]} ({score.unit})",
        metric_value=round(score.adapter, _DIGITS),
        metric_args=args | _interval(score.adapter_interval),
    )


def _task_result(score: TaskScore, tasks: TasksEvidence) -> Any:
    from huggingface_hub import EvalResult

    task, metric = one_line(score.task), one_line(score.metric)
    args: dict[str, Any] = {
        "questions": score.questions,
        "few_shot": score.few_shot,
        "base": round(score.base, _DIGITS),
        "filter": one_line(score.filter),
        "lm_eval": one_line(tasks.lm_eval),
        "task_hash": one_line(score.task_hash),
    }
    return EvalResult(
        task_type="text-generation",
        dataset_type=task,
        dataset_name=f"{task} (lm-eval, version {one_line(score.version)})",
        metric_type=metric,
        metric_name=metric,
        metric_value=round(score.adapter, _DIGITS),
        metric_args=args | _interval(score.adapter_interval),
    )


def _interval(interval: tuple[float, float] | None) -> dict[str, Any]:
    return {} if interval is None else {"interval_95": [round(bound, _DIGITS) for bound in interval]}
