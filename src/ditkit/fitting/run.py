"""One fit from its start, or from where it was stopped, to the folder that the method takes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ditkit.artifact import CONFIG, WEIGHTS
from ditkit.files import write_text
from ditkit.fitting.errors import FittingError
from ditkit.registry import get

PROGRESS = ".progress"
Source = Literal["own", "emoji"]

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total) as the work goes on."""


@dataclass(frozen=True)
class FitData:
    """What is fitted on.

    Args:
        prompts: at least one; a fitter takes as many of the first as it needs.
        source: `"own"`: pictures that the pipeline draws for the prompts; `"emoji"`: the pictures of the
            emoji set whose captions the prompts are.

    Raises:
        FittingError: no prompt, or an unknown source.
    """

    prompts: tuple[str, ...]
    source: Source = "own"

    def __post_init__(self) -> None:
        if not self.prompts or any(not prompt.strip() for prompt in self.prompts):
            raise FittingError("prompts: at least one is needed, and none may be empty")
        if self.source not in ("own", "emoji"):
            raise FittingError(f"source must be own or emoji; got {self.source!r}")


def emoji_prompts(seed: int = 0) -> tuple[str, ...]:
    """The captions of the emoji set's training pictures, in a random order."""
    from ditkit.data.emoji import EmojiDataset

    captions = EmojiDataset("train", groups=["single"]).captions
    return tuple(captions[i] for i in np.random.default_rng(seed).permutation(len(captions)))


class Fitter(Protocol):
    """What `@register("fitter", ...)` decorates: a dataclass of options."""

    def fit(self, pipe: Any, data: FitData, folder: Path, progress: Progress) -> None:
        """Fit and write `artifact.save(folder, ...)`, leaving the pipeline as it was.

        What is needed to go on after a stop lies in `folder / PROGRESS`, which the caller removes at the
        end. A KeyboardInterrupt passes through after the state was saved.
        """
        ...


def run(
    pipe: Any,
    name: str,
    fitter: Fitter,
    data: FitData,
    folder: str | Path,
    progress: Progress = lambda what, done, total: None,
) -> Path:
    """Fit into a folder; called again after a stop with the same arguments it goes on where it was.

    Args:
        name: of the fitter.

    Raises:
        FileExistsError: the folder holds a finished fit, or an unfinished one with other settings.
    """
    folder = Path(folder)
    check_folder(folder)
    asked = _identity(pipe, get("fitter", name).name, fitter, data)
    record = folder / PROGRESS / "fit.json"
    if record.is_file():
        begun = json.loads(record.read_text(encoding="utf-8"))
        unlike = sorted(key for key in {*asked, *begun} if asked.get(key) != begun.get(key))
        if unlike:
            there = ", ".join(f"{key}={begun.get(key)!r}" for key in unlike)
            here = ", ".join(f"{key}={asked.get(key)!r}" for key in unlike)
            raise FileExistsError(
                f"{folder} holds an unfinished fit with {_short(there)}; asked for now: {_short(here)}. "
                "Repeat its settings to go on, or choose another folder"
            )
    else:
        write_text(record, json.dumps(asked, indent=1) + "\n")
    fitter.fit(pipe, data, folder, progress)
    shutil.rmtree(folder / PROGRESS)
    return folder


def check_folder(folder: Path) -> None:
    """Raises FileExistsError where a finished fit, or something else, lies already."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a folder is needed")
    finished = (folder / CONFIG).exists() and not (folder / PROGRESS).exists()
    if finished:
        raise FileExistsError(f"{folder} holds a finished fit; choose another folder or delete it")
    other = sorted(path.name for path in folder.iterdir() if path.name not in (PROGRESS, CONFIG, WEIGHTS))
    if other:
        raise FileExistsError(
            f"{folder} holds other files ({', '.join(other[:3])}); choose a folder of its own"
        )


def _identity(pipe: Any, name: str, fitter: Fitter, data: FitData) -> dict[str, Any]:
    """What must be the same for a stopped fit to go on."""
    from ditkit.artifact import model_facts
    from ditkit.fitting.recording import transformer_of

    options = dataclasses.asdict(fitter) if dataclasses.is_dataclass(fitter) else {}  # pyright: ignore[reportArgumentType]
    found = {
        "fitter": name,
        **{f"options.{key}": value for key, value in options.items()},
        **{f"model.{key}": value for key, value in model_facts(transformer_of(pipe)).items()},
        "source": data.source,
        "prompts": list(data.prompts),
    }
    return json.loads(json.dumps(found))


def _short(text: str, longest: int = 200) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."
