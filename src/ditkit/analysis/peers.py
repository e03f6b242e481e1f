"""Other libraries' caches as contestants: those of diffusers' hooks, and cache-dit where it is installed.

`at_intervals` gives the ones that compute every N-th step, beside methods that do the same; `sweep` gives
every one of them over its options, so that the best can be found. Each runs as its documentation says, and is
told what it asks for: timestep, number of steps, passes of guidance.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ditkit.analysis.contestants import Contestant
from ditkit.analysis.sampling import Sampling, call_arguments, sample

_WARM_UP = 3
"""Steps computed in full before a peer may skip: diffusers' own default, and the FLUX reference's."""

INTERVALS = (2, 3, 4, 5, 6, 7, 9)


def at_intervals(pipe: Any, intervals: Sequence[int], sampling: Sampling) -> list[Contestant]:
    """Other libraries' caches at the given intervals: diffusers' TaylorSeer in three forms, cache-dit.

    Args:
        pipe: the pipeline of the comparison; one whose transformer has no cache of diffusers gets no peer.
        intervals: every how many steps one is computed.
        sampling: the settings of the comparison, some of which cache-dit has to be told.
    """
    found: list[Contestant] = []
    for interval in sorted(set(intervals)):
        if _takes_hooks(pipe):
            found += [_taylorseer(interval, form) for form in _FORMS]
        if has_cache_dit():
            found.append(_cache_dit_mask(interval, sampling))
    return found


def sweep(pipe: Any, sampling: Sampling, prompts: Sequence[str]) -> dict[str, list[Contestant]]:
    """Every peer that fits the pipeline, by library and method, over its options.

    Args:
        sampling: the settings of the comparison; caches that count steps are told its number.
        prompts: to calibrate MagCache with, as diffusers documents; nothing else is drawn here.
    """
    found: dict[str, list[Contestant]] = {}
    if _takes_hooks(pipe):
        found["diffusers TaylorSeer"] = [
            _taylorseer(interval, form, order, warm_up)
            for interval in INTERVALS
            for form in _FORMS
            for order, warm_up in ((1, _WARM_UP), (2, _WARM_UP), (1, 1), (0, 1))
        ]
        found["diffusers FirstBlockCache"] = [
            _hook(f"diffusers FirstBlockCache, {threshold:g}", "FirstBlockCacheConfig", threshold=threshold)
            for threshold in (0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.2, 0.3, 0.4, 0.6)
        ]
        ratios = mag_ratios(pipe, sampling, prompts)
        found["diffusers MagCache"] = [
            _hook(
                f"diffusers MagCache, {threshold:g}, at most {skips}, retention {kept:g}",
                "MagCacheConfig",
                threshold=threshold,
                max_skip_steps=skips,
                retention_ratio=kept,
                num_inference_steps=sampling.steps,
                mag_ratios=list(ratios),
            )
            for threshold in (0.03, 0.06, 0.12, 0.24, 0.5)
            for skips in (1, 2, 3, 5, 8)
            for kept in (0.05, 0.2)
        ]
        found["diffusers PAB"] = [_pab(every, within) for every in (2, 3, 4, 6) for within in _RANGES]
        found["diffusers FasterCache"] = [
            _faster_cache(every, within, sampling) for every in (2, 3, 4, 6) for within in _RANGES
        ]
    if has_cache_dit():
        found["cache-dit DBCache"] = _db_cache(sampling, order=None)
        found["cache-dit DBCache + TaylorSeer"] = [
            *(_cache_dit_mask(n, sampling, order) for n in INTERVALS for order in (1, 2)),
            *_db_cache(sampling, order=1),
        ]
    return found


def has_cache_dit() -> bool:
    return importlib.util.find_spec("cache_dit") is not None


def _takes_hooks(pipe: Any) -> bool:
    return hasattr(getattr(pipe, "transformer", None), "enable_cache")


def _hook(
    label: str, config: str, later: Callable[[Any], Mapping[str, Any]] = lambda _: {}, **options: Any
) -> Contestant:
    """One of diffusers' hooks, by the name of its configuration; `later(pipe)` gives options that need it."""

    @contextlib.contextmanager
    def attach(pipe: Any, _: bool) -> Iterator[None]:
        import diffusers

        pipe.transformer.enable_cache(getattr(diffusers, config)(**{**options, **later(pipe)}))
        try:
            yield
        finally:
            pipe.transformer.disable_cache()

    return Contestant(label, "peer", attach)


_FORMS = ("", "attention and MLP", "lite")
"""diffusers' TaylorSeer as it comes, on the modules of the paper, and in its light form."""


def _taylorseer(interval: int, form: str, order: int = 1, warm_up: int = _WARM_UP) -> Contestant:
    def later(pipe: Any) -> Mapping[str, Any]:
        import torch

        if form == "lite":
            return {"use_lite_mode": True}
        if not form:
            return {}
        cached, skipped = _paper_modules(pipe.transformer)
        return {
            "cache_identifiers": cached,
            "skip_predict_identifiers": skipped,
            "taylor_factors_dtype": torch.float32,
        }

    label = f"diffusers TaylorSeer, interval {interval}" + (f", {form}" if form else "")
    label += "" if order == 1 else f", order {order}"
    label += "" if warm_up == _WARM_UP else f", warm-up {warm_up}"
    return _hook(
        label,
        "TaylorSeerCacheConfig",
        later,
        cache_interval=interval,
        max_order=order,
        disable_cache_before_step=warm_up,
    )


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


def mag_ratios(pipe: Any, sampling: Sampling, prompts: Sequence[str]) -> list[float]:
    """MagCache's ratios for this model, by diffusers' own calibration: one run, which prints them.

    With two passes of guidance each prints its own; the first, with the prompt, is taken.
    """
    printed = io.StringIO()
    calibrate = _hook("", "MagCacheConfig", calibrate=True, num_inference_steps=sampling.steps)
    with calibrate.attach(pipe, False), contextlib.redirect_stdout(printed):
        sample(pipe, prompts, sampling, batch=len(prompts))
    lists = re.findall(r"^\[[-+.,\deE\s]+\]$", printed.getvalue(), re.MULTILINE)
    if not lists:
        raise RuntimeError("diffusers' MagCache printed no ratios when it was calibrated")
    return json.loads(lists[0])


_RANGES = ((100, 800), (-1, 681), (-1, 950))
"""Timesteps within which attention may be broadcast: PAB's default, FasterCache's, nearly all."""


def _timestep(pipe: Any) -> Mapping[str, Any]:
    return {"current_timestep_callback": lambda: pipe.current_timestep}


def _pab(every: int, within: tuple[int, int]) -> Contestant:
    """Pyramid Attention Broadcast; text is read by cross-attention where a model has such modules."""
    return _hook(
        f"diffusers PAB, every {every}, timesteps {within[0]} to {within[1]}",
        "PyramidAttentionBroadcastConfig",
        _timestep,
        spatial_attention_block_skip_range=every,
        cross_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=within,
        cross_attention_timestep_skip_range=within,
    )


def _faster_cache(every: int, within: tuple[int, int], sampling: Sampling) -> Contestant:
    """FasterCache on attention. Its other half approximates the unconditional half of a batch; pipelines
    that run two passes have no such batch, which diffusers asks to call distilled."""
    return _hook(
        f"diffusers FasterCache, every {every}, timesteps {within[0]} to {within[1]}",
        "FasterCacheConfig",
        _timestep,
        spatial_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=within,
        is_guidance_distilled=True,
    )


def _cache_dit(label: str, sampling: Sampling, order: int | None, **options: Any) -> Contestant:
    """cache-dit with these options of its DBCache and, with an order, its Taylor calibrator."""

    @contextlib.contextmanager
    def attach(pipe: Any, _: bool) -> Iterator[None]:
        import cache_dit  # pyright: ignore[reportMissingImports]

        logging.getLogger("CACHE_DIT").setLevel(logging.WARNING)  # it logs a page for each use
        calibrator = None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
        cache_dit.enable_cache(
            pipe,
            cache_config=cache_dit.DBCacheConfig(
                num_inference_steps=sampling.steps,
                enable_separate_cfg="negative_prompt" in call_arguments(pipe, sampling, 1),
                **options,
            ),
            calibrator_config=calibrator,
        )
        try:
            yield
        finally:
            cache_dit.disable_cache(pipe)

    return Contestant(label, "peer", attach)


def _cache_dit_mask(interval: int, sampling: Sampling, order: int = 1) -> Contestant:
    """cache-dit with a static mask of steps, its smallest front part and its Taylor calibrator."""
    mask = [int(n < _WARM_UP or (n - _WARM_UP + 1) % interval == 0) for n in range(sampling.steps)]
    return _cache_dit(
        f"cache-dit, interval {interval}" + ("" if order == 1 else f", order {order}"),
        sampling,
        order,
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=_WARM_UP,
        steps_computation_mask=mask,
        steps_computation_policy="static",
    )


def _db_cache(sampling: Sampling, order: int | None) -> list[Contestant]:
    """cache-dit's threshold on the residual of its first blocks."""
    return [
        _cache_dit(
            f"cache-dit, threshold {threshold:g}, warm-up {warm_up}, at most {skips}"
            + ("" if order is None else f", Taylor {order}"),
            sampling,
            order,
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=warm_up,
            max_continuous_cached_steps=skips,
        )
        for threshold in (0.06, 0.12, 0.24, 0.5, 1.0)
        for warm_up in (1, 3)
        for skips in (2, 4, 8)
    ]
