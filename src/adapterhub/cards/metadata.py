"""The README's front matter: what the Hub reads of a card."""

from __future__ import annotations

from typing import Any

from adapterhub.cards.card import Card, is_hub_name
from adapterhub.cards.escaping import one_line
from adapterhub.cards.formats import METRICS
from adapterhub.packaging.evidence import Score, ScoresEvidence
from adapterhub.packaging.manifest import Kind

RELATIONS: dict[Kind, str] = {"adapter": "adapter", "merged": "merge", "quantized": "quantized"}
_LIBRARIES: dict[Kind, str] = {"adapter": "peft", "merged": "transformers", "quantized": "transformers"}

# https://huggingface.co/docs/hub/repositories-licenses: the Hub refuses any other value of `license`.
# fmt: off
HUB_LICENCES = frozenset(
    {
        "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd",
        "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0",
        "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
        "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
        "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
        "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl",
        "lgpl-2.1", "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl",
        "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openrail++", "osl-3.0", "postgresql", "ofl-1.1",
        "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license", "llama2", "llama3",
        "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "unknown", "other",
    }
)
# fmt: on


def front_matter(card: Card) -> str:
    """The card's metadata as YAML without the ``---`` lines, as huggingface_hub's parsers read it."""
    from huggingface_hub import ModelCardData

    manifest = card.manifest
    datasets = [data.source for data in card.rows("train") if is_hub_name(data.source)]
    known: dict[str, Any] = {**_licence(manifest.licence), **_results(card)}
    data = ModelCardData(
        library_name=_LIBRARIES[manifest.kind],
        pipeline_tag="text-generation",
        base_model=card.base_on_hub,
        base_model_relation=RELATIONS[manifest.kind] if card.base_on_hub else None,
        datasets=list(dict.fromkeys(datasets)) or None,
        tags=_tags(card),
        **known,
    )
    return data.to_yaml()


def _licence(licence: str | None) -> dict[str, str]:
    """``license`` as the Hub knows it; any other licence goes by name, beside ``license: other``."""
    if licence is None:
        return {}
    name = one_line(licence)
    if name.lower() in HUB_LICENCES:
        return {"license": name.lower()}
    return {"license": "other", "license_name": name}


def _tags(card: Card) -> list[str]:
    quantization = card.base.quantization
    tags = ["adapterhub", "lora"]
    if quantization is not None and quantization.type in ("nf4", "fp4"):
        tags.append("qlora")
    if card.manifest.kind != "adapter":
        tags.append(card.manifest.kind)
    return tags


def _results(card: Card) -> dict[str, Any]:
    """The adapter's scores as a model-index; the base's stand in each metric's args."""
    from huggingface_hub import EvalResult

    scores = card.scores
    if scores is None:
        return {}
    source = one_line(scores.data.source)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=source,
            dataset_name=source,
            dataset_split=scores.data.split,
            dataset_revision=scores.data.revision,
            metric_type=score.metric,
            metric_name=f"{METRICS[score.metric]} ({score.unit})",
            metric_value=round(score.adapter, 6),
            metric_args=_metric_args(score, scores),
        )
        for score in scores.scores
    ]
    return {"model_name": card.manifest.name, "eval_results": results}


def _metric_args(score: Score, scores: ScoresEvidence) -> dict[str, Any]:
    args: dict[str, Any] = {
        "rows": score.rows,
        "base": round(score.base, 6),
        "rows_sha256": scores.data.sha256,
    }
    if score.adapter_interval is not None:
        args["interval_95"] = [round(bound, 6) for bound in score.adapter_interval]
    return args
