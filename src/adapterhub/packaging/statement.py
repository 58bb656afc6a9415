"""What a signature is made over: the files of a release, handed to model_signing as they were hashed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterhub.packaging.bundles import REVIEWS_NAME, SIGNATURE_NAME

# Model Signing leaves these out by default, so that a signed folder may live in a git repository.
GIT_PATHS = (".git", ".gitattributes", ".github", ".gitignore")


def signed_files(digests: Mapping[str, str]) -> dict[str, str]:
    """Those of ``digests`` that a signature lists by itself; the manifest's own digest covers the rest."""
    return {name: digest for name, digest in digests.items() if name.split("/")[0] not in GIT_PATHS}


def known_digests(digests: Mapping[str, str]) -> Any:
    """A model_signing hashing configuration that takes ``digests`` (sha256 by name): nothing is read again.

    The statement says that signatures are left out, so that one which is added later breaks no other.
    """
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest  # the public API has no name for it

    files = manifest.SerializationType.from_args(
        {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": True,
            "ignore_paths": [SIGNATURE_NAME, REVIEWS_NAME, *GIT_PATHS],
        }
    )

    class KnownDigests(hashing.Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
            items = [
                files.new_item(name, Digest("sha256", bytes.fromhex(digest)))
                for name, digest in digests.items()
            ]
            return manifest.Manifest(Path(model_path).name, items, files)

    return KnownDigests()
