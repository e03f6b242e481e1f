"""Recipes: which methods with which options, for which model, and what that gave when it was measured.

A recipe is a small YAML file that `ditkit tune` writes and people may edit:

    version: 1
    model: {name: micro-flux, class: FluxTransformer2DModel}
    methods:
      - taylorseer: {interval: 4, order: 2}
      - local-window: {radius: 8.0}
    steps: null
    measured: {error: 0.012, time_ratio: 0.41}
    settings: {steps: 28, guidance: null, size: null}

`ditkit.apply(pipe, recipe="recipe.yaml")`, `ditkit generate --recipe recipe.yaml` and
`ditkit bench --recipe recipe.yaml` use it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ditkit import registry
from ditkit.files import write_text

Options = dict[str, bool | int | float | str | None]


class RecipeError(ValueError):
    """A file that is no recipe, or a recipe that does not fit the model."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ModelName(_Section):
    """What the recipe was measured on.

    Args:
        name: what `ditkit.load` takes; None when it is not known.
        model_class: of the transformer, `class` in the file; None fits every model.
    """

    name: str | None = None
    model_class: str | None = Field(default=None, alias="class")

    @classmethod
    def of(cls, name: str | None, model: Any) -> ModelName:
        """The name of a transformer; None leaves the class open."""
        return cls.model_validate({"name": name, "class": None if model is None else class_name(model)})


class Measured(_Section):
    """What the recipe gave, against dense sampling.

    Args:
        error: relative L2 distance of the final latents to dense, over held-out prompts.
        time_ratio: time relative to dense, below 1 is faster; median of interleaved rounds.
        error_bound: what the error of other prompts stays below, by the tuner's own estimate.
        prompts: over how many prompts.
        device: where.
    """

    error: float | None = Field(default=None, ge=0)
    time_ratio: float | None = Field(default=None, gt=0)
    error_bound: float | None = Field(default=None, ge=0)
    prompts: int | None = Field(default=None, ge=1)
    device: str | None = None


class Settings(_Section):
    """How pictures were drawn when the recipe was measured; the commands take them as defaults.

    Args:
        steps: denoising steps of the dense run.
        guidance: guidance scale, None for the pipeline's own.
        size: height and width in pixels, None for the pipeline's own.
    """

    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = None
    size: tuple[int, int] | None = None


class Recipe(_Section):
    """Methods for a model.

    Args:
        version: of this format.
        model: what it was measured on; its class must be that of the model it is applied to.
        methods: one mapping of one name to its options for each method, in order. None at all is a recipe
            too: dense sampling, perhaps with fewer steps.
        steps: denoising steps to use instead of those of `settings`. Only what draws pictures can follow
            it; `apply` says so in a warning.
        measured: what it gave.
        settings: how that was measured.
    """

    version: Literal[1] = 1
    model: ModelName = ModelName()
    methods: tuple[dict[str, Options], ...] = ()
    steps: int | None = Field(default=None, ge=1)
    measured: Measured = Measured()
    settings: Settings = Settings()

    @field_validator("methods")
    @classmethod
    def _one_name_each(cls, methods: tuple[dict[str, Options], ...]) -> tuple[dict[str, Options], ...]:
        for number, method in enumerate(methods, start=1):
            if len(method) != 1:
                raise ValueError(
                    f"method {number} must be one name with its options, e.g. "
                    f"'- taylorseer: {{interval: 4}}'; got {', '.join(method) or 'nothing'}"
                )
        return methods

    @classmethod
    def of(
        cls,
        methods: Sequence[Any],
        *,
        steps: int | None = None,
        model: Any = None,
        name: str | None = None,
        measured: Measured | None = None,
        settings: Settings | None = None,
    ) -> Recipe:
        """The recipe that has these methods.

        Args:
            methods: registered methods, in order.
            steps: denoising steps, None for those of the settings.
            model: the transformer it is for; None leaves the class open.
            name: what `ditkit.load` takes.

        Raises:
            RecipeError: a method is not in the registry, or an option is no plain value.
        """
        return cls(
            model=ModelName.of(name, model),
            methods=tuple({registered(method): changed_options(method)} for method in methods),
            steps=steps,
            measured=measured or Measured(),
            settings=settings or Settings(),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read and check a recipe.

        Raises:
            FileNotFoundError: there is no such file.
            RecipeError: it is no recipe; the message names each bad key.
            UnknownNameError, OptionError: a method or an option that is not there.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no recipe at {path}")
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: not valid YAML: {error}") from None
        if not isinstance(raw, dict):
            raise RecipeError(f"{path}: expected keys and values, got {type(raw).__name__}")
        try:
            recipe = cls.model_validate(raw)
        except ValidationError as error:
            raise RecipeError(f"{path}: " + "; ".join(_explain(each) for each in error.errors())) from None
        recipe.build()
        return recipe

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it, whole or not at all."""
        plain = self.model_dump(mode="json", by_alias=True)
        return write_text(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    def build(self) -> tuple[Any, ...]:
        """The methods, in order.

        Raises:
            UnknownNameError, OptionError: a method or an option that is not there, or a bad value.
        """
        return tuple(
            registry.construct("method", name, options)
            for method in self.methods
            for name, options in method.items()
        )

    def check(self, target: Any) -> None:
        """Is it for this model?

        Args:
            target: a pipeline or a transformer.

        Raises:
            RecipeError: the classes differ; the message names both.
        """
        wanted = self.model.model_class
        seen = [class_name(model) for model in _transformers(target)]
        if wanted is not None and seen and wanted not in seen:
            named = f" ({self.model.name})" if self.model.name else ""
            raise RecipeError(
                f"the recipe is for {wanted}{named}, but the model is {' and '.join(seen)}. Run "
                "`ditkit tune` on this model, or remove `class` from the recipe to try it anyway"
            )

    def describe(self) -> str:
        """In one line, as the commands write methods: `taylorseer:interval=4 + local-window, 20 steps`."""
        parts = [
            name + (":" if options else "") + ",".join(f"{key}={_text(v)}" for key, v in options.items())
            for method in self.methods
            for name, options in method.items()
        ]
        text = " + ".join(parts)
        if self.steps is not None:
            text = f"{text}, {self.steps} steps" if text else f"plain, {self.steps} steps"
        return text or "dense"


def opened(recipe: Recipe | str | os.PathLike[str]) -> Recipe:
    """A recipe, read when a path is given."""
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def class_name(model: Any) -> str:
    """The model's class, that of the module inside when it is compiled."""
    return type(getattr(model, "_orig_mod", model)).__name__


def registered(method: Any) -> str:
    """A method's name in the registry.

    Raises:
        RecipeError: it has none.
    """
    entry = registry.entry_of(method)
    if entry is not None and entry.kind == "method":
        return entry.name
    raise RecipeError(f"{type(method).__name__} is not in the registry, a recipe can't name it")


def changed_options(method: Any) -> Options:
    """The options that are not the default.

    Raises:
        RecipeError: one that can't stand in a file, such as a tensor.
    """
    changed: Options = {}
    for option in dataclasses.fields(method):
        value = getattr(method, option.name)
        if not option.init or (option.default is not dataclasses.MISSING and value is option.default):
            continue
        if isinstance(value, tuple) and all(isinstance(side, int) for side in value):
            if value != option.default:
                changed[option.name] = "x".join(map(str, value))  # sizes, which methods take as text too
            continue
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise RecipeError(
                f"{type(method).__name__}.{option.name} is a {type(value).__name__}, which a recipe can't "
                "hold; name a file instead"
            )
        if value != option.default:
            changed[option.name] = value
    return changed


def _transformers(target: Any) -> list[Any]:
    parts = getattr(target, "components", None)
    if isinstance(parts, dict):
        return [part for name, part in parts.items() if name.startswith("transformer") and part is not None]
    return [target]


def _text(value: Any) -> str:
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def _explain(error: Any) -> str:
    where = ".".join(map(str, error["loc"])) or "recipe"
    if error["type"] == "extra_forbidden":
        return f"{where}: no such key"
    seen = "" if error["type"] in ("missing", "value_error") else f" (got {error['input']!r})"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}{seen}"
