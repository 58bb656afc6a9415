"""README.md and card.html: made from manifest and evidence alone, valid, and checked."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from adapterhub.cards import page as cards_page
from adapterhub.cards.card import read_card
from adapterhub.packaging.evidence import CURVE, FAILURES, SCORES, ScoresEvidence
from adapterhub.packaging.manifest import Manifest, Merge, Parent
from adapterhub.packaging.release import Release

RunCli = Callable[..., tuple[int, str, str]]
Edit = Callable[..., None]
HOSTILE = "</pre></style><script>alert(1)</script> ![x](http://evil.example/x.png) | ``` \u202e\x1b[31m \"'&"


class Page(HTMLParser):
    """What a test wants to know of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "use", "path", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if tag in names]


def render(folder: Path, run_cli: RunCli) -> tuple[ModelCard, Page]:
    code, out, err = run_cli("card", folder)
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == [str(folder / "README.md"), str(folder / "card.html")]
    Release.open(folder).check_files()
    return ModelCard.load(folder / "README.md"), Page((folder / "card.html").read_text(encoding="utf-8"))


def test_front_matter_is_what_the_hub_reads(rich_release: Path, run_cli: RunCli, edit: Edit) -> None:
    manifest = Manifest.read(rich_release)
    hub_data = [data.model_copy(update={"source": "someone/orders"}) for data in manifest.datasets]
    base = manifest.base.model_copy(update={"name": "HuggingFaceTB/SmolLM2-135M-Instruct"})
    edit(rich_release, base=base, datasets=(*hub_data, manifest.datasets[0]), licence="Apache-2.0")
    card, _ = render(rich_release, run_cli)
    data = card.data.to_dict()
    results = card.data.eval_results
    assert {key: data[key] for key in data if key != "model-index"} == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "datasets": ["someone/orders"],
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["adapterhub", "lora", "qlora"],
    }
    assert [(r.metric_type, r.metric_value, r.dataset_name, r.dataset_split) for r in results] == [
        ("exact_match", 0.979798, "test.jsonl", "test"),
        ("loss", 0.0213, "test.jsonl", "test"),
    ]
    assert results[0].metric_args["base"] == 0.0
    assert card.data.model_name == "tiny-orders"


def test_front_matter_names_only_what_the_hub_knows(tiny_release: Path, run_cli: RunCli, edit: Edit) -> None:
    edit(tiny_release, licence="LicenseRef-Ours 2")
    card, _ = render(tiny_release, run_cli)
    assert (card.data.license, card.data.license_name) == ("other", "LicenseRef-Ours 2")
    for absent in ("base_model", "base_model_relation", "datasets", "eval_results"):
        assert card.data.get(absent) is None


@pytest.mark.parametrize(("kind", "relation"), [("merged", "merge"), ("quantized", "quantized")])
def test_models_made_from_an_adapter_are_named_so(
    rich_release: Path, run_cli: RunCli, edit: Edit, kind: str, relation: str
) -> None:
    base = Manifest.read(rich_release).base.model_copy(update={"name": "owner/base"})
    parent = Parent(ref="owner/a@0.1.0", manifest_sha256="e" * 64)
    edit(rich_release, kind=kind, base=base, parent=parent, merge=Merge(onto="trained"))
    card, page = render(rich_release, run_cli)
    assert card.data.base_model_relation == relation
    assert card.data.library_name == "transformers"
    assert "owner/a@0.1.0" in page.text
    assert "the weights as training quantized them, rounded to bfloat16" in page.text
    assert "load_adapter" not in card.text + page.text


def test_both_say_what_was_measured(rich_release: Path, run_cli: RunCli) -> None:
    card, page = render(rich_release, run_cli)
    for text in (card.text, page.text):
        for fact in (
            "trained on 2,400 rows of train.jsonl",
            "98.0 %",
            "94.9 to 99.2 %",
            "1.6893 to 1.7731",
            "198 rows, 8,123 tokens",
            "393.8 MiB",
            "537.3 MiB",
            "1.1 GiB",
            "4 recorded cases from 198 rows; the base answers 1 of them right.",
            "2 rows were left out",
            '{"name": "Bob", "items": [{"item": "egg", "quantity": 8}]}',
            "Bob wants eggs.",
            "adapterhub eval ./tiny-orders --data test.jsonl --max-new-tokens 96 --batch-size 16",
            "Training loss went from 2.4704 at step 1 to 0.0313 at step 120",
            "learning_rate: 0.001",
            "someone/tiny-orders@0.0.9",
            "AMD EPYC 7R13 (2 cores, 8.0 GiB)",
            Manifest.read(rich_release).base.digest,
        ):
            assert fact in text
        assert "more information" not in text.lower()


def test_what_was_not_measured_is_called_so(tiny_release: Path, run_cli: RunCli) -> None:
    card, page = render(tiny_release, run_cli)
    sections = {part.partition("\n")[0]: part for part in re.split("\n##+ ", card.text)}
    for title in (
        "Scores, base beside adapter", "Probes", "Benchmarks", "What quantization cost",
        "Known failure cases", "Training curve", "Memory",
    ):  # fmt: skip
        assert "\nNot measured." in sections[title]
    assert "\nNot compared with an earlier version." in sections["What changed since the last version"]
    assert "recipe, complete" in card.text
    assert page.text.lower().count("not measured") >= 9
    assert len(page.all("svg")) == 1  # the lineage
    assert not (tiny_release / "evidence/curve.svg").exists()


def test_no_failure_is_said_with_its_limit(rich_release: Path, run_cli: RunCli) -> None:
    Release.open(rich_release).with_files({FAILURES: b""})
    card, page = render(rich_release, run_cli)
    for text in (card.text, page.text):
        assert "None among 198 rows that were asked." in text


def test_scores_on_training_rows_are_called_out(rich_release: Path, run_cli: RunCli, edit: Edit) -> None:
    trained = Manifest.read(rich_release).datasets[0].model_copy(update={"sha256": "d" * 64})
    edit(rich_release, datasets=(trained,))
    card, _ = render(rich_release, run_cli)
    assert "The scored rows are the training rows" in card.text


def test_the_page_is_sound_html_that_needs_nothing_else(rich_release: Path, run_cli: RunCli) -> None:
    _, page = render(rich_release, run_cli)
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert page.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(attrs.get("scope") for attrs in page.all("th"))
    assert not page.all("script", "link", "img", "iframe", "object")
    addresses = [
        attrs.get(key) for _, attrs in page.tags for key in ("href", "src", "xlink:href") if key in attrs
    ]
    assert {address for address in addresses if address and not address.startswith("#")} == {
        "evidence/failures.jsonl",
        "adapterhub.json",
    }
    assert {address[1:] for address in addresses if address and address.startswith("#")} <= set(ids)
    for attrs in (attrs for _, attrs in page.tags if "aria-labelledby" in attrs):
        assert set(str(attrs["aria-labelledby"]).split()) <= set(ids)


def test_the_curve_is_a_picture_with_words(rich_release: Path, run_cli: RunCli) -> None:
    card, page = render(rich_release, run_cli)
    assert [svg["role"] for svg in page.all("svg")] == ["img", "img"]
    picture = (rich_release / "evidence/curve.svg").read_text(encoding="utf-8")
    for text in (picture, (rich_release / "card.html").read_text(encoding="utf-8")):
        assert "<title id" in text
        assert "held-out loss from 0.3323 at step 30 to 0.0218 at step 120" in text
        assert "var(--series-1)" in text
        assert "#0a000" not in text
    assert "](evidence/curve.svg)" in card.text
    from xml.etree import ElementTree

    assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"


def hostile(folder: Path, edit: Edit) -> None:
    manifest = Manifest.read(folder)
    edit(
        folder,
        task=HOSTILE,
        licence=HOSTILE,
        recipe={"name": HOSTILE, HOSTILE: [HOSTILE]},
        base=manifest.base.model_copy(update={"name": HOSTILE}),
        tools={HOSTILE: HOSTILE},
        datasets=tuple(data.model_copy(update={"source": HOSTILE}) for data in manifest.datasets),
    )
    lines = []
    for line in (folder / FAILURES).read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        case |= {"observed": HOSTILE + "\n# x", "base_answer": HOSTILE, "failure_class": HOSTILE}
        case["expected"]["value"] = HOSTILE
        case["messages"] = [{"role": HOSTILE, "content": HOSTILE}]
        lines.append(json.dumps(case) + "\n")
    scores = json.loads((folder / SCORES).read_bytes())
    scores["data"]["source"] = HOSTILE
    scores["hardware"]["name"] = HOSTILE
    scores["example"] = {"messages": [{"role": "user", "content": HOSTILE}], "answer": HOSTILE}
    Release.open(folder).with_files(
        {
            FAILURES: "".join(lines).encode(),
            SCORES: ScoresEvidence.model_validate(scores).model_dump_json().encode(),
        }
    )


def test_nothing_from_a_release_becomes_markup(rich_release: Path, run_cli: RunCli, edit: Edit) -> None:
    sound, sound_page = render(rich_release, run_cli)
    hostile(rich_release, edit)
    card, page = render(rich_release, run_cli)
    assert page.open == []
    assert not page.all("script", "img")
    assert len(page.all("style")) == 1
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in sound_page.tags}
    html = (rich_release / "card.html").read_text(encoding="utf-8")
    assert "\u202e" not in html + card.content
    assert "\x1b" not in html + card.content

    def links(text: str) -> set[str]:
        tokens = MarkdownIt("commonmark").enable("table").parse(text)
        children = [child for token in tokens for child in token.children or []]
        assert not [token for token in [*tokens, *children] if token.type.startswith("html")]
        return {str(child.attrs.get("href") or child.attrs.get("src")) for child in children if child.attrs}

    assert links(card.text) == links(sound.text)
    assert card.data.license == "other"
    assert yaml.safe_load(fences(card.text, "yaml")[0])["name"]


def fences(markdown: str, language: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse(markdown)
    return [token.content for token in tokens if token.type == "fence" and token.info == language]


def test_the_recipe_and_the_programs_are_whole(rich_release: Path, run_cli: RunCli) -> None:
    card, page = render(rich_release, run_cli)
    assert yaml.safe_load(fences(card.text, "yaml")[0]) == Manifest.read(rich_release).recipe
    programs = fences(card.text, "python")
    assert ["import" in program for program in programs] == [True] * 3
    for program in programs:
        compile(program, "card", "exec")
        assert program in page.text


@pytest.mark.slow
def test_the_same_release_gives_the_same_bytes(rich_release: Path, run_cli: RunCli, tmp_path: Path) -> None:
    names = ("README.md", "card.html", "evidence/curve.svg", "adapterhub.json")
    other = tmp_path / "elsewhere" / "tiny-orders"
    shutil.copytree(rich_release, other)
    render(rich_release, run_cli)
    command = [sys.executable, "-m", "adapterhub", "card", str(other)]
    subprocess.run(
        command, check=True, capture_output=True, env={"PYTHONHASHSEED": "7", "HOME": str(tmp_path)}
    )
    for name in names:
        assert (rich_release / name).read_bytes() == (other / name).read_bytes(), name


def test_check_passes_fails_and_writes_nothing(rich_release: Path, run_cli: RunCli) -> None:
    before = Release.open(rich_release).manifest
    code, _, err = run_cli("card", rich_release, "--check")
    assert (code, "README.md is missing" in err) == (3, True)
    assert "fix: make it again: adapterhub card" in err
    assert Release.open(rich_release).manifest == before
    assert not (rich_release / "README.md").exists()

    assert run_cli("card", rich_release)[0] == 0
    code, out, _ = run_cli("card", rich_release, "--check")
    assert (code, "matches its evidence" in out) == (0, True)

    Release.open(rich_release).with_files({FAILURES: b""})
    code, _, err = run_cli("card", rich_release, "--check")
    assert (code, "does not match" in err) == (3, True)


def test_a_card_edited_by_hand_is_found(rich_release: Path, run_cli: RunCli) -> None:
    run_cli("card", rich_release)
    page = (rich_release / "card.html").read_bytes().replace(b"98.0 %", b"99.9 %")
    Release.open(rich_release).with_files({"card.html": page})
    code, _, err = run_cli("card", rich_release, "--check")
    assert (code, "card.html does not match" in err) == (3, True)


def test_evidence_that_was_edited_is_refused(rich_release: Path, run_cli: RunCli) -> None:
    path = rich_release / SCORES
    path.write_bytes(path.read_bytes().replace(b'"base": 1.7312', b'"base": 9.7312'))
    code, _, err = run_cli("card", rich_release)
    assert (code, "scores.json is not the file" in err) == (4, True)
    assert not (rich_release / "README.md").exists()


def test_evidence_that_is_not_listed_is_refused(tiny_release: Path, run_cli: RunCli) -> None:
    (tiny_release / "evidence").mkdir()
    (tiny_release / CURVE).write_bytes(b"{}")
    code, _, err = run_cli("card", tiny_release)
    assert (code, "not listed" in err) == (3, True)


def test_scores_of_another_adapter_are_refused(rich_release: Path, run_cli: RunCli) -> None:
    scores = json.loads((rich_release / SCORES).read_bytes()) | {"adapter_sha256": "f" * 64}
    Release.open(rich_release).with_files({SCORES: json.dumps(scores).encode()})
    code, _, err = run_cli("card", rich_release)
    assert (code, "measured on another adapter" in err) == (3, True)


@pytest.mark.parametrize("content", [b"not json", b'{"r": "many", "lora_alpha": 8}', b"[]"])
def test_a_malformed_adapter_config_is_an_error_not_a_traceback(
    rich_release: Path, run_cli: RunCli, content: bytes
) -> None:
    Release.open(rich_release).with_files({"adapter_config.json": content})
    code, _, err = run_cli("card", rich_release)
    assert (code, "adapter_config.json" in err) == (3, True)


def test_a_data_set_release_has_no_card_yet(tiny_release: Path, run_cli: RunCli, edit: Edit) -> None:
    edit(tiny_release, kind="dataset", base=None)
    code, _, err = run_cli("card", tiny_release)
    assert (code, "without a base model" in err) == (3, True)


@pytest.mark.slow
def test_a_signed_release_keeps_its_card(rich_release: Path, run_cli: RunCli) -> None:
    run_cli("card", rich_release)
    (rich_release / "model.sig").write_bytes(b"{}")
    assert run_cli("card", rich_release)[0] == 0
    assert run_cli("card", rich_release, "--check")[0] == 0
    (rich_release / "README.md").unlink()
    code, _, err = run_cli("card", rich_release)
    assert (code, "is signed" in err) == (3, True)


@pytest.mark.slow
def test_the_card_needs_no_torch(rich_release: Path) -> None:
    program = (
        "import sys; from adapterhub.cli import main; code = main(['card', sys.argv[1]]);"
        "heavy = {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules);"
        "print(code, sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(rich_release)], capture_output=True, text=True, check=True
    )
    assert done.stderr == "0 []\n"


def test_curve_tables_keep_first_last_and_held_out(rich_release: Path) -> None:
    rows = read_card(Release.open(rich_release)).curve_rows
    assert [point.step for point in rows] == [1, 30, 60, 90, 120]


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_every_text_colour_has_contrast(scheme: str) -> None:
    """WCAG 2.2, success criterion 1.4.3: at least 4.5 to 1 on both backgrounds."""
    style = (Path(cards_page.__file__).parent / "templates/page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    light, dark, paper = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks)
    colours = {"light": light, "dark": dark, "print": paper}[scheme]
    for name in ("ink", "ink-soft", "link", "wrong", "right", "series-1", "series-2"):
        for behind in ("paper", "raised"):
            assert contrast(colours[name], colours[behind]) >= 4.5, (name, behind)


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    darker, lighter = sorted((luminance(first), luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


def test_checks_of_other_kinds_are_shown_as_they_are(rich_release: Path, run_cli: RunCli) -> None:
    case = json.loads((rich_release / FAILURES).read_text(encoding="utf-8").splitlines()[0])
    case["expected"] = {"type": "regex", "pattern": "^(yes|no)$"}
    Release.open(rich_release).with_files({FAILURES: json.dumps(case).encode()})
    card, page = render(rich_release, run_cli)
    for text in (card.text, page.text):
        assert '{"pattern": "^(yes|no)$", "type": "regex"}' in text


@pytest.mark.parametrize("loss", [0.0, 1e30, float("inf"), float("nan")])
def test_odd_losses_still_make_a_card(rich_release: Path, run_cli: RunCli, loss: float) -> None:
    curve = json.loads((rich_release / CURVE).read_bytes())
    for point in curve["points"][::3]:
        point["loss"] = loss
    Release.open(rich_release).with_files({CURVE: json.dumps(curve).encode()})
    render(rich_release, run_cli)


def test_a_run_without_losses_has_no_picture(rich_release: Path, run_cli: RunCli) -> None:
    curve = json.loads((rich_release / CURVE).read_bytes()) | {"points": [{"step": 1}]}
    Release.open(rich_release).with_files({CURVE: json.dumps(curve).encode()})
    card, page = render(rich_release, run_cli)
    assert len(page.all("svg")) == 1  # the lineage
    assert "curve.svg" not in card.text
    assert "| 1 | not measured | not measured |" in card.text
    assert "None" not in card.text + page.text
