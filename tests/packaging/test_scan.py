"""``adapterhub scan``: a report on any adapter's folder, in words and as JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterhub.errors import ReleaseError
from adapterhub.packaging.scan.report import scan_folder
from adapterhub.packaging.scan.template import scan_template

Run = Callable[..., tuple[int, str, str]]


def test_a_sound_release_exits_0_and_says_so(tiny_release: Path, run_cli: Run) -> None:
    code, out, err = run_cli("scan", tiny_release)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("found   0 high, 0 medium")


def test_high_exits_4_with_every_finding_told(tiny_release: Path, run_cli: Run) -> None:
    (tiny_release / "modeling.py").write_text("print('hello')")
    code, out, err = run_cli("scan", tiny_release)
    assert code == 4
    assert "high    modeling.py: code beside the weights" in out
    assert "does not list it" in out
    assert "not safe to load: 2 findings of severity high" in err


def test_json_has_counts_and_rules(tiny_release: Path, run_cli: Run) -> None:
    weights = tiny_release / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")  # the last factor's last value, and the digest
    code, out, _err = run_cli("scan", tiny_release, "--json")
    report = json.loads(out)
    assert code == 4
    assert report["worst"] == "high"
    assert report["counts"]["high"] == sum(it["severity"] == "high" for it in report["findings"])
    assert "not-as-listed" in {finding["rule"] for finding in report["findings"]}


def test_the_base_tells_what_does_not_fit_and_what_the_template_changed(
    tiny_release: Path, tiny_base: Path, tmp_path: Path
) -> None:
    rules = {it.rule: it for it in scan_folder(tiny_release, tiny_base).findings}
    assert rules.keys() == {"template-of-base", "base-path"}  # the tiny base has no name on a Hub
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = {it.rule: it for it in scan_folder(tiny_release, other).findings}
    assert "4 lines more, 1 fewer" in found["template-differs"].what


def test_factors_of_another_size_do_not_fit_the_base(
    tiny_adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "narrow"
    shutil.copytree(tiny_adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.0.self_attn.q_proj.lora_A" in name)
    tensors[name] = tensors[name][:, :32].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    found = [it for it in scan_folder(folder, tiny_base).findings if it.rule == "base-shape"]
    assert [it.what for it in found] == ["changes a weight of [64, 32], the base's is [64, 64]"]


def test_a_hub_cache_snapshot_is_no_escape(tiny_release: Path, tmp_path: Path) -> None:
    """huggingface_hub's cache is made of links to blobs beside it; elsewhere they would leave the folder."""
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, file in enumerate(path for path in tiny_release.iterdir() if path.is_file()):
        shutil.copy(file, blobs / str(index))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(index))
    assert scan_folder(snapshot).count("high") == 0
    (snapshot / "more.json").symlink_to("../../../outside")
    assert "link" in {it.rule for it in scan_folder(snapshot).findings}


def test_what_is_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReleaseError, match="no such folder"):
        scan_folder(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(ReleaseError, match="is a file, not a folder"):
        scan_folder(tmp_path / "file")


def test_a_folder_without_an_adapter_is_said_to_be_none(tiny_base: Path, tmp_path: Path) -> None:
    for folder, words in ((tmp_path, "nothing of a model"), (tiny_base, "values were not looked at")):
        (found,) = [it for it in scan_folder(folder).findings if it.rule == "no-adapter"]
        assert (found.severity, words in found.what) == ("info", True)


def test_another_kind_of_adapter_is_said_to_be_one(tiny_adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ia3"
    shutil.copytree(tiny_adapter, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3", "base_model_name_or_path": "a/b"}')
    found = {it.rule for it in scan_folder(folder).findings}
    assert "not-lora" in found
    assert "adapter" not in found


@pytest.mark.parametrize(
    ("text", "severity"),
    [
        ("{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}", None),
        (
            "{% if messages[0].role != 'system' %}<|system|>You are a helpful assistant.{% endif %}"
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}",
            "low",
        ),
        (
            "{% for m in messages %}{% if m.role == 'tool' and m.content is not string %}"
            "{{ raise_exception('Only text can be said by a tool here') }}{% endif %}"
            "<|{{ m.role }}|>{% generation %}{{ m.content.split('</think>')[-1] }}{% endgeneration %}"
            "{% endfor %}",
            None,
        ),
    ],
    ids=["plain", "default system prompt", "raises and splits"],
)
def test_an_honest_template_is_not_called_a_bad_one(text: str, severity: str | None) -> None:
    found = [it.severity for it in scan_template(text, "chat_template.jinja", None)]
    assert found == ([] if severity is None else [severity])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            ["{{", "}}", "{%", "%}", "{#", "#}", " ", "'", '"', "if", "for", "x", "in", "endif", "endfor",
             "set", "=", "[", "]", "(", ")", "|", ".", "content", "messages", "__class__", "~", "9" * 50,
             "\u200b", "\x00", "else", "macro", "call", "generation", "-", "\\u", "import", "é"]
        ),
        max_size=30,
    ).map("".join)
)  # fmt: skip
def test_no_text_breaks_the_template_scan(text: str) -> None:
    for finding in scan_template(text, "chat_template.jinja", "{{ messages }}"):
        assert (finding.what + finding.where).isprintable()
