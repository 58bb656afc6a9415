"""Who answers and who judges in an arena: releases, checkpoints and files of answers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.errors import ManifestError, ReleaseError

if TYPE_CHECKING:
    from adapterhub.cards.contest import Contest
    from adapterhub.cards.evaluation import StageReport
    from adapterhub.cards.generation import Decoding
    from adapterhub.cards.judging import Judge
    from adapterhub.packaging.release import Release

_KEPT_AT_ONCE = 4  # batches of answers that a crash may cost


@dataclass(frozen=True)
class Contestant:
    """What a command line names as A, B or the judge."""

    name: str
    sha256: str
    """See ``judgments.System``."""
    answers: Path | None = None
    """A file of answers."""
    checkpoint: Path | None = None
    """A folder that transformers loads alone."""
    release: Release | None = None


@dataclass(frozen=True)
class Setting:
    """How models are loaded and answer."""

    max_new_tokens: int
    batch_size: int
    base: str | None = None
    """Of an adapter release, instead of the one it names."""
    endpoint: str | None = None
    """The Hub to ask."""

    @property
    def decoding(self) -> dict[str, Any]:
        """As an arena records it."""
        return {
            "method": "greedy",
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
        }


def find_contestant(target: str, endpoint: str | None) -> Contestant:
    """What ``target`` names: a file of answers, a release or a base here or on a Hub.

    Raises ReleaseError for a folder that is none, ManifestError for a release that is unsound, HubError and
    its kinds as a pull does.
    """
    from adapterhub.commands.targets import open_checked
    from adapterhub.hub.bases import fetch_base, is_release
    from adapterhub.packaging.base import base_digest, hash_weights
    from adapterhub.packaging.checkpoint import CONFIG_NAME
    from adapterhub.packaging.files import MANIFEST_NAME, sha256_file

    path = Path(target)
    if path.is_file():
        return Contestant(path.stem, sha256_file(path), answers=path)
    if path.is_dir() and not (path / MANIFEST_NAME).is_file():
        if not (path / CONFIG_NAME).is_file():
            raise ReleaseError(
                f"{path} is neither a release nor a checkpoint that loads alone",
                "name a release, a folder with config.json, or a JSONL file of answers",
            )
        return Contestant(path.resolve().name, base_digest(hash_weights(path)), checkpoint=path)
    try:
        release = open_checked(target, endpoint)
    except ManifestError:
        if path.is_dir() or is_release(target, endpoint=endpoint):
            raise
        base = fetch_base(target, endpoint=endpoint)
        name = f"{base.name.rpartition('/')[2]}@{base.revision[:12]}"
        return Contestant(name, base_digest(base.weights), checkpoint=base.folder)
    manifest = release.manifest
    return Contestant(f"{manifest.name}@{manifest.version}", release.digest, release=release)


def answer_missing(contest: Contest, contestant: Contestant, setting: Setting) -> None:
    """Enter the contest, and answer every question that has no answer there yet."""
    from adapterhub.cards.contest import read_answers
    from adapterhub.cards.judgments import System

    if contestant.answers is not None:
        rows = read_answers(contestant.answers, contest.tasks)
        contest.enter(System(name=contestant.name, kind="answers", sha256=contestant.sha256))
        missing = contest.unanswered(contestant.name)
        contest.add_answers(contestant.name, [rows[task.id] for task in missing])
        return
    kind: Any = "release" if contestant.release else "checkpoint"
    system = System(name=contestant.name, kind=kind, sha256=contestant.sha256, decoding=setting.decoding)
    contest.enter(system)
    if contest.unanswered(contestant.name):
        _generate(contest, contestant, setting)


def load_judge(target: str, setting: Setting) -> Judge:
    """The model that ``target`` names, as a judge."""
    from adapterhub.cards.judging import LocalJudge, prompt_sha256
    from adapterhub.cards.judgments import Rater

    judge = find_contestant(target, setting.endpoint)
    if judge.answers is not None:
        raise ReleaseError(f"{target} is a file, not a model", "name a model's folder, or the URL of an API")
    model, tokenizer, decoding = _load(judge, setting)
    settings = {"sha256": judge.sha256, **setting.decoding, "prompt_sha256": prompt_sha256()}
    return LocalJudge(Rater(name=judge.name, kind="model", settings=settings), model, tokenizer, decoding)


def _generate(contest: Contest, contestant: Contestant, setting: Setting) -> None:
    """Answer in portions that are kept as they come. Raises DataError for a question too long to ask."""
    from adapterhub.cards.contest import AnswerRow
    from adapterhub.cards.generation import generate_answers
    from adapterhub.cards.progress import progress_on_stderr
    from adapterhub.cards.questions import pose_prompt
    from adapterhub.errors import DataError

    model, tokenizer, decoding = _load(contestant, setting)
    tasks = contest.unanswered(contestant.name)
    posed = [pose_prompt(tokenizer, task.messages, task.where) for task in tasks]
    for prompt in posed:
        if decoding.context is not None and len(prompt.prompt_ids) >= decoding.context:
            raise DataError(
                f"{prompt.where} has {len(prompt.prompt_ids):,} tokens, and the context of {contestant.name} "
                f"is {decoding.context:,}",
                "leave that question out",
            )
    portion = _KEPT_AT_ONCE * setting.batch_size
    with progress_on_stderr("questions") as report:
        for start in range(0, len(tasks), portion):
            tell = partial(_tell, report, contestant.name, start, len(tasks))
            answers = generate_answers(model, tokenizer, posed[start : start + portion], decoding, tell)
            rows = [
                AnswerRow(question=task.id, text=answer.text, finished=answer.finished)
                for task, answer in zip(tasks[start:], answers, strict=False)
            ]
            contest.add_answers(contestant.name, rows)


def _tell(report: StageReport, stage: str, before: int, total: int, done: int, _portion: int) -> None:
    report(stage, before + done, total)


def _load(contestant: Contestant, setting: Setting) -> tuple[Any, Any, Decoding]:
    """Model, tokenizer, and how it answers."""
    from adapterhub.cards.generation import Decoding
    from adapterhub.commands.measuring import end_tokens
    from adapterhub.load import default_device, load_release
    from adapterhub.trainer.model import load_base, load_tokenizer

    model: Any
    if contestant.release is not None:
        model, tokenizer = load_release(contestant.release, setting.base, endpoint=setting.endpoint)
    else:
        assert contestant.checkpoint is not None
        model = load_base(contestant.checkpoint, None, default_device()).eval()
        tokenizer = load_tokenizer(contestant.checkpoint)
    context = getattr(model.config, "max_position_embeddings", None)
    ends = end_tokens(tokenizer, model)
    return model, tokenizer, Decoding(setting.max_new_tokens, setting.batch_size, ends, context)
