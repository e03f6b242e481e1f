"""Who takes part in a comparison: dense sampling, our methods, other libraries' methods, fewer steps."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ditkit import registry
from ditkit.analysis.sampling import Sampling, call_arguments

Kind = Literal["dense", "method", "peer", "plain"]
Attach = Callable[[Any, bool], contextlib.AbstractContextManager[Any]]

_WARM_UP = 3
"""Steps computed in full before a peer may skip: diffusers' own default, and the FLUX reference's."""


@dataclass(frozen=True)
class Contestant:
    """One way to draw the pictures.

    Args:
        label: its name in tables.
        kind: dense, one of ours, another library's, or plain sampling with fewer steps.
        attach: `attach(pipe, counting)` is a context manager in which the pipeline runs this way; `counting`
            tells whether its FLOPs are wanted. It yields a `Run` for our methods, None for the others.
        steps: denoising steps; None for those of the comparison.
    """

    label: str
    kind: Kind
    attach: Attach = field(repr=False)
    steps: int | None = None


def dense() -> Contestant:
    """The unchanged pipeline, against which all others are measured."""
    return Contestant("dense", "dense", _unchanged)


def plain(steps: int) -> Contestant:
    """The unchanged pipeline with fewer steps: what anyone can have without a method."""
    return Contestant(f"plain, {steps} steps", "plain", _unchanged, steps)


def ours(methods: Any) -> Contestant:
    """One of ditkit's methods, or several together.

    Args:
        methods: a method, a sequence of methods to apply together, or text as `parse` takes it.

    Raises:
        UnknownNameError, OptionError: from the text; with the nearest names, the valid options.
    """
    if isinstance(methods, str):
        methods = parse(methods)
    together = tuple(methods) if isinstance(methods, Sequence) else (methods,)
    if not together:
        raise ValueError("an empty sequence of methods was given; leave it out, dense takes part anyway")

    def attach(pipe: Any, counting: bool) -> contextlib.AbstractContextManager[Any]:
        from ditkit.seams.apply import apply

        return apply(pipe, *together, count_flops=counting)

    return Contestant(" + ".join(name_of(method) for method in together), "method", attach)


def parse(text: str) -> tuple[Any, ...]:
    """Methods from `"name:option=value,..."`; several to be applied together are joined by `+`."""
    return tuple(registry.parse_method(part) for part in re.split(r"\+(?=\s*[a-z])", text))


def name_of(method: Any) -> str:
    """A method as text that `parse` reads: its registered name and the options that are not defaults."""
    entry = next((e for e in registry.entries("method").values() if e.target is type(method)), None)
    if entry is None:
        return type(method).__name__
    changed = [
        f"{f.name}={_text(getattr(method, f.name))}"
        for f in registry.options(entry).values()
        if f.default is dataclasses.MISSING or getattr(method, f.name) != f.default
    ]
    return entry.name + (":" + ",".join(changed) if changed else "")


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def peers(
    pipe: Any, methods: Sequence[Contestant], intervals: Sequence[int], sampling: Sampling
) -> list[Contestant]:
    """Other libraries' caches at the given intervals: diffusers' in three forms, cache-dit when installed.

    Args:
        pipe: the pipeline of the comparison; one whose transformer has no cache of diffusers gets no peer.
        methods: unused names are not repeated: a label that is already there is left out.
        intervals: every how many steps one is computed.
        sampling: the settings of the comparison, some of which cache-dit has to be told.
    """
    model = getattr(pipe, "transformer", None)
    found: list[Contestant] = []
    for interval in sorted(set(intervals)):
        if hasattr(model, "enable_cache"):
            found += _diffusers_peers(interval)
        if importlib.util.find_spec("cache_dit") is not None:
            found.append(_cache_dit(interval, sampling))
    taken = {contestant.label for contestant in methods}
    return [contestant for contestant in found if contestant.label not in taken]


def _diffusers_peers(interval: int) -> list[Contestant]:
    def form(**options: Any) -> Attach:
        @contextlib.contextmanager
        def attach(pipe: Any, _: bool) -> Iterator[None]:
            import torch
            from diffusers import TaylorSeerCacheConfig

            settings = dict(options)
            if settings.pop("paper", False):
                cached, skipped = _paper_modules(pipe.transformer)
                settings |= {"cache_identifiers": cached, "skip_predict_identifiers": skipped}
                settings |= {"taylor_factors_dtype": torch.float32}
            pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=interval, **settings))
            try:
                yield
            finally:
                pipe.transformer.disable_cache()

        return attach

    return [
        Contestant(f"diffusers TaylorSeer, interval {interval}", "peer", form()),
        Contestant(f"diffusers TaylorSeer, interval {interval}, attention and MLP", "peer", form(paper=True)),
        Contestant(f"diffusers TaylorSeer, interval {interval}, lite", "peer", form(use_lite_mode=True)),
    ]


def _paper_modules(model: Any) -> tuple[list[str], list[str]]:
    """Patterns of the modules that the paper forecasts, and of those that need not run then.

    They come from the anatomy facts, so that diffusers' hook covers exactly what ours covers.
    """
    from ditkit.seams.anatomy import describe

    cached: list[str] = []
    skipped: list[str] = []
    for stack in describe(model).stacks:
        for unit in stack.units:
            cached.append(rf"{re.escape(stack.path)}\.\d+\.{re.escape(unit.module)}")
            skipped += [rf"{re.escape(stack.path)}\.\d+\.{re.escape(name)}" for name in unit.bypass]
    return cached, skipped


def _cache_dit(interval: int, sampling: Sampling) -> Contestant:
    """cache-dit with the same steps computed: its static mask, Taylor calibrator and smallest front part."""

    @contextlib.contextmanager
    def attach(pipe: Any, _: bool) -> Iterator[None]:
        import cache_dit  # pyright: ignore[reportMissingImports]

        steps = sampling.steps
        two_passes = "negative_prompt" in call_arguments(pipe, sampling, 1)
        mask = [int(step < _WARM_UP or (step - _WARM_UP + 1) % interval == 0) for step in range(steps)]
        cache_dit.enable_cache(
            pipe,
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=1,
                Bn_compute_blocks=0,
                max_warmup_steps=_WARM_UP,
                steps_computation_mask=mask,
                steps_computation_policy="static",
                num_inference_steps=steps,
                enable_separate_cfg=two_passes,
            ),
            calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1),
        )
        try:
            yield
        finally:
            cache_dit.disable_cache(pipe)

    return Contestant(f"cache-dit, interval {interval}", "peer", attach)


@contextlib.contextmanager
def _unchanged(_: Any, __: bool) -> Iterator[None]:
    yield
