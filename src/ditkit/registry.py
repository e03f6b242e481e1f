"""Name -> system: what there is, its paper, the seam it acts on, what it needs.

A system registers itself with the `register` decorator in its own file; the files of the packages in
`_HOMES` are found by name, so adding one file adds the system to the commands and the contract tests.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Kind = Literal["method", "model", "fitter", "objective", "adapter"]

_HOMES: dict[str, str] = {
    "method": "ditkit.methods",
    "model": "ditkit.models",
    "fitter": "ditkit.fitting",
    "objective": "ditkit.training.objectives",
    "adapter": "ditkit.adapters",
}
_entries: dict[tuple[str, str], Entry] = {}
_discovered: set[str] = set()

T = TypeVar("T")


class UnknownNameError(KeyError):
    """No system of that name; the message lists the nearest ones."""

    def __str__(self) -> str:
        return str(self.args[0])


class OptionError(ValueError):
    """An option that the system does not have, or a value it does not take."""


@dataclass(frozen=True)
class Paper:
    title: str
    arxiv: str
    year: int

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True)
class Choice:
    """An option that `tune` may set to one of these values.

    Args:
        values: what to try; plain values that text can name.
        when: other options of the same method, and the values at which this one matters.
    """

    values: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(map(str, self.values)) + _only_when(self.when)


@dataclass(frozen=True)
class Range:
    """An option that `tune` may set to a number from `low` to `high`, both included.

    Args:
        low, high: whole numbers make it a whole number.
        log: tried evenly on a logarithmic scale.
        when: see `Choice`.
    """

    low: float
    high: float
    log: bool = False
    when: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" + _only_when(self.when)


def _only_when(when: Mapping[str, tuple[Any, ...]]) -> str:
    told = (f"{other} is {' or '.join(map(str, values))}" for other, values in when.items())
    return f" where {' and '.join(told)}" if when else ""


Search = Mapping[str, Choice | Range]
"""What a method's class variable `search` holds: its options that are worth trying, in the order in which
they are chosen."""


@dataclass(frozen=True)
class Entry:
    """One registered system.

    Args:
        name: what users write, e.g. `"taylorseer"`.
        seam: the seams it acts on (`"steps"`, `"blocks"`, `"tokens"`, `"attention"`, `"weights"`, ...).
        needs: what it asks for beyond a model (`"nothing"`, `"training"`, `"calibration"`, `"a 2-D grid"`).
        conflicts: names of systems it can't be combined with beyond those that own the same seam.
        neutral: options under which it must change nothing; the contract tests run the system with them.
        aliases: other names users may write.
        variants: the named configurations of a model, without its name.
    """

    kind: Kind
    name: str
    summary: str
    paper: Paper
    seam: tuple[str, ...]
    target: Callable[..., Any]
    needs: tuple[str, ...] = ("nothing",)
    conflicts: tuple[str, ...] = ()
    neutral: dict[str, Any] = dataclasses.field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()


def register(
    kind: Kind,
    name: str,
    *,
    summary: str,
    paper: Paper | None = None,
    seam: tuple[str, ...] = (),
    needs: tuple[str, ...] = ("nothing",),
    conflicts: tuple[str, ...] = (),
    neutral: dict[str, Any] | None = None,
    aliases: tuple[str, ...] = (),
    variants: tuple[str, ...] = (),
) -> Callable[[T], T]:
    """Class (or factory) decorator that adds a system to the registry.

    A fitter has the name of the method it fits, and takes paper, seam and aliases from it.
    """

    def add(target: T) -> T:
        nonlocal paper, seam, aliases
        if (kind, name) in _entries:
            raise ValueError(f"{kind} {name!r} is registered twice")
        if kind == "fitter":
            method = get("method", name)
            paper, seam, aliases = paper or method.paper, seam or method.seam, aliases or method.aliases
        if paper is None:
            raise ValueError(f"{kind} {name!r} names no paper")
        _entries[kind, name] = Entry(
            kind=kind,
            name=name,
            summary=summary,
            paper=paper,
            seam=seam,
            target=typing.cast(Callable[..., Any], target),
            needs=needs,
            conflicts=conflicts,
            neutral=dict(neutral or {}),
            aliases=aliases,
            variants=variants,
        )
        return target

    return add


def _discover(kind: Kind) -> None:
    if kind in _discovered:
        return
    home = importlib.import_module(_HOMES[kind])
    for module in pkgutil.iter_modules(home.__path__):
        importlib.import_module(f"{home.__name__}.{module.name}")
    _discovered.add(kind)


def entries(kind: Kind) -> dict[str, Entry]:
    """Every registered system of a kind, by name, sorted."""
    _discover(kind)
    return {name: entry for (k, name), entry in sorted(_entries.items()) if k == kind}


def get(kind: Kind, name: str) -> Entry:
    """The system of that name or alias.

    Raises:
        UnknownNameError: with the nearest names.
    """
    known = entries(kind)
    for entry in known.values():
        if name == entry.name or name in entry.aliases:
            return entry
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"There are: {', '.join(known)}."
    raise UnknownNameError(f"unknown {kind} {name!r}. {hint}")


def entry_of(system: Any) -> Entry | None:
    """The entry of an instance of a registered class; None when its class is not registered."""
    return next((entry for entry in _entries.values() if entry.target is type(system)), None)


def options(entry: Entry) -> dict[str, dataclasses.Field[Any]]:
    """The options of a system whose target is a dataclass, by name."""
    return {f.name: f for f in dataclasses.fields(typing.cast(Any, entry.target)) if f.init}


def parse_method(text: str) -> Any:
    """Build a method from `"name"` or `"name:option=value,option=value"`, as the commands take it.

    Raises:
        UnknownNameError: unknown method; the nearest names.
        OptionError: unknown option or a value of the wrong type; the valid ones.
    """
    name, _, tail = text.strip().partition(":")
    return build("method", name, [part for part in tail.split(",") if part.strip()])


def build(kind: Kind, name: str, items: Iterable[str]) -> Any:
    """Build a system from `"option=value"` texts.

    Raises:
        UnknownNameError: unknown system; the nearest names.
        OptionError: unknown option or a value of the wrong type; the valid ones.
    """
    get(kind, name)
    values: dict[str, str] = {}
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise OptionError(f"{name}: {item.strip()!r} is not of the form option=value")
        values[key] = value
    return construct(kind, name, values)


def construct(kind: Kind, name: str, values: Mapping[str, Any]) -> Any:
    """Build a system from its options by name; those given as text are read by the option's type.

    Raises:
        UnknownNameError: unknown system; the nearest names.
        OptionError: unknown option or a value it does not take; the valid ones.
    """
    entry = get(kind, name)
    fields = options(entry)
    hints = typing.get_type_hints(entry.target)
    read: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise OptionError(f"{name}: no option {key!r}; it has {', '.join(fields) or 'none'}")
        read[key] = _convert(name, key, value, hints[key]) if isinstance(value, str) else value
    try:
        return entry.target(**read)
    except (TypeError, ValueError) as error:
        raise OptionError(f"{name}: {error}") from error


def _convert(name: str, key: str, value: str, hint: Any) -> Any:
    """One option value from text, by the field's type."""
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value.lower() == "none" and type(None) in arguments:
            return None
        failure: OptionError | None = None
        for member in arguments:
            if member is type(None):
                continue
            try:
                return _convert(name, key, value, member)
            except OptionError as error:
                failure = error
        raise typing.cast(OptionError, failure)
    if origin is Literal:
        if value in arguments:
            return value
        raise OptionError(f"{name}: {key}={value!r} is not one of {', '.join(map(str, arguments))}")
    if hint is bool:
        if value.lower() in ("true", "1", "yes", "on"):
            return True
        if value.lower() in ("false", "0", "no", "off"):
            return False
        raise OptionError(f"{name}: {key}={value!r} is not true or false")
    if hint in (int, float, str):
        try:
            return hint(value)
        except ValueError:
            raise OptionError(f"{name}: {key}={value!r} is not of type {hint.__name__}") from None
    raise OptionError(f"{name}: option {key} can't be given as text; use Python")
