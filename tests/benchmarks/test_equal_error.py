"""What the comparisons read off their curves, and the draws of the held-out test, on numbers made up."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from benchmarks.methods import equal_error, pairs, tune
from ditkit.analysis.contestants import Contestant
from ditkit.analysis.selection import Outcome
from ditkit.analysis.tune import Trial
from ditkit.recipes import Recipe


def entry(family: str, kind: str, ratio: float, error: float, flops: float = math.nan):
    contestant = Contestant(f"{family} {ratio:g}", "method", lambda *_: pytest.fail("nothing is drawn"))
    return equal_error.Entry(family, kind, contestant, error, ratio, flops)


def test_time_at_an_error() -> None:
    front = [entry("a", "ours", ratio, error) for ratio, error in ((0.2, 0.1), (0.4, 0.01), (0.8, 0.001))]
    assert equal_error.at(front, 0.01) == pytest.approx(0.4)
    assert equal_error.at(front, math.sqrt(0.1 * 0.01)) == pytest.approx(0.3)
    assert equal_error.at(front, 0.5) == pytest.approx(0.2)
    assert equal_error.at(front, 0.0001) is None


def test_what_beats_whom() -> None:
    found = {
        "plain sampling": [entry("plain sampling", "plain", 0.9, 0.01, 0.9)],
        "theirs": [entry("theirs", "peer", 0.6, 0.005), entry("theirs", "peer", 0.55, 0.04)],
        "ours": [entry("ours", "ours", 0.4, 0.005, 0.3)],
        "tuned recipes": [entry("tuned recipes", "tuned", 0.3, 0.005)],
    }
    claims = {claim.claim: claim for claim in equal_error.time_claims(found, "here")}
    at_5 = [claim for text, claim in claims.items() if "error 0.05" in text]
    assert [claim.holds for claim in at_5] == [0.55 / 0.4 >= 1.3, False]
    assert "1.38 times: ours 0.400 of dense, theirs 0.550" in at_5[0].measured
    assert "1.33 times" in at_5[1].measured


def test_who_does_not_reach_an_error_has_lost() -> None:
    ours, theirs = entry("ours", "ours", 0.4, 0.03), entry("theirs", "peer", 0.9, 0.015)
    claims = equal_error.time_claims({"ours": [ours], "theirs": [theirs]}, "here")
    assert [claim.holds for claim in claims] == [False, True]  # at 0.02, and at 0.05; nobody reaches 0.01
    assert "none reaches it" in claims[0].measured


def test_plain_sampling_at_equal_flops() -> None:
    plain = [entry("plain sampling", "plain", f, e, f) for f, e in ((0.2, 0.1), (0.4, 0.01))]
    assert equal_error.plain_error(plain, 0.3) == pytest.approx(math.sqrt(0.1 * 0.01))
    assert equal_error.plain_error(plain, 0.5) is None
    assert equal_error.plain_error(plain, 1.0) == 0
    worse, better = (entry("x", "ours", 0.5, e, 0.7) for e in (0.02, 0.001))
    (claim,) = equal_error.work_claims(
        {"plain sampling": plain, "worse": [worse], "better": [better]}, "here"
    )
    assert claim.system == "worse" and not claim.holds
    good, bad = (entry(n, "ours", 0.5, e, 0.3) for n, e in (("good", 0.005), ("bad", 0.05)))
    claims = equal_error.work_claims({"plain sampling": plain, "good": [good], "bad": [bad]}, "here")
    assert {claim.system: claim.holds for claim in claims} == {"good": True, "bad": False}


def test_settings_around_the_wanted_errors() -> None:
    front = [entry("a", "ours", 1 - error, error) for error in (0.001, 0.009, 0.011, 0.012, 0.19)]
    kept = {e.error for e in equal_error.around(front, (0.01,), beside=1)}
    assert kept == {0.009, 0.011}
    assert {e.error for e in equal_error.around(front, (0.01,))} == {0.001, 0.009, 0.011, 0.012}


def test_grids_hold_valid_settings() -> None:
    from ditkit import registry

    tried = equal_error.grid("taylorseer", 20)
    assert len(tried) == 20
    assert tried == equal_error.grid("taylorseer", 20)
    for options in tried:
        registry.construct("method", "taylorseer", options)
    thresholds = {options["threshold"] for options in equal_error.grid("cg-taylor", 10_000)}
    assert len(thresholds) == 8
    assert min(thresholds) == pytest.approx(0.01)
    assert max(thresholds) == pytest.approx(0.6)


def test_draws_never_test_on_what_they_chose_by() -> None:
    random = np.random.default_rng(0)
    ratios = np.linspace(0.2, 0.9, 15)
    errors = 0.05 * np.exp(-3 * ratios)[:, None] * random.lognormal(0, 0.3, size=(15, 64))
    trials = [Trial(i, Recipe(steps=i + 1), Outcome(r, (0.0,))) for i, r in enumerate(ratios)]
    found = tune.draws(trials, errors, 0.02, 40)
    assert found["kept"] >= 38
    assert found["kept"] > found["kept_without_margin"]
    assert found["slower_than_dense"] == 0
    nothing = tune.draws(trials, errors, 1e-6, 5)
    assert (nothing["found"], nothing["kept"]) == (0, 5)


def test_a_refused_pair_is_named() -> None:
    said = "TaylorSeer(interval=3) and CGTaylor() both claim the blocks seam; apply only one of them"
    pair = ("taylorseer", "cg-taylor")
    (claim,) = pairs.claims({}, {pair: said}, 1.0, "here")
    assert claim.holds
    (claim,) = pairs.claims({}, {pair: "TaylorSeer() can't be applied"}, 1.0, "here")
    assert not claim.holds


@pytest.mark.parametrize(("together", "holds"), [(0.05, True), (0.07, False)])
def test_a_pair_that_works(together: float, holds: bool) -> None:
    single = {name: pairs.Found(error, 1.0, 1.0, True) for name, error in (("a", 0.01), ("b", 0.02))}
    found = pairs.Found(together, 0.5, 1.0, True)
    (claim,) = pairs.claims(single, {("a", "b"): found}, 2.0, "here")
    assert claim.holds == holds
    assert "time 0.25 of dense (alone 0.50 and 0.50)" in claim.measured


def test_models_stand_side_by_side_in_one_file(tmp_path) -> None:
    path = tmp_path / "found.json"
    claims = {
        name: {
            "system": "s",
            "claim": f"{name} is fast",
            "source": "us",
            "measured": "1",
            "holds": True,
            "limit": "",
        }
        for name in ("a", "b", "again")
    }
    for model, name in (("one", "a"), ("other", "b"), ("one", "again")):
        equal_error.keep(path, model, {"claims": [claims[name]], "figures": {}}, {"threads": 1})
    found = json.loads(path.read_text())
    assert [claim["claim"] for claim in found["claims"]] == ["again is fast", "b is fast"]
    assert set(found["models"]) == {"one", "other"}
