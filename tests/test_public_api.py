"""What the package promises to its importers: the names, and the tree of errors as errors.py draws it."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

import adapterhub
from adapterhub import errors

NAMES = [
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


def drawn_tree() -> dict[str, tuple[str | None, int]]:
    """Name -> (parent's name, exit code), from the drawing in the docstring of errors.py."""
    tree: dict[str, tuple[str | None, int]] = {}
    branch: list[str] = []
    for line in inspect.getdoc(errors).splitlines():
        if found := re.match(r"^    ([│├└─ ]*)([A-Z]\w+Error) +(\d+)  ", line):
            depth = len(found[1]) // 3
            branch[depth:] = [found[2]]
            tree[found[2]] = (branch[depth - 1] if depth else None, int(found[3]))
    return tree


def real_tree() -> dict[str, tuple[str | None, int]]:
    classes = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.AdapterHubError)
    ]
    return {
        kind.__name__: (
            None if kind is errors.AdapterHubError else kind.__base__.__name__,
            kind.exit_code,
        )
        for kind in classes
    }


def test_the_exported_names_are_these() -> None:
    assert sorted(adapterhub.__all__) == NAMES
    assert dir(adapterhub) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(adapterhub, name)
    if name != "__version__":
        assert value.__name__ == name
        assert inspect.getdoc(value)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_adaptor'"):
        adapterhub.load_adaptor  # noqa: B018


def test_the_drawn_tree_is_the_tree() -> None:
    assert drawn_tree() == real_tree()
    assert len(drawn_tree()) > 10


def test_every_error_is_exported() -> None:
    assert set(real_tree()) == {name for name in NAMES if name.endswith("Error")}


def test_an_error_keeps_its_parts_through_a_process_boundary() -> None:
    err = pickle.loads(pickle.dumps(adapterhub.RefError("no such version", "ask for another")))  # noqa: S301
    assert type(err) is adapterhub.RefError
    assert (err.what, err.fix, str(err)) == (
        "no such version",
        "ask for another",
        "no such version (fix: ask for another)",
    )


def test_the_version_is_the_installed_one() -> None:
    from importlib.metadata import version

    assert adapterhub.__version__ == version("adapterhub")
