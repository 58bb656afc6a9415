"""The card of a dataset release: the Hub's metadata, and what was counted in the rows."""

from __future__ import annotations

from typing import Any, Final

from adapterhub.cards import escaping
from adapterhub.cards.escaping import Markdown, one_line
from adapterhub.cards.formats import in_bytes, in_percent
from adapterhub.cards.licences import HUB_LICENCES
from adapterhub.cards.snippets import TEMPLATES
from adapterhub.packaging.dataset.evidence import DatasetEvidence, Lengths
from adapterhub.packaging.manifest import Manifest

_SIZES: Final = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_LARGER: Final = ((10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"), (1_000_000_000, "100M<n<1B"))
_BAR_CHARACTERS: Final = 24


def render_dataset_card(manifest: Manifest, evidence: DatasetEvidence, repo: str) -> bytes:
    """README.md's bytes, for a release that is to be pushed to ``repo`` (``owner/name``)."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        finalize=escaping.inline,  # every value is escaped, unless a filter made it Markdown
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "block": escaping.block,
        "code": escaping.code,
        "bytes": in_bytes,
        "figures": "{:,}".format,
        "bins": _bins,
    }
    content = {
        "front_matter": Markdown(_front_matter(manifest, evidence)),
        "manifest": manifest,
        "evidence": evidence,
        "repo": repo,
        "share": lambda part, whole: in_percent(part / whole) if whole else "0.0 %",
    }
    return environment.get_template("dataset.md.j2").render(content).encode()


def _front_matter(manifest: Manifest, evidence: DatasetEvidence) -> str:
    """YAML as huggingface_hub and datasets read it; ``configs`` says which files are which split's."""
    from huggingface_hub import DatasetCardData

    rows = sum(split.rows for split in evidence.splits)
    known: dict[str, Any] = _licence(manifest.licence) | {
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": split.split, "path": f"data/{split.split}-*"} for split in evidence.splits
                ],
            }
        ]
    }
    return DatasetCardData(
        pretty_name=manifest.name,
        task_categories=["text-generation"],
        size_categories=[next((name for below, name in _SIZES + _LARGER if rows < below), "n>1T")],
        tags=["adapterhub"],
        **known,
    ).to_yaml()


def _licence(licence: str | None) -> dict[str, Any]:
    """``license`` as the Hub knows it; any other goes by name, beside ``license: other``."""
    if licence is None:
        return {}
    name = one_line(licence)
    if name.lower() in HUB_LICENCES:
        return {"license": name.lower()}
    return {"license": "other", "license_name": name}


def _bins(lengths: Lengths) -> list[tuple[str, int, Markdown]]:
    """Each bin of a histogram: its lengths in words, its rows, and a bar."""
    most = max(lengths.rows, default=0) or 1
    found = []
    lower = 0
    for upper, rows in zip(lengths.upper, lengths.rows, strict=True):
        bar = "█" * round(_BAR_CHARACTERS * rows / most) or ("▏" if rows else "")
        found.append((f"{lower:,} to {upper:,}", rows, Markdown(bar)))
        lower = upper + 1
    return found
