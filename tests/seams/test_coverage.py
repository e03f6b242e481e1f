"""Every transformer class of diffusers is in one of the two tables, and the page shows them."""

from __future__ import annotations

from pathlib import Path

import diffusers.models.controlnets
import diffusers.models.transformers
import pytest
from torch import nn

import ditkit
from ditkit.seams.anatomy import describe
from ditkit.seams.coverage import markdown, rows
from ditkit.seams.errors import UnsupportedModelError
from ditkit.seams.facts import FACTS, UNSUPPORTED

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


_PARTS = ("SparseControlNetConditioningEmbedding",)


def classes(package: object) -> set[str]:
    return {
        name
        for name, thing in vars(package).items()
        if isinstance(thing, type) and issubclass(thing, nn.Module) and name not in _PARTS
    }


def test_every_transformer_of_diffusers_is_in_exactly_one_table() -> None:
    found = classes(diffusers.models.transformers)
    assert len(found) >= 75
    assert not set(FACTS) & set(UNSUPPORTED)
    assert found - set(FACTS) - set(UNSUPPORTED) == set()
    # Our own DiT is the only class with facts that diffusers does not have.
    assert set(FACTS) - found == {"DiT"}
    assert len(FACTS) - 1 >= 60


def test_other_models_that_are_named_exist() -> None:
    named = set(UNSUPPORTED) - classes(diffusers.models.transformers)
    controlnets = classes(diffusers.models.controlnets)
    assert controlnets <= named
    for name in named - controlnets - {"UTransformer2DModel"}:  # a part of UniDiffuserModel, not exported
        assert hasattr(diffusers, name), name


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_class_is_refused_with_its_reason(name: str) -> None:
    model = type(name, (nn.Module,), {})()
    derived = type("Tuned", (type(model),), {})()
    for one in (model, derived):
        with pytest.raises(UnsupportedModelError, match=type(one).__name__) as refusal:
            describe(one)
        assert UNSUPPORTED[name] in str(refusal.value)
    with pytest.raises(UnsupportedModelError):
        ditkit.apply(model)


def test_reasons_are_sentences_without_an_end() -> None:
    reasons = [*UNSUPPORTED.values(), *(reason for row in rows() for reason in row.refused.values())]
    for reason in reasons:
        assert len(reason) > 20
        assert not reason.endswith(".")


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "run scripts/render_models.py"
