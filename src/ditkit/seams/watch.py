"""Learn when a scheduler starts a schedule and when it takes a step.

The scheduler instance gets a subclass of its own class, of the same name, for as long as someone listens:
unlike functions stored on the instance, this survives `copy.deepcopy` (LTX-2 copies its scheduler), keeps
signatures for diffusers' argument inspection and leaves nothing behind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol


class Listener(Protocol):
    def timesteps_set(self, scheduler: Any) -> None: ...

    def stepping(self, scheduler: Any, model_output: Any) -> None: ...

    def stepped(self, scheduler: Any) -> None: ...


_listeners: dict[int, list[Listener]] = {}
_MARK = "_ditkit_watched_class"


def _tell(cls: type, name: str, event: str) -> Callable[..., Any]:
    original = getattr(cls, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if event == "stepped":
            model_output = args[0] if args else kwargs.get("model_output")
            for listener in tuple(_listeners.get(id(self), ())):
                listener.stepping(self, model_output)
        result = original(self, *args, **kwargs)
        for listener in tuple(_listeners.get(id(self), ())):
            getattr(listener, event)(self)
        return result

    return method


@functools.lru_cache(maxsize=64)
def _watched(cls: type) -> type:
    body: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        _MARK: cls,
    }
    for name, event in (("set_timesteps", "timesteps_set"), ("step", "stepped")):
        if hasattr(cls, name):
            body[name] = _tell(cls, name, event)
    return type(cls.__name__, (cls,), body)


def watch(scheduler: Any, listener: Listener) -> None:
    """Call the listener after each `set_timesteps`, before and after each `step` of this instance."""
    if not hasattr(scheduler, _MARK):
        scheduler.__class__ = _watched(type(scheduler))
    _listeners.setdefault(id(scheduler), []).append(listener)


def unwatch(scheduler: Any, listener: Listener) -> None:
    """Undo one `watch`; after the last one the instance has its own class again."""
    heard = _listeners.get(id(scheduler), [])
    if listener in heard:
        heard.remove(listener)
    if not heard:
        _listeners.pop(id(scheduler), None)
        original = getattr(type(scheduler), _MARK, None)
        if original is not None:
            scheduler.__class__ = original
