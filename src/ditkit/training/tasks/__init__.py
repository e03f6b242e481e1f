"""What can be trained: one file a task, all behind `Task`."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path

from ditkit.training.config import RunConfig
from ditkit.training.tasks.base import Task

_HOMES = {
    "autoencoder": "ditkit.training.tasks.autoencoder:AutoencoderTask",
    "text-encoders": "ditkit.training.tasks.text_encoders:TextEncodersTask",
    "text-to-image": "ditkit.training.tasks.text_to_image:TextToImageTask",
    "text-conditional": "ditkit.training.tasks.text_conditional:TextConditionalTask",
    "video-autoencoder": "ditkit.training.tasks.video_autoencoder:VideoAutoencoderTask",
    "video-text-encoder": "ditkit.training.tasks.video_text_encoder:VideoTextEncoderTask",
    "text-to-video": "ditkit.training.tasks.text_to_video:TextToVideoTask",
    "teacher": "ditkit.training.tasks.teacher:TeacherTask",
    "class-to-image": "ditkit.training.tasks.class_to_image:ClassToImageTask",
    "dynamic-autoencoder": "ditkit.training.tasks.dynamic_autoencoder:DynamicAutoencoderTask",
    "representation-autoencoder": (
        "ditkit.training.tasks.representation_autoencoder:RepresentationAutoencoderTask"
    ),
    "grain": "ditkit.training.tasks.grain:GrainTask",
    "dynamic-content": "ditkit.training.tasks.dynamic_content:DynamicContentTask",
}


def find(name: str) -> type[Task]:
    """The task of that name.

    Raises:
        ValueError: unknown task; the nearest names.
    """
    if name not in _HOMES:
        near = difflib.get_close_matches(name, _HOMES, n=2, cutoff=0.4) or sorted(_HOMES)
        raise ValueError(f"task: unknown {name!r}; did you mean {' or '.join(near)}?")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def create(run: RunConfig, folder: Path, earlier: dict[str, Path]) -> Task:
    """What a stage trains: its task, or an adapter on it.

    Args:
        run: the stage.
        folder: its own.
        earlier: the folders of the stages before it, by name.

    Raises:
        ConfigError: an option that does not fit.
    """
    task = find(run.task)(run, folder, earlier)
    if run.adapter is None:
        return task
    from ditkit.training.tasks.adapted import Adapted  # needs peft, which no other run does

    return Adapted(task, run.adapter)


__all__ = ["Task", "create", "find"]
