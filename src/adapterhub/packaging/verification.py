"""A release held to its manifest, its signatures, and what the trust policy asks of its publisher."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from adapterhub.errors import ManifestError, SignatureError
from adapterhub.packaging.anchors import Anchor, Signer, TrustedKey
from adapterhub.packaging.bundles import (
    RETAKE,
    SIGNATURE_NAME,
    Bundle,
    check_files_signed,
    check_key_signature,
    read_bundle,
    signature_files,
)
from adapterhub.packaging.keys import parse_public_key
from adapterhub.packaging.manifest import MANIFEST_NAME, Manifest
from adapterhub.packaging.release import Release
from adapterhub.packaging.statement import signed_files
from adapterhub.packaging.trust import Policy, Rule, accepted_by, key_anchor, publisher_of

NOT_COVERED = (
    "how the model behaves, or whether that is safe",
    "whether the chat template or the training data are safe (`adapterhub scan` looks at the template)",
    "whether the card's statements are true",
)
"""What a good signature says nothing about."""


@dataclass(frozen=True)
class Checked:
    """A release whose files are what its manifest lists, and whose signatures hold as far as can be told."""

    release: Release
    """With the manifest that was checked, whatever lies in the folder since."""
    signers: tuple[Signer, ...]
    """Whom something trusted here vouches for, ``model.sig``'s first; one that a rule does not name counts
    for nothing where a rule speaks."""
    strangers: tuple[Bundle, ...]
    """The other signatures: who made them is not known here."""
    rules: tuple[Rule, ...]
    """What the trust policy asked, and got."""

    @property
    def signer(self) -> Signer | None:
        """The first of ``signers``."""
        return self.signers[0] if self.signers else None


def check_release(
    folder: Path,
    keys: Sequence[Path] = (),
    *,
    publisher: str | None = None,
    require_signed: bool = False,
    known: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
) -> Checked:
    """Check every file, every signature as far as it can be, and what the trust policy asks.

    ``publisher`` is the ``owner/name`` that the release was asked for by; a folder of the Hugging Face cache
    tells its own. Where no rule of the policy speaks, ``keys`` (public key files) and what the user trusts
    in general are accepted, and ``require_signed`` refuses a release that none of those signed. ``known`` is
    the sha256 of files that the caller has just hashed: they are not read again. With ``only``, just these of
    the listed files are here, and are checked.

    Raises SignatureError for a changed file, for a signature that does not hold, when a rule is not met, and
    for a malformed trust file; ManifestError when ``folder`` is no release.
    """
    policy = Policy.read()
    rules = policy.rules(publisher or publisher_of(folder))
    general = [*map(key_anchor, keys), *policy.accepted()]
    asked = [anchor for rule in rules for anchor in (*rule.makers, *rule.reviewers)]
    release, found, strangers = _check(folder, [*asked, *general], known, only)
    for rule in rules:
        _check_rule(release.path, rule, found, strangers)
    signers = tuple(dict.fromkeys(signer for anchor, signer in found if not rules or anchor in asked))
    if require_signed and not signers:
        raise _nobody_known(folder, publisher or publisher_of(folder), general, strangers)
    return Checked(release, signers, strangers, rules)


def verify_signature(
    folder: Path,
    public_keys: Sequence[Path] = (),
    *,
    anchors: Sequence[Anchor] = (),
    known: Mapping[str, str] | None = None,
) -> Checked:
    """Check every file against the manifest, and that one of ``public_keys`` or ``anchors`` signed them.

    The trust policy is not asked. Raises as ``check_release`` does, and SignatureError when nobody among
    those signed.
    """
    accepted = [*map(key_anchor, public_keys), *anchors]
    release, found, strangers = _check(folder, accepted, known)
    if not found:
        raise _nobody_known(folder, publisher_of(folder), accepted, strangers)
    return Checked(release, tuple(dict.fromkeys(signer for _anchor, signer in found)), strangers, ())


def how_to_trust(bundle: Bundle, publisher: str | None, source: object) -> str:
    """The command that would trust who made the signature ``bundle`` of the release ``source``.

    With a ``publisher`` (``owner/name``) as a rule for the owner's releases; without one in general, for a
    rule says nothing of a folder of no known origin.
    """
    rule = f"'{publisher.partition('/')[0]}/*' " if publisher else ""
    if bundle.name == SIGNATURE_NAME and bundle.public_pem is not None:
        return f"adapterhub trust add {rule}--from {shlex.quote(str(source))}"
    what = {
        "key": "--key FILE",
        "certificate": "--certificate FILE",
        "sigstore": "--identity WHO --issuer URL",
    }
    return f"adapterhub trust add {rule}{what[bundle.kind]}"


def checked_digests(
    folder: Path, known: Mapping[str, str] | None = None, only: Sequence[str] | None = None
) -> tuple[Release, dict[str, str]]:
    """A release, and the sha256 of every file of it but its signatures, found to be what the manifest lists.

    With ``only``, these alone are looked at; the others are as the manifest lists them.

    Raises SignatureError for a file that is not, ManifestError when ``folder`` is no release.
    """
    manifest = Manifest.read_bytes(folder)
    release = Release(folder, Manifest.from_bytes(manifest, str(folder / MANIFEST_NAME)))
    release.check_files(only, known=known)
    digests = {name: entry.sha256 for name, entry in release.manifest.files.items()}
    digests[MANIFEST_NAME] = sha256(manifest).hexdigest()
    return release, digests


_Found = list[tuple[Anchor, Signer]]


def _check(
    folder: Path,
    anchors: Sequence[Anchor],
    known: Mapping[str, str] | None,
    only: Sequence[str] | None = None,
) -> tuple[Release, _Found, tuple[Bundle, ...]]:
    """The release, each anchor with the signer that it vouches for, and the signatures of others."""
    try:
        release, digests = checked_digests(folder, known, only)
    except ManifestError as err:
        if (folder / SIGNATURE_NAME).is_file() and (folder / MANIFEST_NAME).is_file():
            raise SignatureError(f"{err.what}, though the release was signed", RETAKE) from err
        raise
    bundles = [read_bundle(folder, name) for name in signature_files(folder)]
    signatures = {bundle.name: sha256(bundle.data).hexdigest() for bundle in bundles}
    found: _Found = []
    strangers = []
    for bundle in bundles:
        vouched = [(anchor, signer) for anchor in anchors if (signer := anchor.check(bundle)) is not None]
        if not vouched:
            strangers.append(bundle)
            if bundle.public_pem is not None:  # it tells its key: that it holds can be seen, not who made it
                check_key_signature(bundle, parse_public_key(bundle.public_pem, str(bundle.path)))
        check_files_signed(bundle, signed_files(digests), signatures)
        found += vouched
    return release, found, tuple(strangers)


def _check_rule(folder: Path, rule: Rule, found: _Found, strangers: Sequence[Bundle]) -> None:
    makers = {signer.fingerprint for anchor, signer in found if anchor in rule.makers}
    reviewers = {signer.fingerprint for anchor, signer in found if anchor in rule.reviewers}
    if rule.makers and not makers:
        raise _rule_broken(folder, rule, "signed by", rule.makers, found, strangers)
    if rule.reviewers and not any(makers - {it} or not rule.makers for it in reviewers):
        raise _rule_broken(folder, rule, "reviewed, and signed, by", rule.reviewers, found, strangers)


def _rule_broken(
    folder: Path,
    rule: Rule,
    how: str,
    anchors: Sequence[Anchor],
    found: _Found,
    strangers: Sequence[Bundle],
) -> SignatureError:
    by = [str(signer) for _anchor, signer in found] + [bundle.claim for bundle in strangers]
    is_it = f"it is signed by {', '.join(list(dict.fromkeys(by))[:3])}" if by else "it is not signed"
    return SignatureError(
        f"{folder} must be {how} {accepted_by(anchors)}, as {rule.source} asks of {rule.pattern}; {is_it}",
        "ask its maker; `adapterhub trust list` and `adapterhub trust add` if they told you of another key",
    )


def _nobody_known(
    folder: Path, publisher: str | None, accepted: Sequence[Anchor], strangers: Sequence[Bundle]
) -> SignatureError:
    if not strangers:
        return SignatureError(
            f"{folder} is not signed: it holds no {SIGNATURE_NAME}", "ask its maker to sign it"
        )
    trust = f"if you know its maker: {how_to_trust(strangers[0], publisher, folder)}"
    if not accepted:
        return SignatureError(
            f"no key to check the signature of {folder} with: it was made with {strangers[0].claim}", trust
        )
    kinds = "keys" if all(isinstance(it, TrustedKey) for it in accepted) else "keys and names"
    return SignatureError(
        f"{strangers[0].path} was made with {strangers[0].claim}, "
        f"none of the {len(accepted)} {kinds} trusted here",
        trust,
    )
