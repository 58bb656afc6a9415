"""README.md here lists every tampering with the error that it must give; run this file to write it anew."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
README = HERE / "README.md"
AT_LEAST = 40


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named(function: object) -> str:
    return str(getattr(function, "__name__", function)).replace("_", " ")


def sections() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    signed, strangers = load("test_signed_release"), load("test_stranger_folders")
    pickles, checkpoints = load("test_pickles"), load("test_checkpoint_files")
    yield (
        "A signed release, changed: `verify`, `pull` and `load_adapter` raise SignatureError (exit 4)",
        [
            (
                "a bit flipped in each file, at four places",
                "is not the file that adapterhub.json lists, or above",
            )
        ]
        + [(named(attack), words) for attack, words in signed.ATTACKS.items()]
        + [(f"model.sig: {name}", words) for name, (_content, words) in signed.SIGNATURE_FILES.items()]
        + [
            ("names in the manifest that lead outside (11 of them)", "is not a relative path, and the like"),
            ("names that are one file after case folding", "are one file on some systems"),
            ("the manifest taken away", "holds no adapterhub.json"),
        ],
    )
    yield (
        "A stranger's adapter: `scan` says severity high (exit 4), `load_adapter` raises ReleaseError",
        [(name, f"rule `{rule}`") for name, (_attack, rule) in strangers.HIGH.items()],
    )
    yield (
        "A stranger's adapter: `scan` says it, and does not refuse",
        [(name, f"rule `{rule}`, {how}") for name, (_attack, rule, how) in strangers.LESSER.items()],
    )
    yield (
        "A pickle: `convert` raises ReleaseError (exit 3), the first of them without opening it",
        [(name, words) for name, (_attack, words) in {**pickles.UNOPENED, **pickles.UNFIT}.items()]
        + [("a call that no list of names has", "Unsupported global, as weights-only loading says")],
    )
    yield (
        "A base or an adapter to merge: `merge` raises ReleaseError (exit 3) and writes nothing",
        [(named(attack), words) for attack, words in checkpoints.ATTACKS.items()],
    )
    yield (
        "Changes between the check and the load (test_race.py)",
        [
            ("the adapter, its settings and template after their check", "loaded as they were checked"),
            ("a file of an opened release", "is no longer the file that adapterhub.json lists"),
            ("a file of an opened release taken away", "went away while it was loaded"),
            ("the base: a bit, while it is loaded", "changed while it was loaded"),
            ("the base: another file in its place", "changed while it was loaded"),
            ("the base: changed, read, and restored with its time", "changed while it was loaded"),
            ("the base: renamed away and back", "changed while it was loaded"),
            ("an adapter_config.json beside the base", "not read"),
            ("an index beside the base that leads out", "is not a relative path"),
            ("a merged release's weights, while they are loaded", "changed while it was loaded"),
            ("an adapter_config.json in a merged release", "makes transformers load another model"),
        ],
    )


ELSEWHERE = """\
Beside these: another base, with what differs, and factors for layers that the base has not, or in
another size ([test_load.py](../test_load.py), [test_base.py](../packaging/test_base.py)); tags that were
moved, releases that went back, another signer than locked ([test_lock.py](../hub/test_lock.py)); a cache
that was written into ([test_pull.py](../hub/test_pull.py)); trust files that others may write
([test_trust.py](../packaging/test_trust.py)). What reads strangers' bytes is fuzzed by
[benchmarks/fuzz.py](../../benchmarks/fuzz.py).
"""


def listing() -> str:
    found = list(sections())
    count = sum(len(rows) for _title, rows in found)
    lines = ["# Attacks", "", f"{count} tamperings, each a test here, and what each must give.", ""]
    for title, rows in found:
        lines += [f"## {title}", "", "| tampering | what is said |", "|---|---|"]
        lines += [f"| {plain(name)} | {plain(words)} |" for name, words in rows]
        lines.append("")
    return "\n".join(lines) + "\n" + ELSEWHERE


def plain(text: str) -> str:
    shown = "".join(char if char.isascii() else f"\\u{ord(char):04x}" for char in text)
    return shown.replace("|", "\\|")


def test_the_readme_lists_every_attack() -> None:
    assert README.read_text() == listing(), "run: .venv/bin/python tests/attacks/test_listing.py"
    assert sum(len(rows) for _title, rows in sections()) >= AT_LEAST


if __name__ == "__main__":
    README.write_text(listing())
