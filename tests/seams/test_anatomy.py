"""The facts on every class hold for a tiny instance of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ditkit
from ditkit.seams.anatomy import child, describe
from ditkit.seams.errors import SeamError, UnsupportedModelError
from tiny_models import TINY, Tiny, output

every_class = pytest.mark.parametrize("tiny", TINY.values(), ids=TINY.keys())


@every_class
def test_paths_exist_and_cover_the_block(tiny: Tiny) -> None:
    model = tiny.model()
    anatomy = describe(model)
    for stack, index, block in anatomy.blocks(model):
        present = [unit for unit in stack.units if child(block, unit.module) is not None]
        assert present, f"{stack.path}.{index} has no unit"
        for unit in present:
            for path in unit.bypass:
                assert child(block, path) is not None, f"{stack.path}.{index}.{path}"
        covered = {unit.module for unit in present} | {path for unit in present for path in unit.bypass}
        attention = {site.module for site in stack.attention if child(block, site.module) is not None}
        assert attention <= covered
        assert not any(
            name.split(".")[0] not in {path.split(".")[0] for path in covered}
            and isinstance(module, nn.MultiheadAttention)
            for name, module in block.named_modules()
        )


@every_class
@pytest.mark.parametrize("size", [0, 1])
def test_layout_matches_the_sequence(tiny: Tiny, size: int) -> None:
    model, inputs = tiny.model(), tiny.inputs(batch=2, size=size)
    anatomy = describe(model)
    seen: list[torch.Size] = []
    first = anatomy.blocks(model)[0][2]
    hook = first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    layout = anatomy.layout(model, inputs)
    assert layout.image_length == seen[0][1]
    assert layout.text == anatomy.text
    assert layout.text_length == sum(inputs[name].shape[1] for name in anatomy.encoder if name in inputs)
    if layout.text_mask is not None:
        assert layout.text_mask.shape == (2, layout.text_length) and layout.text_mask.dtype == torch.bool


def test_flux_grid_reads_positions_not_the_token_count() -> None:
    tiny = TINY["FluxTransformer2DModel"]
    inputs = tiny.inputs(size=1)
    assert describe(tiny.model()).layout(tiny.model(), inputs).grid == (1, 6, 4)
    appended = {**inputs, "hidden_states": torch.randn(1, 30, 4)}
    with pytest.raises(SeamError, match=r"30 image tokens are not one 1 x 6 x 4 grid"):
        describe(tiny.model()).layout(tiny.model(), appended)


def test_a_subclass_of_a_known_class_is_known() -> None:
    base = type(TINY["DiTTransformer2DModel"].model())
    derived = type("TunedDiT", (base,), {})
    model = TINY["DiTTransformer2DModel"].model()
    model.__class__ = derived
    assert describe(model).name == "DiTTransformer2DModel"


def test_unknown_class_is_refused_with_its_name_and_the_nearest() -> None:
    class FluxTransformer3DModel(nn.Module):
        pass

    with pytest.raises(UnsupportedModelError, match=r"FluxTransformer3DModel.*FluxTransformer2DModel"):
        ditkit.apply(FluxTransformer3DModel())


@every_class
def test_identity_is_bit_equal(tiny: Tiny) -> None:
    model, inputs = tiny.model(), tiny.inputs(batch=2)
    with torch.no_grad():
        dense = output(model(**inputs))
        with ditkit.apply(model):
            counted, again = output(model(**inputs)), output(model(**inputs))
        after = output(model(**inputs))
    assert dense.abs().max() > 0
    for other in (counted, again, after):
        assert torch.equal(dense, other)
