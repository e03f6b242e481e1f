"""Sizes counted without memory, beside the published ones."""

from __future__ import annotations

import pytest

from ditkit.models.sizes import PUBLISHED, measure, named
from ditkit.registry import entries


def test_every_published_size_is_of_a_named_configuration() -> None:
    known = {name for architecture in entries("model") for name in named(architecture)}
    assert set(PUBLISHED) <= known


@pytest.mark.parametrize(
    "name", ["dit-s/8", "lit-s/8", "pt-dit-s-class", "dimr-xl/2r", "d2it-b", "d2it-grain"]
)
def test_counted(name: str) -> None:
    size, published = measure(name), PUBLISHED.get(name)
    assert size.parameters is not None and size.parameters > 1e6
    if published is not None and published.multiply_adds is not None:
        assert size.parameters == pytest.approx(published.parameters, rel=1e-3)
        assert size.multiply_adds == pytest.approx(published.multiply_adds, rel=0.02)


def test_the_size_of_the_latent_counts() -> None:
    small, large = (measure("dico-s", input_size=side).multiply_adds for side in (16, 32))
    assert small is not None and large is not None
    assert large == pytest.approx(4 * small, rel=0.01)
    assert measure("dico-s", input_size=16).parameters == PUBLISHED["dico-s"].parameters


def test_text_is_counted_where_a_model_reads_it() -> None:
    with_text, without = (
        measure("pt-dit-b", depth=1, input_size=32, caption_channels=channels) for channels in (16, None)
    )
    assert with_text.multiply_adds > without.multiply_adds
