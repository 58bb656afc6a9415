"""The recipe: everything that decides what an adapter becomes, in one YAML file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from adapterhub.errors import RecipeError
from adapterhub.packaging.adapter import check_pattern
from adapterhub.packaging.manifest import Quantization, SemVer

HUB_REF = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?$")
MAX_RECIPE_BYTES = 1024 * 1024


class Section(BaseModel):
    """A part of the recipe: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSection(Section):
    """Rows to train on, and how they become tokens."""

    train: str
    """A JSONL file, a folder of them, or ``owner/name[@revision]`` on the Hub."""
    test: str | None = None
    """Held-out rows in the same forms; their loss is measured during training, they are never trained on."""
    licence: str | None = None
    """SPDX identifier of the rows' licence."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 512
    """Tokens a packed row may hold; longer examples are left out, counted and reported."""
    packing: bool = True
    """Put several short examples into one row; none of them sees another."""


Rank = Annotated[int, Field(ge=1, le=4096)]
Alpha = Annotated[float, Field(gt=0, le=65536)]
NewToken = Annotated[str, Field(min_length=1, max_length=256)]


class LoraSection(Section):
    """The adapter (Hu et al. 2021; on all linear layers as in QLoRA section 4)."""

    rank: Rank = 16
    """Inner size of each update B·A; parameters and optimizer state grow with it."""
    alpha: Alpha = 16
    """The update is scaled by alpha / rank."""
    rank_pattern: dict[str, Rank] = {}
    """The rank where it is another one, by module name or regular expression: the first that matches the
    end of a module's dotted name holds, like ``layers\\.[0-7]\\.mlp\\.down_proj``."""
    alpha_pattern: dict[str, Alpha] = {}
    """The alpha where it is another one, by patterns like those of ``rank_pattern``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is zeroed while training."""
    target_modules: (
        Literal["all-linear"]
        | Annotated[str, Field(min_length=1)]
        | Annotated[tuple[str, ...], Field(min_length=1)]
    ) = "all-linear"
    """``all-linear`` (every linear layer but the head), module names, or one regular expression for whole
    dotted names, like ``.*\\.[qv]_proj``."""
    rslora: bool = False
    """Scale by alpha / √rank, which keeps high ranks learning (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the length of each row of the weights beside the update (DoRA, Liu et al. 2024); slower."""
    init: Literal["default", "loftq", "pissa"] = "default"
    """The first weights. ``default``: no update. ``loftq``: what 4-bit quantization lost, as far as the rank
    goes (Li et al. 2023). ``pissa``: the base's principal components, which are taken out of it while
    training (Meng et al. 2024); needs ``quantization: null``, and its release has twice the rank."""
    new_tokens: tuple[NewToken, ...] = ()
    """Tokens to add to the tokenizer; their rows of embeddings and head are trained whole, and of both
    only those rows are released."""

    @field_validator("rank_pattern", "alpha_pattern", "target_modules")
    @classmethod
    def _patterns(cls, value: Any) -> Any:
        for pattern in value if isinstance(value, dict) else [value] if isinstance(value, str) else ():
            check_pattern(pattern)
        return value

    @model_validator(mode="after")
    def _together(self) -> LoraSection:
        if len(set(self.new_tokens)) < len(self.new_tokens):
            raise ValueError("new_tokens names a token twice")
        if self.init == "pissa" and (self.dora or self.new_tokens):
            raise ValueError("init pissa cannot be released together with dora or new_tokens: keep one")
        if self.init == "pissa" and self.rslora and (self.rank_pattern or self.alpha_pattern):
            raise ValueError("init pissa and rslora cannot be released together with rank or alpha patterns")
        return self


class TrainingSection(Section):
    """The optimization."""

    epochs: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Passes over the training rows; one pass when neither this nor ``steps`` is given."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; stands instead of ``epochs``."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 16
    """Rows (packed rows when packing) an optimizer step."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Rows that go through the model at once; the rest of the batch is accumulated."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """The highest one, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """AdamW's, on the adapter's weights."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.3
    """Gradients are scaled down to this norm (QLoRA appendix B.2)."""
    optimizer: Literal["auto", "adamw", "paged_adamw", "paged_adamw_8bit"] = "auto"
    """``auto``: as the plan says on CUDA, AdamW that is paged (QLoRA section 3) where its state does not fit;
    torch's AdamW on the CPU."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """``auto``: as the plan says on CUDA, off on the CPU."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the adapter's first weights, the order of rows and the dropout."""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between held-out losses; by default four times a run."""
    save_every: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between checkpoints; by default four times a run."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSection:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("epochs and steps are both given; keep one, set the other to null")
        if isinstance(self.micro_batch, int) and self.batch_size % self.micro_batch:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}"
            )
        return self


class Recipe(Section):
    """A complete, replayable description of one training run.

    Read one with ``Recipe.read``; paths in it are relative to the file's folder.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
    """The release's name, without owner."""
    version: SemVer = "0.1.0"
    """The release's version: 1.2.3, or 1.2.3-rc.1."""
    task: Annotated[str, Field(max_length=500)] | None = None
    """One sentence for the card: what it is trained to do."""
    licence: str | None = None
    """The adapter's licence, as an SPDX identifier or the Hub's name for it."""
    base: str
    """A local checkpoint folder, or ``owner/name[@revision]`` on the Hub."""
    base_name: str | None = None
    """How readers know the base when ``base`` is a folder: ``owner/name`` of the model it comes from."""
    data: DataSection
    quantization: Quantization | None = Quantization()
    """How the frozen base is held; null keeps it in bf16 (plain LoRA)."""
    lora: LoraSection = LoraSection()
    training: TrainingSection = TrainingSection()

    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @model_validator(mode="after")
    def _start_on_this_base(self) -> Recipe:
        """LoftQ starts from 4-bit losses; with PiSSA a 4-bit base would be nobody else's."""
        in_4bit = self.quantization is not None and self.quantization.type in ("nf4", "fp4")
        if self.lora.init == "loftq" and not in_4bit:
            raise ValueError("lora.init loftq makes up for 4-bit quantization, and there is none")
        if self.lora.init == "pissa" and self.quantization is not None:
            raise ValueError(
                "lora.init pissa changes the base before it is quantized, so that the release would fit no "
                "base that its users have: set quantization to null, or lora.init to loftq"
            )
        return self

    @model_validator(mode="after")
    def _quantized_as_transformers_does(self) -> Recipe:
        if self.quantization is not None and self.quantization.block_size != 64:
            size = self.quantization.block_size
            raise ValueError(
                f"quantization.block_size is {size}: transformers quantizes in blocks of 64 only"
            )
        return self

    @classmethod
    def read(cls, path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
        """Read a YAML recipe and apply ``key.path=value`` overrides (values are YAML).

        Raises RecipeError naming the key's path, and the nearest right name for an unknown key.
        """
        path = Path(path)
        return cls.from_dict(_read_yaml(path), path.parent, str(path), overrides)

    @classmethod
    def from_dict(
        cls, content: dict[str, Any], folder: Path, where: str = "recipe", overrides: Sequence[str] = ()
    ) -> Recipe:
        """Validate ``content`` with ``key.path=value`` overrides applied to it in place.

        Relative paths in it are relative to ``folder``; ``where`` names it in errors. Raises RecipeError.
        """
        for override in overrides:
            _override(content, override)
        try:
            recipe = cls.model_validate(content)
        except ValidationError as err:
            raise _explain(err, where) from err
        recipe._folder = folder
        return recipe

    def resolve(self, source: str) -> Path | str:
        """A path for ``source`` (relative to the recipe), or ``source`` itself when it names a repository.

        What exists on disk is a path, whatever it looks like. Raises RecipeError when it is neither.
        """
        path = self._folder / Path(source).expanduser()
        if path.exists():
            return path
        if HUB_REF.match(source) and not source.startswith((".", "~")):
            return source
        raise RecipeError(
            f"{source}: no such file or folder (looked in {self._folder}), and not owner/name on the Hub",
            "check the path in the recipe; paths are relative to the recipe's own folder",
        )

    def public_dict(self) -> dict[str, Any]:
        """The recipe for the manifest: complete, but of an absolute path only its last part.

        Where a folder lies on the author's disk is of no use to a reader and nobody's business.
        """
        content = self.model_dump(mode="json")
        content["base"] = _without_folders(content["base"])
        for key in ("train", "test"):
            if content["data"][key] is not None:
                content["data"][key] = _without_folders(content["data"][key])
        return content


class _OneOfEachKey(yaml.SafeLoader):
    """YAML's safe loader, which would take the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"{path}: no such file", "check the path of the recipe")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise RecipeError(
            f"{path} is over {MAX_RECIPE_BYTES} bytes, too large for a recipe",
            "name the recipe, not the data",
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_OneOfEachKey)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as err:
        mark = getattr(err, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(err, "problem", None) or type(err).__name__
        raise RecipeError(f"{path}{line}: not valid YAML: {problem}", "mend that line") from err
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds no keys", "start from examples/orders/recipe.yaml")
    return content


def _override(content: dict[str, Any], override: str) -> None:
    """Apply one ``a.b=c`` in place."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(
            f"--set {override}: not of the form key.path=value", "write it like --set training.steps=100"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise RecipeError(f"--set {override}: the value is not valid YAML", "quote the value") from err
    inner = content
    for depth, part in enumerate(parts[:-1], 1):
        inner = inner.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(
                f"--set {override}: {'.'.join(parts[:depth])} is a value, not a section",
                "check the key's path",
            )
    inner[parts[-1]] = value


def _explain(err: ValidationError, where: str) -> RecipeError:
    """The first problem of a validation as one RecipeError with the key's path."""
    problem = err.errors()[0]
    location = [
        str(part)
        for part in problem["loc"]
        if not str(part).startswith(("literal", "function", "constrained"))
    ]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        nearest = _nearest(location)
        fix = f"did you mean {nearest}?" if nearest else f"known here: {', '.join(_names_at(location[:-1]))}"
        return RecipeError(f"{where}: unknown key {key}", fix)
    if problem["type"] == "missing":
        return RecipeError(f"{where}: {key} is missing", f"add {key} (see docs/recipe.md)")
    message = problem["msg"].removeprefix("Value error, ").replace("\n", " ")
    given = f", not {problem['input']!r}" if not isinstance(problem["input"], dict) else ""
    place, keys = (f"{where}: {key}", key) if key else (where, "these keys")
    return RecipeError(f"{place}: {message}{given}"[:400], f"correct {keys} (see docs/recipe.md)")


def _nearest(location: Sequence[str]) -> str | None:
    """The known key path nearest to an unknown one: in its own section first, then anywhere."""
    *section, name = location
    here = difflib.get_close_matches(name, _names_at(section), n=1, cutoff=0.6)
    if here:
        return ".".join([*section, here[0]])
    everywhere = {path.rsplit(".", 1)[-1]: path for path in all_keys()}
    found = difflib.get_close_matches(name, everywhere, n=1, cutoff=0.75)
    return everywhere[found[0]] if found else None


def _names_at(section: Sequence[str]) -> list[str]:
    prefix = ".".join(section)
    return [path.rpartition(".")[2] for path in all_keys() if path.rpartition(".")[0] == prefix]


def all_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterable[str]:
    """Every key path of the recipe, sections included: ``name``, ``data``, ``data.train`` …"""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from all_keys(kind, f"{prefix}{name}.")


def _without_folders(source: str) -> str:
    return PurePosixPath(source).name if source.startswith(("/", "~")) else source
