"""diff, bump and log as their user meets them, against a real Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save

from adapterhub.hub.push import push
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest
from adapterhub.packaging.release import Release

Run = Callable[..., tuple[int, str, str]]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def repo(request: pytest.FixtureRequest, hub_server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that no other test uses, on the Hub that is asked from here on."""
    monkeypatch.setenv("HF_ENDPOINT", hub_server.url)
    monkeypatch.setenv("HF_TOKEN", hub_server.token)
    return f"ada/versions-{sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


@pytest.fixture
def successor(tiny_release: Path, tmp_path: Path) -> Path:
    """A copy of the tiny release with other weights in one layer."""
    path = tmp_path / "next"
    shutil.copytree(tiny_release, path)
    tensors = load_file(path / WEIGHTS)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.lora_B.weight"))
    tensors[name] = tensors[name] * 3
    Release.open(path).with_files({WEIGHTS: save(tensors, {"format": "pt"})})
    return path


def rewrite(folder: Path, **changes: object) -> None:
    manifest = Manifest.read(folder).model_copy(update=changes)
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())


def test_diff_says_how_far_the_weights_are_apart(run_cli: Run, tiny_release: Path, successor: Path) -> None:
    code, out, _ = run_cli("diff", tiny_release, successor, "--json")
    found = json.loads(out)
    assert (code, found["demands"]) == (0, "minor")
    assert [(change["level"], change["part"]) for change in found["changes"]] == [("minor", "weights")]
    before, after = load_file(tiny_release / WEIGHTS), load_file(successor / WEIGHTS)
    layers = {layer["module"]: layer for layer in found["weights"]["layers"]}
    assert len(layers) == 14
    squares = [0.0, 0.0]
    for module, layer in layers.items():
        key = f"base_model.model.{module}.lora_{{}}.weight"
        # The whole products, that the command does not make; alpha / rank is 2.
        full = [2 * t[key.format("B")].double() @ t[key.format("A")].double() for t in (before, after)]
        delta = torch.linalg.norm(full[1] - full[0])
        assert layer["norm_a"] == pytest.approx(float(torch.linalg.norm(full[0])), rel=1e-6)
        assert layer["delta"] == pytest.approx(float(delta), rel=1e-6, abs=1e-12)
        squares = [squares[0] + float(delta) ** 2, squares[1] + layer["norm_a"] ** 2]
    assert layers["model.layers.1.mlp.up_proj"]["relative"] == pytest.approx(2.0)
    assert found["weights"]["relative"] == pytest.approx((squares[0] / squares[1]) ** 0.5)
    code, out, _ = run_cli("diff", tiny_release, successor)
    assert code == 0
    assert "model.layers.1.mlp.up_proj" in next(line for line in out.splitlines() if "‖ΔB‖ " in line)
    code, out, _ = run_cli("diff", tiny_release, tiny_release)
    assert "demands   nothing" in out
    assert "weights   the same" in out


@pytest.mark.parametrize("measured_alike", [True, False])
def test_a_case_is_fixed_or_new_only_where_both_were_asked(
    run_cli: Run, tiny_release: Path, successor: Path, measured_alike: bool
) -> None:
    def case(name: str, added: bool = False) -> dict:
        return {
            "id": sha256(name.encode()).hexdigest()[:12], "failure_class": "wrong_answer", "decoding": {},
            "messages": [{"role": "user", "content": f"{name}\x1b[31m"}], "observed": "no",
            "expected": {"type": "exact", "value": "yes"}, "base_answer": "no",
            "since": "0.1.0", "added": added,
        }  # fmt: skip

    def evidence(folder: Path, cases: list[dict], rows: str, right: float) -> None:
        weights = Manifest.read(folder).files[WEIGHTS].sha256
        score = {"metric": "exact_match", "unit": "share of rows", "rows": 9, "base": 0.1, "adapter": right}
        scores = {
            "adapter_sha256": weights,
            "data": {"source": "test.jsonl", "split": "test", "rows": 9, "sha256": rows * 64},
            "decoding": {"max_new_tokens": 9},
            "scores": [score],
            "hardware": {"device": "cpu", "name": "x", "memory_bytes": 1},
            "seconds": 1.0,
        }
        lines = "".join(json.dumps(found) + "\n" for found in cases)
        Release.open(folder).with_files(
            {"evidence/scores.json": json.dumps(scores).encode(), "evidence/failures.jsonl": lines.encode()}
        )

    evidence(tiny_release, [case("gone"), case("stays"), case("asked by hand", added=True)], "a", 0.5)
    evidence(successor, [case("stays"), case("comes")], "a" if measured_alike else "b", 0.75)
    code, out, _ = run_cli("diff", tiny_release, successor, "--json")
    found = json.loads(out)["failures"]
    told = {name: [case["messages"][0]["content"][:-5] for case in cases] for name, cases in found.items()}
    by_hand = ["asked by hand"]
    expected = (
        {"fixed": ["gone"], "new": ["comes"], "still": ["stays"], "only_a": by_hand, "only_b": []}
        if measured_alike
        else {"fixed": [], "new": [], "still": ["stays"], "only_a": ["gone", *by_hand], "only_b": ["comes"]}
    )
    assert (code, told) == (0, expected)
    code, out, _ = run_cli("diff", tiny_release, successor)
    assert "50.0 % (not measured) → 75.0 %" in out
    assert ("measured on other rows" in out) is not measured_alike
    assert "\x1b" not in out


def test_from_parent_to_child_and_back_to_the_first(
    run_cli: Run, repo: str, tiny_release: Path, successor: Path, tmp_path: Path
) -> None:
    push(Release.open(tiny_release), repo)
    code, _, err = run_cli("bump", "auto", successor)
    assert (code, "names no parent" in err) == (3, True)
    code, _, err = run_cli("bump", "patch", successor, "--parent", repo)
    assert (code, "patch is too little" in err, "bump minor" in err) == (3, True, True)
    code, out, err = run_cli("bump", "auto", successor, "--parent", repo)
    assert (code, out) == (0, "0.2.0\n")
    assert "minor  weights: adapter_model.safetensors changed" in err
    assert run_cli("bump", "auto", successor)[:2] == (
        0,
        "0.2.0\n",
    )  # again: the parent is in the manifest now
    manifest = Manifest.read(successor)
    assert manifest.parent is not None
    assert (manifest.version, manifest.parent.ref) == ("0.2.0", f"{repo}@0.1.0")
    assert manifest.parent.manifest_sha256 == Release.open(tiny_release).digest
    push(Release.open(successor), repo)
    third = tmp_path / "third"
    assert run_cli("pull", repo, "--out", third)[0] == 0
    rewrite(third, task="Something else.")
    assert run_cli("bump", "auto", third, "--parent", repo)[:2] == (0, "1.0.0\n")
    push(Release.open(third), repo)
    code, out, _ = run_cli("log", repo, "--json")
    told = json.loads(out)
    assert (code, told["complete"], told["versions"]) == (0, True, ["1.0.0", "0.2.0", "0.1.0"])
    assert [it["version"] for it in told["lineage"]] == ["1.0.0", "0.2.0", "0.1.0"]
    assert [it["digest"] for it in told["lineage"]] == [
        Release.open(folder).digest for folder in (third, successor, tiny_release)
    ]
    code, out, _ = run_cli("log", third)
    assert (code, [line.split()[0] for line in out.splitlines()]) == (0, ["1.0.0", "0.2.0", "0.1.0", "the"])


def test_log_holds_each_ancestor_to_its_digest(
    run_cli: Run, repo: str, hub_server, tiny_release: Path, successor: Path
) -> None:
    push(Release.open(tiny_release), repo)
    assert run_cli("bump", "auto", successor, "--parent", repo)[0] == 0
    api = HfApi(endpoint=hub_server.url, token=hub_server.token)
    api.delete_repo(repo)
    code, out, _ = run_cli("log", successor)
    assert (code, out.splitlines()[1][:1]) == (0, "?")
    rewrite(tiny_release, task="Another past.")
    push(Release.open(tiny_release), repo)
    code, _, err = run_cli("log", successor)
    assert (code, "is not the release that its successor names" in err) == (4, True)
    code, _, err = run_cli("bump", "auto", successor)
    assert (code, "is not the release that" in err) == (4, True)


@pytest.mark.slow
def test_a_bump_removes_the_signature_and_renews_the_card(
    run_cli: Run, tiny_release: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tiny_release, changed)
    assert run_cli("card", changed)[0] == 0
    assert run_cli("keygen", tmp_path / "keys")[0] == 0
    assert run_cli("sign", changed, "--key", tmp_path / "keys/adapterhub.key")[0] == 0
    code, out, err = run_cli("bump", "auto", changed, "--parent", tiny_release)
    assert (code, out) == (0, "0.1.1\n")
    assert "its signature was of 0.1.0 and was removed" in err
    assert "its card was made again" in err
    assert not Release.open(changed).is_signed
    Release.open(changed).check_files()
    assert run_cli("card", changed, "--check")[0] == 0
    readme = changed / "README.md"
    Release.open(changed).with_files({"README.md": readme.read_bytes() + b"mine\n"})
    code, out, err = run_cli("bump", "minor", changed, "--parent", tiny_release)
    assert (code, out, "did not match before" in err) == (0, "0.2.0\n", True)
    assert readme.read_bytes().endswith(b"mine\n")


def test_what_bump_refuses(run_cli: Run, tiny_release: Path, successor: Path, tmp_path: Path) -> None:
    same = tmp_path / "same"
    shutil.copytree(tiny_release, same)
    rewrite(same, version="0.1.0")
    code, _, err = run_cli("bump", "auto", same, "--parent", tiny_release)
    assert (code, "is its parent" in err) == (3, True)
    rewrite(same, version="0.1.1")
    code, _, err = run_cli("bump", "auto", same, "--parent", tiny_release)
    assert (code, "nothing changed" in err) == (3, True)
    rewrite(successor, version="3.0.0")
    code, _, err = run_cli("bump", "auto", successor, "--parent", tiny_release)
    assert (code, "is 3.0.0 already, above 0.2.0" in err) == (3, True)
    rewrite(successor, kind="merged")
    code, _, err = run_cli("bump", "auto", successor, "--parent", tiny_release)
    assert (code, "its version is that of its adapter" in err) == (3, True)
    (tiny_release / WEIGHTS).write_bytes(b"")
    code, _, err = run_cli("bump", "auto", tiny_release, "--parent", successor)
    assert (code, "is not the file that" in err) == (4, True)
    code, _, err = run_cli("bump", "auto", tmp_path / "nowhere")
    assert (code, "no such folder" in err) == (3, True)
    code, _, err = run_cli("diff", successor, "nowhere/a/b")
    assert (code, "no such folder" in err) == (3, True)
