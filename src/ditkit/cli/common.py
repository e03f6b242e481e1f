"""What the commands share: one-line errors, exit codes, outputs checked before work starts, progress bars."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console()
"""Results: tables, names, paths."""
notices = Console(stderr=True)
"""Everything that is not a result: progress bars, warnings, errors."""

WRONG_USE = 2
FAILED = 1

Command = TypeVar("Command", bound=Callable[..., Any])
_debug = False


class UsageError(ValueError):
    """The command was asked for something that it cannot do; nothing was started."""


def set_debug(on: bool) -> None:
    global _debug
    _debug = on


def guarded(command: Command) -> Command:
    """Turn what a command raises into one line and an exit code: 2 for wrong use, 1 for a failure."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            _quiet_libraries()
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, KeyboardInterrupt):
            raise
        except Exception as error:
            if _debug:
                raise
            notices.print(f"[bold red]error:[/] {_one_line(error)}", highlight=False, soft_wrap=True)
            raise typer.Exit(WRONG_USE if _is_wrong_use(error) else FAILED) from None

    return run  # pyright: ignore[reportReturnType]


def _is_wrong_use(error: Exception) -> bool:
    """Errors about what was asked, raised before work starts, as against failures of the work itself."""
    from ditkit.registry import OptionError, UnknownNameError

    if isinstance(error, (UsageError, UnknownNameError, OptionError)):
        return True
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError)):
        return True
    # by name, so that refusing a method does not import the seams and the trainer
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(
        names
        & {
            "AdapterError",
            "UnsupportedModelError",
            "ConflictError",
            "ConfigError",
            "ConversionError",
            "LatentCacheError",
            "RecipeError",
            "TuneError",
        }
    )


def _one_line(error: Exception) -> str:
    from rich.markup import escape

    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.strerror}: {error.filename}"
    else:
        text = " ".join(str(error).split()) or "no message"
    expected = isinstance(error, (ValueError, OSError, KeyError)) or _is_wrong_use(error)
    prefix = "" if expected else f"{type(error).__name__}: "
    hint = "" if expected else " (ditkit --debug shows where)"
    return escape(prefix + text + hint)


def _quiet_libraries() -> None:
    """The libraries below warn about their own future; a command's output is for its user."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name, value in (("TOKENIZERS_PARALLELISM", "false"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)


def existing_file(path: Path, what: str) -> Path:
    """`path`, checked before any work.

    Raises:
        UsageError: it is not there, or it is a folder; the message names the path.
    """
    if path.is_dir():
        raise UsageError(f"{what} {path} is a folder, a file is needed")
    if not path.exists():
        raise UsageError(f"{what} not found: {path}")
    return path


def writable_file(path: Path, suffixes: tuple[str, ...] = (), option: str = "--out") -> Path:
    """`path`, checked before any work to be a place where a file can be written. Makes nothing.

    Raises:
        UsageError: a suffix that is not one of `suffixes`, a folder, or a place without write permission.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(f"{option} {path}: the name has to end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder, name a file in it")
    writable_folder(path.parent, option)
    return path


def writable_folder(path: Path, option: str = "--out") -> Path:
    """`path`, checked before any work to be a folder that takes files or can be made. Makes nothing.

    Raises:
        UsageError: it is a file or lies in one, or it cannot be made or written to.
    """
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UsageError(f"{option}: {there} is not a folder")
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".ditkit-"):
            pass
    except OSError as error:
        raise UsageError(f"{option}: cannot write to {path} ({error.strerror})") from None
    return path


def listed(paths: list[Path]) -> None:
    """The files that were written, one a line, for people and for scripts."""
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True, markup=False)


def bar(unit: str = "steps") -> Progress:
    """A progress bar on the terminal's error stream; silent when that is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=notices,
        transient=True,
        disable=not notices.is_terminal,
    )


def pair(text: str, what: str) -> tuple[str, str]:
    """Key and value of `key=value`; `what` it is, for messages."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"{what} {text!r} is not of the form key=value")
    return key.strip(), value.strip()


def data_section(text: str) -> dict[str, Any]:
    """The keys of the data section that `--data` names: a folder, or the bundled set."""
    if text == "emoji":
        return {"kind": "emoji"}
    path = Path(text)
    if not path.is_dir():
        raise UsageError(f"--data {text}: no such folder of pictures, and not emoji")
    from ditkit.data.latents import MANIFEST

    return {"kind": "latents" if (path / MANIFEST).is_file() else "folder", "path": str(path)}


def run_config(raw: dict[str, Any], overrides: list[str] | None) -> Any:
    """The settings of a run, a `RunConfig`, with `key=value` of the command line in their places.

    Raises:
        UsageError: names each bad key and what was seen.
    """
    from pydantic import ValidationError

    from ditkit.training import config

    for text in overrides or ():
        key, value = pair(text, "override")
        config.assign(raw, key.split("."), value, text)
    try:
        return config.RunConfig.model_validate(raw)
    except ValidationError as error:
        raise UsageError(config.explain(error)) from None
