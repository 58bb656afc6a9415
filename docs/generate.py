"""Write docs/cli.md and docs/recipe.md, which are made from the code; with --check, fail when one is old."""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
from pydantic import BaseModel

from adapterhub.cli import cli
from adapterhub.trainer.recipe import Recipe

DOCS = Path(__file__).resolve().parent
COLUMNS = 100
GENERATED = "<!-- Made from the code by `make docs`; `make lint` fails when it is old. -->"
RECIPE_INTRODUCTION = """
    Everything that decides what an adapter becomes, in one YAML file: `adapterhub train RECIPE.yaml`. Paths
    in it are relative to its own folder; `--set key.path=value` changes a key at the shell; a key that is not
    in these tables is refused. A complete one: [examples/orders/recipe.yaml](../examples/orders/recipe.yaml).
"""
CLI_INTRODUCTION = """
    Data goes to stdout, words to stderr. An error is two lines, `error: …` and `fix: …`, and the exit code
    says which kind it was: see [the table](../README.md#exit-codes).
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is old")
    check = parser.parse_args().check
    old = []
    for name, text in (("cli.md", cli_page()), ("recipe.md", recipe_page())):
        path = DOCS / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        old.append(f"docs/{name}")
        if not check:
            path.write_text(text, encoding="utf-8")
    if check and old:
        print(f"error: {', '.join(old)} does not match the code\nfix: make docs", file=sys.stderr)
    return 1 if check and old else 0


def cli_page() -> str:
    """Every command as its own --help says it, whatever the terminal's width."""
    parts = ["# Commands", GENERATED, inspect.cleandoc(CLI_INTRODUCTION)]
    for path, command in commands(cli, ("adapterhub",)):
        parts.append(f"{'#' * min(len(path) + 1, 4)} {' '.join(path)}")
        parts.append(f"```text\n{help_of(path, command)}\n```")
    return "\n\n".join(parts) + "\n"


def commands(
    command: click.Command, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """The command and all below it, in the order of their listing."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None and not below.hidden:
                yield from commands(below, (*path, name))


def help_of(path: tuple[str, ...], command: click.Command) -> str:
    settings = {
        "terminal_width": COLUMNS,
        "max_content_width": COLUMNS,
        "help_option_names": ["-h", "--help"],
    }
    context = click.Context(command, info_name=" ".join(path), **settings)  # type: ignore[arg-type]
    return command.get_help(context).rstrip()


def recipe_page() -> str:
    """Every key of the recipe, a table a section: type, default, meaning."""
    parts = ["# The recipe", GENERATED, inspect.cleandoc(RECIPE_INTRODUCTION), table(Recipe)]
    for name, section in sections(Recipe).items():
        parts += [f"## {name}", (inspect.getdoc(section) or "").strip(), table(section)]
    return "\n\n".join(parts) + "\n"


def sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The fields that hold a model of their own, optional ones among them."""
    return {
        name: kind
        for name, field in model.model_fields.items()
        for kind in (field.annotation, *get_args(field.annotation))
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    }


def table(model: type[BaseModel]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    schema, below, meanings = model.model_json_schema(), sections(model), read_meanings(model)
    for key, field in schema["properties"].items():
        if key in below:
            kind, default = f"[section](#{key})" + (", or null" if "anyOf" in field else ""), ""
            meaning = meanings.get(key) or inspect.getdoc(below[key]) or ""
        else:
            required = key in schema.get("required", ())
            kind, default = describe(field), "required" if required else f"`{json.dumps(field['default'])}`"
            meaning = meanings[key]
        rows.append(f"| `{key}` | {cell(kind)} | {default} | {cell(meaning)} |")
    return "\n".join(rows)


def describe(field: dict[str, Any]) -> str:
    """A JSON Schema type in words: ``integer, 8 to 1048576``."""
    if "anyOf" in field:
        return ", or ".join(dict.fromkeys(describe(kind) for kind in field["anyOf"]))
    if "const" in field or "enum" in field:
        return " or ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "object":
        return f"text to {describe(field['additionalProperties'])}"
    if field["type"] == "array":
        kind, comma, limits_of_each = describe(field["items"]).partition(",")
        return f"list of {kind}s{comma}{limits_of_each}"
    names = {
        "string": "text",
        "number": "number",
        "integer": "integer",
        "boolean": "true or false",
        "null": "null",
    }
    limits = [
        f"{words} {field[key]}"
        for key, words in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "over"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "under"),
            ("maxLength", "characters: at most"),
        )
        if key in field
    ]
    return ", ".join([names[field["type"]], *limits])


def read_meanings(model: type[BaseModel]) -> dict[str, str]:
    """The docstring that stands under each field. Raises ValueError for a plain field without one."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    meanings: dict[str, str] = {}
    for statement, following in zip(body.body, [*body.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            meanings[statement.target.id] = " ".join(str(following.value.value).split())
    bare = [name for name in model.model_fields if name not in meanings and name not in sections(model)]
    if bare:
        raise ValueError(f"{model.__name__}: no docstring under {', '.join(bare)}")
    return meanings


def cell(text: str) -> str:
    """Text as a cell of a Markdown table, with its literals as code."""
    return text.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
