"""Prompts continued by a model, many at a time: rows that end make room for the next prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList

from adapterhub.cards.caches import STEP_COST, begin_cache, gather_rows

if TYPE_CHECKING:
    from transformers import DynamicCache

_PADDING = 4 * STEP_COST  # tokens, among prompts that are begun together; beyond, two passes cost less
_PART = 4  # rows come and go when one in so many has ended, for their cache is copied then


@dataclass
class _Rows:
    """Answers under way, padded on the left to one length."""

    ids: torch.Tensor
    """(rows, columns) int64."""
    mask: torch.Tensor
    """(rows, columns) int64: 0 where padded."""
    cache: DynamicCache
    """Of all columns but the last."""
    questions: list[int]
    """Which prompt each row answers."""
    going: list[int] = field(default_factory=list)
    """Rows that have not ended."""


def continue_prompts(
    model: Any,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    rows: int,
    end_tokens: Sequence[int],
    report: Callable[[int], None],
) -> list[list[int]] | None:
    """New tokens after each prompt, ``rows`` prompts at a time, each up to its limit of tokens (at least 1).

    An end token is the last where there is one. Prompts of the highest limits come first, among them the
    longest; ``report`` is told how many are done. The model's generation_config says how tokens are chosen.
    None when the model's cache cannot be taken apart by rows.
    """
    waiting = sorted(range(len(prompts)), key=lambda at: (-limits[at], -len(prompts[at]), at))
    said: list[list[int]] = [[] for _ in prompts]
    parts: list[_Rows] = []
    while waiting or parts:
        free = rows - sum(len(part.going) for part in parts)
        if waiting and free * _PART >= rows:
            begun, waiting = waiting[:free], waiting[free:]
            for group in _of_like_length(begun, prompts):
                part = _begin(model, [prompts[at] for at in group], group, end_tokens[0])
                if part is None:
                    return None
                _note(part, 1, said, limits, end_tokens)
                parts.append(part)
        else:
            left = min(limits[at] - len(said[at]) for part in parts for at in _open(part))
            joined = _join(model, parts, left)
            new = _go_on(model, joined, left, end_tokens)
            _note(joined, new, said, limits, end_tokens)
            parts = [joined]
        parts = [part for part in parts if part.going]
        report(len(prompts) - len(waiting) - sum(len(part.going) for part in parts))
    return said


def _of_like_length(questions: Sequence[int], prompts: Sequence[list[int]]) -> Iterator[list[int]]:
    """``questions`` in groups, the longest prompts first, so that little of a group is padding."""
    group: list[int] = []
    padding = 0
    for at in sorted(questions, key=lambda at: (-len(prompts[at]), at)):
        missing = len(prompts[group[0]]) - len(prompts[at]) if group else 0
        if padding + missing > _PADDING:
            yield group
            group, padding, missing = [], 0, 0
        group.append(at)
        padding += missing
    yield group


def _begin(model: Any, prompts: Sequence[list[int]], questions: list[int], filler: int) -> _Rows | None:
    """The prompts with their first new token."""
    width = max(len(prompt) for prompt in prompts)
    cache = begin_cache(model, prompts, width)
    if cache is None:
        return None
    ids = [[filler] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    begun = _Rows(
        torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device), cache, questions
    )
    _generate(model, begun, 1, StoppingCriteriaList())
    return begun


def _join(model: Any, parts: Sequence[_Rows], left: int) -> _Rows:
    """What has not ended of all parts, with room for ``left`` tokens more."""
    columns = max(int(part.mask[part.going].sum(dim=1).max()) for part in parts)

    def align(name: str) -> torch.Tensor:
        tensors = [getattr(part, name)[part.going] for part in parts]
        return torch.cat([torch.nn.functional.pad(it, (columns - it.shape[1], 0)) for it in tensors])

    cache = gather_rows(model, [(part.cache, part.going) for part in parts], columns - 1, columns - 1 + left)
    return _Rows(align("ids"), align("mask"), cache, [at for part in parts for at in _open(part)])


def _go_on(model: Any, part: _Rows, most: int, end_tokens: Sequence[int]) -> int:
    """Up to ``most`` tokens more in each row, fewer when enough rows have ended -> how many."""
    before = part.ids.shape[1]
    ends = torch.tensor(end_tokens, device=part.ids.device)

    def enough(ids: torch.Tensor, _scores: object, **_kwargs: object) -> torch.Tensor:
        ended = torch.isin(ids[:, before:], ends).any(dim=1)
        return torch.full_like(ended, bool(ended.sum() * _PART >= len(ended)))

    _generate(model, part, most, StoppingCriteriaList([enough]))
    return part.ids.shape[1] - before


def _generate(model: Any, part: _Rows, most: int, stopping: StoppingCriteriaList) -> None:
    before = part.ids.shape[1]
    part.ids = model.generate(
        input_ids=part.ids,
        attention_mask=part.mask,
        past_key_values=part.cache,
        max_new_tokens=most,
        stopping_criteria=stopping,
    )
    part.mask = torch.nn.functional.pad(part.mask, (0, part.ids.shape[1] - before), value=1)


def _note(
    part: _Rows, new: int, said: list[list[int]], limits: Sequence[int], end_tokens: Sequence[int]
) -> None:
    """Add each row's ``new`` last tokens to what it said, up to its end."""
    for row, tokens in enumerate(part.ids[:, -new:].tolist()):
        at = part.questions[row]
        end = next((place for place, token in enumerate(tokens) if token in end_tokens), None)
        said[at] += tokens if end is None else tokens[: end + 1]
        if end is None and len(said[at]) < limits[at]:
            part.going.append(row)


def _open(part: _Rows) -> list[int]:
    """The questions that have not been answered to the end."""
    return [part.questions[row] for row in part.going]
