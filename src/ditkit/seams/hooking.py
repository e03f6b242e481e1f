"""Hooks of one run on a model's modules, through diffusers' HookRegistry, taken off without a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

Forward = Callable[..., Any]


class Around(ModelHook):
    """Runs `around(forward, args, kwargs)` in place of a module's forward."""

    def __init__(self, around: Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self._around = around

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        reference: Any = self.fn_ref
        return self._around(reference.original_forward, args, kwargs)


@dataclass
class _Placed:
    module: nn.Module
    name: str
    hook: ModelHook
    wrapper: Any
    had_registry: bool
    had_forward: bool


class Hooks:
    """What was put on which module, so that all of it can be removed again.

    Other libraries wrap `forward` too (accelerate's offloading does). Removal never tears out a wrapper that
    was put on later: a hook that lies under one becomes a plain pass-through.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._placed: list[_Placed] = []

    def put(self, module: nn.Module, name: str, hook: ModelHook) -> None:
        """Hook one module; `name` is prefixed with `ditkit.`."""
        had_registry = hasattr(module, "_diffusers_hook")
        had_forward = "forward" in vars(module)
        registry = HookRegistry.check_if_exists_or_initialize(module)
        registry.register_hook(hook, f"ditkit.{name}")
        self._placed.append(
            _Placed(module, f"ditkit.{name}", hook, module.forward, had_registry, had_forward)
        )
        self._forget_children()

    def around(
        self, module: nn.Module, name: str, around: Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]
    ) -> None:
        """Run `around(forward, args, kwargs)` in place of the module's forward."""
        self.put(module, name, Around(around))

    def lost(self, module: nn.Module) -> bool:
        """Has someone put back the forward of before, so that a hook put on this module no longer runs?"""
        mine = [placed.wrapper for placed in self._placed if placed.module is module]
        reached: Any = module.forward
        while reached is not None:
            if any(reached is wrapper for wrapper in mine):
                return False
            reached = getattr(reached, "__wrapped__", None)
        return bool(mine)

    def put_back(self, module: nn.Module) -> None:
        """Hook a module again whose hooks were lost."""
        again = [placed for placed in self._placed if placed.module is module]
        for placed in again:
            registry: HookRegistry = placed.module._diffusers_hook  # type: ignore[assignment]
            _drop(registry, placed.name)
            registry.register_hook(placed.hook, placed.name)
            placed.wrapper = module.forward

    def remove(self) -> None:
        """Take off every hook, the last one first."""
        while self._placed:
            placed = self._placed.pop()
            module = placed.module
            registry = getattr(module, "_diffusers_hook", None)
            if registry is None or placed.name not in registry.hooks:
                continue
            last = registry._hook_order[-1] == placed.name
            if last and module.forward is not placed.wrapper:
                _pass_through(placed.hook)
                _drop(registry, placed.name)
            else:
                registry.remove_hook(placed.name, recurse=False)
            if not registry.hooks and not placed.had_registry:
                del module._diffusers_hook
            own = getattr(module.forward, "__func__", None) is type(module).forward
            if own and not placed.had_forward and "forward" in vars(module):
                del module.forward
        self._forget_children()

    def _forget_children(self) -> None:
        """diffusers lists hooked children once and keeps the list: make it look again."""
        registry = getattr(self._root, "_diffusers_hook", None)
        if registry is not None:
            registry.invalidate_child_registries_cache()


def _drop(registry: HookRegistry, name: str) -> None:
    place = registry._hook_order.index(name)
    del registry.hooks[name]
    registry._hook_order.pop(place)
    registry._fn_refs.pop(place)


def _pass_through(hook: ModelHook) -> None:
    """Make a hook that can't be taken out of the chain do nothing."""
    reference: Any = hook.fn_ref
    original = reference.original_forward or reference.forward
    reference.forward = original
    reference.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
    reference.post_forward = lambda module, output: output
