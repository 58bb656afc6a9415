"""The pages made from the code are as the code is, and the pages written by hand name what exists."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub import errors
from adapterhub.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def generate(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "docs/generate.py", *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("columns", ["40", "200"])
def test_the_generated_pages_are_up_to_date_at_any_width(columns: str) -> None:
    done = generate("--check", COLUMNS=columns)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_page_of_what_fits_is_what_the_ledger_says() -> None:
    """And an old one is seen."""
    page = runpy.run_path(str(ROOT / "docs/scaling.py"))
    text = page["scaling_page"]()
    assert text == (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    assert "| 65B | 2,048 | no | " in text
    assert all(word in text for word in ("**predicted**", "**Computed**", "**Not measured**"))


def test_an_old_page_is_seen(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    copy = tmp_path / "docs/generate.py"
    copy.write_bytes((ROOT / "docs/generate.py").read_bytes())
    (tmp_path / "docs/recipe.md").write_bytes((ROOT / "docs/recipe.md").read_bytes())
    (tmp_path / "docs/cli.md").write_text("# Commands\n", encoding="utf-8")
    done = subprocess.run([sys.executable, copy, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "error: docs/cli.md does not match the code\nfix: make docs\n",
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """The anchors that headings get on code hosts: lower case, blanks as hyphens, other signs dropped."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_lists_every_command() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `adapterhub (\w+)", readme, re.MULTILINE)) == set(COMMANDS)


def test_the_readme_lists_the_exit_codes_of_the_errors() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = {
        name: int(code)
        for code, names in re.findall(r"^\| (\d+) \| (.*?) \|", readme, re.MULTILINE)
        for name in re.findall(r"`(\w+Error)`", names)
    }
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.AdapterHubError)
    ]
    assert listed == {kind.__name__: kind.exit_code for kind in kinds}


def test_the_readmes_program_runs(
    tiny_release: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    published = '"owner/name@v0.1.0", require_signed=True'
    assert published in program
    here = f"{str(tiny_release)!r}, base={str(tiny_base)!r}"
    (tmp_path / "program.py").write_text(program.replace(published, here), encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "program.py"))
    assert type(names["model"]).__name__.startswith("Peft")
    answer = names["output"][0, names["inputs"]["input_ids"].shape[1] :]
    assert 1 <= len(answer) <= 128
    assert capsys.readouterr().out == names["tokenizer"].decode(answer, skip_special_tokens=True) + "\n"
