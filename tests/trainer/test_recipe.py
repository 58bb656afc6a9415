"""The recipe: what is accepted, what is refused and how, and that a manifest's recipe is one again."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from adapterhub import Recipe, RecipeError
from adapterhub.trainer.recipe import all_keys

MINIMAL = {"name": "orders", "base": "base", "data": {"train": "train.jsonl"}}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_defaults_are_the_papers(recipe_file: Path) -> None:
    recipe = Recipe.read(recipe_file)
    assert recipe.quantization is not None
    assert (recipe.quantization.type, recipe.quantization.double) == ("nf4", True)
    assert recipe.lora.target_modules == "all-linear"
    assert recipe.training.max_grad_norm == 0.3


def test_overrides_take_yaml_values_and_make_sections(recipe_file: Path) -> None:
    recipe = Recipe.read(
        recipe_file, ["lora.rank=64", "training.epochs=0.5", "quantization=null", "data.packing=no"]
    )
    assert (recipe.lora.rank, recipe.training.epochs, recipe.quantization, recipe.data.packing) == (
        64,
        0.5,
        None,
        False,
    )


@pytest.mark.parametrize(
    ("override", "key", "fix"),
    [
        ("training.learning_rat=1", "training.learning_rat", "training.learning_rate"),
        ("trainin.steps=1", "trainin", "training"),
        ("rank=8", "rank", "lora.rank"),
        ("lora.zzz=8", "lora.zzz", "rank"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(
    recipe_file: Path, override: str, key: str, fix: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.read(recipe_file, [override])
    assert f"unknown key {key}" in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("lora.rank=0", "lora.rank"),
        ("lora.rank=many", "lora.rank"),
        ("training.learning_rate=.nan", "training.learning_rate"),
        ("training.learning_rate=.inf", "training.learning_rate"),
        ("training.batch_size=-1", "training.batch_size"),
        ("training.micro_batch=3", "training"),
        ("quantization.type=nf3", "quantization.type"),
        ("version=1.2", "version"),
        ("name=../x", "name"),
        ("name=null", "name"),
    ],
)
def test_a_bad_value_is_named_by_its_key(recipe_file: Path, override: str, key: str) -> None:
    with pytest.raises(RecipeError, match=rf": {key}: "):
        Recipe.read(recipe_file, [override])


def test_steps_and_epochs_exclude_each_other(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match="keep one"):
        Recipe.read(recipe_file, ["training.steps=3", "training.epochs=1"])


@pytest.mark.parametrize("override", ["lora.rank", "=3", "lora..rank=3", "name.x=3", "lora.rank=[1"])
def test_a_malformed_override_is_refused(recipe_file: Path, override: str) -> None:
    with pytest.raises(RecipeError, match="--set"):
        Recipe.read(recipe_file, [override])


@pytest.mark.parametrize(
    "content",
    ["", "- a\n", "a: [", "name: x\nname: y\n", "\tb: 1", "!!python/object/apply:os.system [ls]", "a: \x00"],
)
def test_what_is_no_recipe_is_refused_in_words(tmp_path: Path, content: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError):
        Recipe.read(path)


def test_a_missing_file_and_a_missing_key_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        Recipe.read(tmp_path / "none.yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nbase: y\n")
    with pytest.raises(RecipeError, match="data is missing"):
        Recipe.read(path)


def test_paths_are_relative_to_the_recipe_and_hub_names_are_known(recipe_file: Path) -> None:
    recipe = Recipe.read(recipe_file)
    (recipe_file.parent / "train.jsonl").touch()
    assert recipe.resolve("train.jsonl") == recipe_file.parent / "train.jsonl"
    assert recipe.resolve("owner/name@v1.0.0") == "owner/name@v1.0.0"
    for neither in ("nowhere.jsonl", "./owner/name", "a/b/c", "../owner/name"):
        with pytest.raises(RecipeError, match="no such file or folder"):
            recipe.resolve(neither)


def test_the_manifests_recipe_replays_and_keeps_the_authors_folders_private(recipe_file: Path) -> None:
    recipe = Recipe.read(recipe_file, ["base=/home/ann/models/llama", "data.train=/home/ann/rows.jsonl"])
    public = recipe.public_dict()
    assert (public["base"], public["data"]["train"]) == ("llama", "rows.jsonl")
    again = Recipe.from_dict(public, recipe_file.parent)
    assert again.public_dict() == public


def test_every_key_path_is_listed_once() -> None:
    keys = list(all_keys())
    assert len(keys) == len(set(keys))
    assert {"base", "data.train", "lora.rank", "quantization.double", "training.seed"} <= set(keys)


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_override_gives_a_recipe_or_a_recipe_error(key: str, value: str) -> None:
    content = {"name": "orders", "base": "base", "data": {"train": "train.jsonl"}}
    with contextlib.suppress(RecipeError):
        Recipe.from_dict(content, Path(), overrides=[f"{key}={value}"])


@given(
    st.dictionaries(
        st.sampled_from(list(all_keys())),
        st.one_of(
            st.none(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2)
        ),
        max_size=4,
    )
)
def test_any_value_of_any_key_gives_a_recipe_or_a_recipe_error(values: dict[str, object]) -> None:
    content: dict = {"name": "orders", "base": "base", "data": {"train": "train.jsonl"}}
    for path, value in values.items():
        inner = content
        *sections, last = path.split(".")
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[last] = value
    try:
        recipe = Recipe.from_dict(content, Path())
    except RecipeError:
        return
    assert Recipe.from_dict(recipe.public_dict(), Path()).public_dict() == recipe.public_dict()
