"""adapterhub: from a 48 GB GPU to a signed, versioned, honest release that inference code can trust.

The public names are resolved on first use, so that ``import adapterhub`` costs nothing and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from adapterhub.errors import (
    AdapterHubError,
    AuthError,
    BaseMismatchError,
    ConflictError,
    DataError,
    HubError,
    LockError,
    ManifestError,
    RecipeError,
    RefError,
    ReleaseError,
    SignatureError,
    TrainingError,
    VersionError,
)
from adapterhub.version import __version__

if TYPE_CHECKING:
    from adapterhub.load import load_adapter
    from adapterhub.packaging.release import Release
    from adapterhub.trainer.recipe import Recipe

__all__ = [
    "AdapterHubError",
    "AuthError",
    "BaseMismatchError",
    "ConflictError",
    "DataError",
    "HubError",
    "LockError",
    "ManifestError",
    "Recipe",
    "RecipeError",
    "RefError",
    "Release",
    "ReleaseError",
    "SignatureError",
    "TrainingError",
    "VersionError",
    "__version__",
    "load_adapter",
]

_LAZY = {
    "load_adapter": "adapterhub.load",
    "Recipe": "adapterhub.trainer.recipe",
    "Release": "adapterhub.packaging.release",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'adapterhub' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
