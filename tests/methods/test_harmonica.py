"""HarmoniCa: what a table makes run, what is kept, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ditkit
from ditkit import artifact
from ditkit.methods.harmonica import HarmoniCa
from ditkit.registry import OptionError, parse_method
from ditkit.seams.cost import ModelCost
from ditkit.seams.errors import SeamError
from loops import Pipe, denoise
from tiny_models import TINY, output

FLUX, OWN = TINY["FluxTransformer2DModel"], TINY["DiT"]


def table(steps: int, units: int, share: float = 0.5, seed: int = 0) -> Tensor:
    """A random table (T, U) whose first row computes all."""
    mask = torch.rand(steps, units, generator=torch.Generator().manual_seed(seed)) < share
    mask[0] = True
    return mask


def units_of(tiny: Any) -> int:
    model = tiny.model()
    with ditkit.apply(model) as run:
        return len(run.hosts[0].blocks.units)


@pytest.mark.parametrize("tiny", TINY.values(), ids=TINY.keys())
def test_the_table_decides_what_runs(tiny: Any) -> None:
    """On every class, both passes of guidance; where nothing computes, nothing but the frame runs."""
    model, steps = tiny.model(), 6
    pipe, mask = Pipe(model, tiny), table(steps, units_of(tiny))
    mask[2] = False
    ran: list[list[str]] = []
    with ditkit.apply(pipe, HarmoniCa(mask=mask)) as run:
        names = [unit.name for unit in run.hosts[0].blocks.units]
        seam = run.hosts[0].blocks
        original = seam._store
        seam._store = lambda step, unit, out: (ran[-1].append(unit.name), original(step, unit, out))[1]
        model.register_forward_pre_hook(lambda *_: ran.append([]))
        pipe(steps=steps, guidance=True)
    for forward, names_ran in enumerate(ran):
        expected = {name for name, runs in zip(names, mask[forward // 2].tolist(), strict=True) if runs}
        assert set(names_ran) == expected
    report = run.report()
    reused = 2 * int((~mask).sum())
    assert report.notes == [f"HarmoniCa: {reused} of {2 * mask.numel()} module outputs were reused."]
    assert 2 not in report.computed_at
    assert HarmoniCa(mask=mask).computed_steps(steps) == report.steps_computed


def test_flops_are_those_of_what_runs() -> None:
    """Half of the MLPs and a third of the attentions, counted."""
    model = OWN.model()
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[1::2, 1::2] = False  # the MLPs at every other step
    with ditkit.apply(model, HarmoniCa(mask=mask)) as run:
        denoise(model, OWN, 6)
    report = run.report()
    assert report.flops is not None and report.flops_dense is not None
    width, tokens = 32, 16
    mlp = 2 * 2 * tokens * width * 4 * width
    assert report.flops_dense - report.flops == 9 * mlp


def test_reused_outputs_are_the_last_ones_under_todays_gates() -> None:
    model, steps = OWN.model(), 5
    inputs = [OWN.inputs(seed=1, noise=1 - index / steps) for index in range(steps)]
    mask = table(steps, 6, seed=3)
    with torch.no_grad():
        with ditkit.apply(model, HarmoniCa(mask=mask)):
            found = [output(model(**one)) for one in inputs]
        kept: dict[int, Tensor] = {}
        row = [0]
        modules = [module for block in model.blocks for module in (block.attn, block.mlp)]
        for unit, module in enumerate(modules):
            module.register_forward_hook(
                lambda module, args, out, unit=unit: (
                    kept.setdefault(unit, out) if not mask[row[0], unit] else kept.__setitem__(unit, out)
                )
            )
        for index, one in enumerate(inputs):
            row[0] = index
            expected = output(model(**one))
            torch.testing.assert_close(found[index], expected, atol=1e-6, rtol=1e-6)


def test_only_what_will_be_reused_is_kept() -> None:
    sizes = []
    for unit in (None, 0):
        mask = torch.ones(4, 6, dtype=torch.bool)
        if unit is not None:
            mask[2, unit] = False
        with ditkit.apply(model := OWN.model(), HarmoniCa(mask=mask)) as run:
            denoise(model, OWN, 4)
        sizes.append(run.report().bytes_cached)
    assert sizes == [0, 16 * 32 * 4]


def test_uniform_is_the_plain_rule_for_any_number_of_steps() -> None:
    method = HarmoniCa(uniform=3)
    for steps in (7, 9):
        with ditkit.apply(model := FLUX.model(), method) as run:
            denoise(model, FLUX, steps)
        assert run.report().computed_at == list(range(0, steps, 3))
        assert method.computed_steps(steps) == len(run.report().computed_at)


def fitted(folder: Path, tiny: Any, steps: int, **options: Any) -> Path:
    model = tiny.model()
    logits = table(steps, units_of(tiny), seed=5).float() * 10 - 5
    known = {"steps": steps, "threshold": 0.1, "scheduler": "FlowMatchEulerDiscreteScheduler", **options}
    return artifact.save(folder, "harmonica", known, artifact.model_facts(model), {"logits": logits})


def test_weights(tmp_path: Path) -> None:
    folder = fitted(tmp_path / "fit", FLUX, 6)
    method = parse_method(f"harmonica:weights={folder}")
    assert torch.equal(torch.tensor(method.table()), table(6, units_of(FLUX), seed=5))
    assert all(all(row) for row in HarmoniCa(weights=str(folder), threshold=0.001).table())
    pipe = Pipe(FLUX.model(), FLUX)
    with ditkit.apply(pipe, method) as run:
        pipe(steps=6)
    assert run.report().steps_computed == method.computed_steps(6)
    words = r"is for 6 steps, this generation has 7 steps.*Sample with 6 steps"
    with pytest.raises(SeamError, match=words), ditkit.apply(pipe, method):
        pipe(steps=7)
    with pytest.raises(SeamError, match="more than 6 steps"), ditkit.apply(model := FLUX.model(), method):
        denoise(model, FLUX, 8)
    with pytest.raises(SeamError, match=r"FluxTransformer2DModel.*DiT|DiT.*FluxTransformer2DModel"):
        ditkit.apply(OWN.model(), method)
    other = fitted(tmp_path / "other", FLUX, 6, scheduler="DDIMScheduler")
    with ditkit.apply(pipe, HarmoniCa(weights=str(other))) as run:
        pipe(steps=6)
    assert any("learned with DDIMScheduler" in note for note in run.report().notes)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(SeamError, match=r"no learned table for this DiT.*ditkit fit harmonica"):
        ditkit.apply(OWN.model(), HarmoniCa())
    with pytest.raises(SeamError, match="has 5 modules, this DiT has 6"):
        ditkit.apply(OWN.model(), HarmoniCa(mask=table(4, 5)))
    with pytest.raises(FileNotFoundError, match="holds no fit of harmonica"):
        ditkit.apply(OWN.model(), HarmoniCa(weights=str(tmp_path)))
    for options, words in (
        ({"threshold": 1.0}, r"threshold must be in \[0, 1\) or None; got 1.0"),
        ({"uniform": 0}, "uniform must be a whole number of at least 1"),
        ({"uniform": 2, "weights": "x"}, "only one of weights, mask and uniform.*weights and uniform"),
        ({"mask": [True, False]}, r"mask must be a table.*shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            HarmoniCa(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="mask can't be given as text"):
        parse_method("harmonica:mask=1")


def test_ceiling() -> None:
    cost = ModelCost(steps=4, whole=10.0, outside=2.0)
    mask = [[True, True], [True, False], [False, False], [False, True]]
    assert HarmoniCa(mask=mask).ceiling(cost) == pytest.approx(1 / (0.5 + 0.5 * 0.2))
    assert HarmoniCa(uniform=2).ceiling(cost) == pytest.approx(1 / (0.5 + 0.5 * 0.2))
