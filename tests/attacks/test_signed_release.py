"""What is done to a signed release after it was signed: each tampering, and the error it must give."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.errors import AdapterHubError, ManifestError, SignatureError
from adapterhub.packaging.files import sha256_file
from adapterhub.packaging.keys import KeyPair, generate_key
from adapterhub.packaging.release import Release
from adapterhub.packaging.signing import sign_release
from adapterhub.packaging.verification import verify_signature

Attack = Callable[[Path, KeyPair], None]


@pytest.fixture
def pair(tmp_path: Path) -> KeyPair:
    return generate_key(tmp_path / "keys")


@pytest.fixture
def signed(tiny_release: Path, pair: KeyPair) -> Path:
    """A release with a file of every kind: evidence, failure cases, cards, and a reviewer's signature."""
    contents = dict.fromkeys(["evidence/scores.json", "evidence/failures.jsonl"], b'{"a": 1}\n')
    contents |= dict.fromkeys(["README.md", "card.html"], b"# A card\n")
    Release.open(tiny_release).with_files(contents)
    sign_release(tiny_release, pair.private)
    sign_release(tiny_release, generate_key(tiny_release.with_name("ann")).private, reviewer="ann")
    verify_signature(tiny_release, [pair.public])
    return tiny_release


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << (position % 8)
    path.write_bytes(bytes(data))


def edit_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "adapterhub.json"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def edit_bundle(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "model.sig"
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def rehash(folder: Path, name: str) -> None:
    """Make the manifest list ``name`` as it lies there now."""
    entry = {"sha256": sha256_file(folder / name), "size": (folder / name).stat().st_size}
    edit_manifest(folder, lambda content: content["files"].__setitem__(name, entry))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.999])
def test_a_flipped_bit_in_any_file(signed: Path, pair: KeyPair, share: float) -> None:
    untouched = signed.with_name("untouched")
    shutil.copytree(signed, untouched)
    for file in sorted(path for path in untouched.rglob("*") if path.is_file()):
        target = signed / file.relative_to(untouched)
        flip_bit(target, int(share * file.stat().st_size))
        with pytest.raises(SignatureError):
            verify_signature(signed, [pair.public])
        shutil.copy(file, target)
    verify_signature(signed, [pair.public])


def change_and_rehash(folder: Path, _pair: KeyPair) -> None:
    flip_bit(folder / "adapter_model.safetensors", 5000)
    rehash(folder, "adapter_model.safetensors")


def add_and_list(folder: Path, _pair: KeyPair) -> None:
    (folder / "modeling.py").write_text("print('hello')")
    rehash(folder, "modeling.py")


def add_unlisted(folder: Path, _pair: KeyPair) -> None:
    (folder / "modeling.py").write_text("print('hello')")


def add_unlisted_below(folder: Path, _pair: KeyPair) -> None:
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[core]\nfsmonitor = true\n")


def remove_file(folder: Path, _pair: KeyPair) -> None:
    (folder / "chat_template.jinja").unlink()


def remove_and_unlist(folder: Path, _pair: KeyPair) -> None:
    (folder / "chat_template.jinja").unlink()
    edit_manifest(folder, lambda content: content["files"].pop("chat_template.jinja"))


def swap_base(folder: Path, _pair: KeyPair) -> None:
    edit_manifest(folder, lambda content: content["base"].update(name="someone/else", digest="0" * 64))


def rename_release(folder: Path, _pair: KeyPair) -> None:
    edit_manifest(folder, lambda content: content.update(name="famous-model"))


def raise_version(folder: Path, _pair: KeyPair) -> None:
    edit_manifest(folder, lambda content: content.update(version="9.9.9"))


def lower_version(folder: Path, _pair: KeyPair) -> None:
    edit_manifest(folder, lambda content: content.update(version="0.0.1"))


def edit_evidence_and_rehash(folder: Path, _pair: KeyPair) -> None:
    (folder / "evidence/scores.json").write_text('{"a": 100}\n')
    rehash(folder, "evidence/scores.json")


def edit_card_and_rehash(folder: Path, _pair: KeyPair) -> None:
    (folder / "README.md").write_text("# The best of all\n")
    rehash(folder, "README.md")


def look_alike(folder: Path, _pair: KeyPair) -> None:
    """A Cyrillic letter in the name of a second configuration."""
    shutil.copy(folder / "adapter_config.json", folder / "\u0430dapter_config.json")
    rehash(folder, "\u0430dapter_config.json")


def reformat_manifest(folder: Path, _pair: KeyPair) -> None:
    path = folder / "adapterhub.json"
    path.write_text(json.dumps(json.loads(path.read_bytes())))


def break_manifest(folder: Path, _pair: KeyPair) -> None:
    (folder / "adapterhub.json").write_text("{")


def strip_signature(folder: Path, _pair: KeyPair) -> None:
    (folder / "model.sig").unlink()


def strip_all_signatures(folder: Path, _pair: KeyPair) -> None:
    (folder / "model.sig").unlink()
    shutil.rmtree(folder / "signatures")


def signature_of_another_release(folder: Path, pair: KeyPair) -> None:
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    edit_manifest(other, lambda content: content.update(version="0.2.0"))
    sign_release(other, pair.private)
    shutil.copy(other / "model.sig", folder / "model.sig")


def signature_of_a_stranger(folder: Path, _pair: KeyPair) -> None:
    sign_release(folder, generate_key(folder.with_name("stranger")).private)


def stranger_with_the_trusted_hint(folder: Path, pair: KeyPair) -> None:
    signature_of_a_stranger(folder, pair)
    edit_bundle(
        folder, lambda bundle: bundle["verificationMaterial"]["publicKey"].update(hint=pair.fingerprint)
    )


def no_hint(folder: Path, _pair: KeyPair) -> None:
    edit_bundle(folder, lambda bundle: bundle["verificationMaterial"]["publicKey"].pop("hint"))


def payload_for_the_changed_files(folder: Path, pair: KeyPair) -> None:
    """The files change and the signed statement is edited to match; only the signature cannot follow."""
    change_and_rehash(folder, pair)
    own = json.loads((folder / "model.sig").read_bytes())["dsseEnvelope"]["signatures"]
    stranger_with_the_trusted_hint(folder, pair)
    edit_bundle(folder, lambda bundle: bundle["dsseEnvelope"].update(signatures=own))


def ignore_everything(folder: Path, _pair: KeyPair) -> None:
    def widen(bundle: dict) -> None:
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        statement["predicate"]["serialization"]["ignore_paths"] = ["adapter_config.json"]
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

    edit_bundle(folder, widen)


def no_signatures(folder: Path, _pair: KeyPair) -> None:
    edit_bundle(folder, lambda bundle: bundle["dsseEnvelope"].update(signatures=[]))


def two_signatures(folder: Path, _pair: KeyPair) -> None:
    edit_bundle(
        folder,
        lambda bundle: bundle["dsseEnvelope"].update(signatures=bundle["dsseEnvelope"]["signatures"] * 2),
    )


def unsigned_file_among_signatures(folder: Path, _pair: KeyPair) -> None:
    (folder / "signatures" / "notes.txt").write_text("hello")


def other_payload_type(folder: Path, _pair: KeyPair) -> None:
    edit_bundle(folder, lambda bundle: bundle["dsseEnvelope"].update(payloadType="text/plain"))


def certificate_instead(folder: Path, _pair: KeyPair) -> None:
    edit_bundle(
        folder, lambda bundle: bundle.update(verificationMaterial={"certificate": {"rawBytes": "AAAA"}})
    )


def link_out(folder: Path, _pair: KeyPair) -> None:
    outside = folder.with_name("outside.json")
    outside.write_text("{}")
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(outside)


_MEDIA = (
    b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": {"signatures": [{}], '
)
_MEDIA += b'"payload": "", "payloadType": "application/vnd.in-toto+json"}, "verificationMaterial": '
SIGNATURE_FILES = {
    "one byte": (b"x", "it is not JSON"),
    "not JSON": (b"not json", "it is not JSON"),
    "a list": (b"[]", "it is no JSON object"),
    "null": (b"null", "it is no JSON object"),
    "empty object": (b"{}", "it lacks 'mediaType'"),
    "invalid UTF-8": (b"\xff\xfe", "it is not JSON"),
    "deep": (b"[" * 100_000, "it is nested too deep"),
    "key twice": (b'{"a": 1, "a": 2}', "a key stands twice"),
    "another media type": (b'{"mediaType": "text/plain"}', "its media type is 'text/plain'"),
    "material is a number": (_MEDIA + b"1}", "a part of it is of another type"),
    "material is text": (_MEDIA + b'"x"}', "it names neither a key nor a certificate"),
    "hint is a list": (_MEDIA + b'{"publicKey": {"hint": []}}}', "does not say which key made it"),
    "huge number": (_MEDIA + b"9" * 5000 + b"}", "Exceeds the limit"),
    "too large": (b" " * (17 * 1024 * 1024), "over 16777216 bytes"),
}
ATTACKS: dict[Attack, str] = {
    change_and_rehash: "other content in adapter_model.safetensors, adapterhub.json",
    add_and_list: "it lacks modeling.py",
    add_unlisted: "does not list: modeling.py",
    add_unlisted_below: "does not list: .git/config",
    remove_file: "listed in adapterhub.json but missing",
    remove_and_unlist: "there is no chat_template.jinja",
    swap_base: "other content in adapterhub.json",
    rename_release: "other content in adapterhub.json",
    raise_version: "other content in adapterhub.json",
    lower_version: "other content in adapterhub.json",
    edit_evidence_and_rehash: "other content in adapterhub.json, evidence/scores.json",
    edit_card_and_rehash: "other content in README.md, adapterhub.json",
    look_alike: "it lacks \u0430dapter_config.json",
    reformat_manifest: "other content in adapterhub.json",
    break_manifest: "though the release was signed",
    strip_signature: "was made with the key",  # the reviewer's, whom nobody trusts here
    strip_all_signatures: "is not signed: it holds no model.sig",
    signature_of_another_release: "other content in adapterhub.json",
    signature_of_a_stranger: "none of the 1 keys trusted here",
    stranger_with_the_trusted_hint: "it holds another key than the one that it names",
    no_hint: "it does not say which key made it",
    payload_for_the_changed_files: "it holds another key than the one that it names",
    ignore_everything: "does not hold: altered, or not made with the key",
    no_signatures: "it does not hold one signature",
    two_signatures: "it does not hold one signature",
    other_payload_type: "its payload type is 'text/plain'",
    certificate_instead: "was made with a Sigstore identity, none of the 1 keys",
    link_out: "is not the file that adapterhub.json lists",
    unsigned_file_among_signatures: "does not list: signatures/notes.txt",
}


def refuses(folder: Path, pair: KeyPair, words: str) -> None:
    with pytest.raises(SignatureError) as caught:
        verify_signature(folder, [pair.public])
    assert words in caught.value.what
    assert "\n" not in caught.value.what + caught.value.fix


@pytest.mark.parametrize(("attack", "words"), ATTACKS.items(), ids=[it.__name__ for it in ATTACKS])
def test_tampering_is_a_signature_error(signed: Path, pair: KeyPair, attack: Attack, words: str) -> None:
    attack(signed, pair)
    refuses(signed, pair, words)


@pytest.mark.parametrize(("content", "words"), SIGNATURE_FILES.values(), ids=SIGNATURE_FILES)
def test_what_is_no_signature_is_a_signature_error(
    signed: Path, pair: KeyPair, content: bytes, words: str
) -> None:
    (signed / "model.sig").write_bytes(content)
    refuses(signed, pair, words)


def test_without_its_manifest_it_is_no_release(signed: Path, pair: KeyPair) -> None:
    (signed / "adapterhub.json").unlink()
    with pytest.raises(ManifestError):
        verify_signature(signed, [pair.public])


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/passwd",
        "a/../../b",
        "C:\\x",
        "a\\b",
        "./x",
        "a//b",
        "",
        "x\x00y",
        "a\u202eb",
        "model.sig",
    ],
)
def test_a_manifest_that_names_a_file_outside_is_refused(signed: Path, name: str) -> None:
    entry = {"sha256": "0" * 64, "size": 0}
    edit_manifest(signed, lambda content: content["files"].__setitem__(name, entry))
    with pytest.raises(AdapterHubError) as caught:
        verify_signature(signed, [])
    assert caught.value.exit_code in (3, 4)


def test_two_names_that_are_one_file_elsewhere(signed: Path) -> None:
    entry = {"sha256": "0" * 64, "size": 0}
    edit_manifest(signed, lambda content: content["files"].__setitem__("ADAPTER_config.json", entry))
    with pytest.raises(AdapterHubError, match="one file on some systems"):
        verify_signature(signed, [])
