"""Benchmarks through lm-eval: the base beside the adapter on the same questions."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.cards.contamination import Messages, find_shared_sequences
from adapterhub.cards.paired import count_discordant, find, holm, mcnemar
from adapterhub.cards.probing import Subject
from adapterhub.cards.scores import wilson_interval
from adapterhub.errors import AdapterHubError, DataError
from adapterhub.packaging.tasks import TaskScore, TasksEvidence

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

SEED = 1234
"""Of examples before a question and of everything else that lm-eval draws."""


@dataclass(frozen=True)
class Asked:
    """What is asked of lm-eval."""

    tasks: tuple[str, ...]
    """Names of its tasks or groups, or paths of task files (.yaml)."""
    limit: int | None
    """Questions of each task, from the top; None: all."""
    few_shot: int | None
    """Examples before each question; None: as the task says."""
    batch_size: int
    chat_template: bool
    """Whether questions go through the chat template, as one message of the user."""


def check_tasks(tasks: Sequence[str]) -> None:
    """Before the long work: AdapterHubError without lm-eval, DataError for a task that it does not know."""
    _lm_eval()
    from lm_eval.tasks import TaskManager

    known = TaskManager()
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            if not Path(task).is_file():
                raise DataError(f"{task}: no such file", "check the path of the task")
        elif not known.match_tasks([task]):
            raise DataError(
                f"lm-eval {version('lm_eval')} knows no task {task!r}",
                "see `lm-eval ls tasks`, or name a task file that ends in .yaml",
            )


def run_tasks(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    subject: Subject,
    train: Sequence[Messages] | None,
) -> TasksEvidence:
    """Every task on base (``model`` with its adapter disabled) and adapter.

    ``train`` are the rows that were trained on: questions that share 13 words in a row with them are counted;
    None: not looked for. Raises AdapterHubError without lm-eval, DataError for a task that cannot be loaded
    or gives nothing to score.
    """
    _lm_eval()
    from lm_eval.models.huggingface import HFLM

    model.eval()
    began = time.perf_counter()
    with _quiet():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=asked.batch_size)
    with model.disable_adapter():
        base = _evaluate(wrapped, asked)
    adapter = _evaluate(wrapped, asked)
    scores = _correct([score for task in base["samples"] for score in _score(task, base, adapter, train)])
    if not scores:
        raise DataError(f"{', '.join(asked.tasks)}: lm-eval gives no figures", "name tasks that are scored")
    return TasksEvidence(
        adapter_sha256=subject.adapter_sha256,
        lm_eval=version("lm_eval"),
        scores=tuple(scores),
        settings={
            "limit": asked.limit,
            "few_shot": asked.few_shot,
            "batch_size": asked.batch_size,
            "chat_template": asked.chat_template,
            "seed": SEED,
        },
        base_mismatch=subject.base_mismatch,
        tools=subject.tools | {"lm_eval": version("lm_eval")},
        hardware=subject.hardware,
        seconds=round(time.perf_counter() - began, 1),
    )


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError as err:
        raise AdapterHubError(
            f"benchmarks need lm-eval, which is not installed ({err})", "pip install 'adapterhub[eval]'"
        ) from err
    return lm_eval


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's logger says much that is meant for its own command line."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _evaluate(wrapped: Any, asked: Asked) -> Mapping[str, Any]:
    """lm-eval's results with a record for each question."""
    import yaml
    from datasets.exceptions import DatasetsError

    names = ", ".join(asked.tasks)
    try:
        with _quiet():
            results: Mapping[str, Any] | None = _lm_eval().simple_evaluate(
                model=wrapped,
                tasks=list(asked.tasks),
                num_fewshot=asked.few_shot,
                limit=asked.limit,
                apply_chat_template=asked.chat_template,
                log_samples=True,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
    except (DatasetsError, OSError) as err:
        first = " ".join(str(err).split())[:300] or type(err).__name__
        raise DataError(
            f"the data of {names} cannot be loaded: {first}",
            "check the network, or name a task file whose data lies on this disk",
        ) from err
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as err:
        first = " ".join(str(err).split())[:300] or type(err).__name__
        raise DataError(f"lm-eval cannot run {names}: {first}", "mend the task's file") from err
    if results is None:
        raise DataError(f"lm-eval gives no results for {names}", "name tasks that are scored")
    return results


def _score(
    task: str, base: Mapping[str, Any], adapter: Mapping[str, Any], train: Sequence[Messages] | None
) -> Iterator[TaskScore]:
    """One score for each metric and filter of a task, before the correction for there being several."""
    figures, theirs = base["results"][task], adapter["results"][task]
    asked = base["samples"][task]
    shared = None if train is None else len(find_shared_sequences(_texts(asked), train))
    for key, value in figures.items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        sides = [_hits(side["samples"][task], metric, name) for side in (base, adapter)]
        questions = sum(sample["filter"] == name for sample in asked)
        yield TaskScore(
            task=task,
            version=str(base["versions"].get(task)),
            task_hash=_hash(asked),
            metric=metric,
            filter=name,
            higher_is_better=base["higher_is_better"].get(task, {}).get(metric),
            few_shot=int(base["n-shot"].get(task) or 0),
            questions=questions,
            base=float(value),
            adapter=float(theirs[key]),
            base_error=_error(figures, metric, name),
            adapter_error=_error(theirs, metric, name),
            contaminated=shared,
            **_test(*sides, base=float(value), adapter=float(theirs[key])),
        )


def _hits(samples: Sequence[Mapping[str, Any]], metric: str, name: str) -> list[float] | None:
    """Each question's figure in the questions' order; None where a question has no number."""
    ours = sorted((s for s in samples if s["filter"] == name), key=lambda sample: sample["doc_id"])
    values = [sample.get(metric) for sample in ours]
    if not all(isinstance(value, bool | int | float) or hasattr(value, "item") for value in values):
        return None
    return [float(value) for value in values if value is not None]


def _test(
    base_hits: list[float] | None, adapter_hits: list[float] | None, *, base: float, adapter: float
) -> dict[str, Any]:
    """Intervals and McNemar's test, where the metric is the mean of a 0 or a 1 for each question."""
    if base_hits is None or adapter_hits is None or len(base_hits) != len(adapter_hits) or not base_hits:
        return {}
    if not {*base_hits, *adapter_hits} <= {0.0, 1.0}:
        return {}
    rows = len(base_hits)
    hits = round(sum(base_hits)), round(sum(adapter_hits))
    if abs(hits[0] / rows - base) > _SAME or abs(hits[1] / rows - adapter) > _SAME:
        return {}
    gained, lost = count_discordant([hit == 1 for hit in base_hits], [hit == 1 for hit in adapter_hits])
    return {
        "base_interval": wilson_interval(hits[0], rows),
        "adapter_interval": wilson_interval(hits[1], rows),
        "gained": gained,
        "lost": lost,
        "p_value": mcnemar(gained, lost),
    }


_SAME = 1e-9


def _correct(scores: Sequence[TaskScore]) -> list[TaskScore]:
    """``scores`` with p-values corrected for all that were tested (Holm), and what they show."""
    tested = [score.p_value for score in scores if score.p_value is not None]
    adjusted = iter(holm(tested))
    result = []
    for score in scores:
        if score.p_value is None:
            result.append(score)
            continue
        p_adjusted = next(adjusted)
        gained, lost = score.gained or 0, score.lost or 0
        if score.higher_is_better is False:
            gained, lost = lost, gained
        verdict = find(gained, lost, p_adjusted)
        result.append(score.model_copy(update={"p_adjusted": p_adjusted, "verdict": verdict}))
    return result


def _hash(samples: Sequence[Mapping[str, Any]]) -> str:
    """As lm-eval's own tracker makes it: over documents, prompts and targets in order."""
    from lm_eval.utils import hash_string

    parts = (f"{s['doc_hash']}{s['prompt_hash']}{s['target_hash']}" for s in samples)
    return str(hash_string("".join(parts)))


def _error(figures: Mapping[str, Any], metric: str, name: str) -> float | None:
    value = figures.get(f"{metric}_stderr,{name}")
    return float(value) if isinstance(value, int | float) else None


def _texts(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """All that each question's document says, once a question."""
    documents = {sample["doc_id"]: sample["doc"] for sample in samples}
    return ["\n".join(_strings(document)) for document in documents.values()]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
