"""The comparison on a tiny FluxPipeline: what it counts is true, what it compares is the same noise."""

from __future__ import annotations

import csv
import itertools
import json

import numpy as np
import pytest
import torch

import ditkit
import tiny_pipelines
from ditkit.analysis import bench as module
from ditkit.analysis import contestants as who
from ditkit.analysis import peers as others
from ditkit.analysis.bench import bench
from ditkit.analysis.meter import count
from ditkit.analysis.sampling import Sampling, sample
from ditkit.models.dydit import dynamic

PROMPTS = ["red apple", "blue fish"]
SAMPLING = Sampling(steps=8, guidance=2.0)
LAST_BLOCK = "taylorseer:interval=3,granularity=last-block"
MODULE = "taylorseer:interval=3"
AS_DIFFUSERS = "taylorseer:interval=3,schedule=diffusers"


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipelines.flux()


@pytest.fixture(scope="module")
def result(pipe):
    return bench(pipe, [LAST_BLOCK, MODULE, AS_DIFFUSERS], PROMPTS, sampling=SAMPLING, repeats=2)


@pytest.fixture(scope="module")
def rows(result):
    return {row.label: row for row in result.rows}


def peer(rows, form: str = ""):
    return rows[f"diffusers TaylorSeer, interval 3{form}"]


def test_who_takes_part(result) -> None:
    kinds = [row.kind for row in result.rows if not row.label.startswith("cache-dit")]
    assert kinds == ["dense", *["method"] * 3, *["peer"] * 3, "plain", "plain"]
    assert result.rows[0].label == "dense"
    assert [row.label for row in result.rows[1:4]] == [
        "taylorseer:interval=3,granularity=last-block",
        MODULE,
        AS_DIFFUSERS,
    ]


def test_dense_is_the_measure(rows) -> None:
    dense = rows["dense"]
    assert dense.time_ratio == dense.flops_ratio == 1.0
    assert dense.latent_error == dense.picture_error == 0.0
    assert dense.bytes_cached == 0
    assert dense.steps == dense.steps_computed == 8


def test_steps_are_counted(rows) -> None:
    """Warm-up 0, 1, 2, then every third step; diffusers' schedule has 0, 1, 2, 4, 7."""
    assert rows[MODULE].steps_computed == rows[LAST_BLOCK].steps_computed == 4
    assert peer(rows).steps_computed == rows[AS_DIFFUSERS].steps_computed == 5
    assert rows["plain, 5 steps"].steps == 5
    assert rows["plain, 4 steps"].steps_computed == 4


def test_flops_follow_the_steps(rows) -> None:
    assert 4 / 8 < rows[LAST_BLOCK].flops_ratio < 4 / 8 + 0.03
    assert rows[LAST_BLOCK].flops_ratio < rows[MODULE].flops_ratio < 4 / 8 + 0.06
    assert rows["plain, 4 steps"].flops_ratio == pytest.approx(4 / 8, abs=1e-6)
    assert peer(rows).flops_ratio > peer(rows, ", attention and MLP").flops_ratio


def test_our_hooks_and_theirs_agree(rows) -> None:
    """At diffusers' schedule, its hook on the modules of the paper and ours are one method, seen twice."""
    ours, theirs = rows[AS_DIFFUSERS], peer(rows, ", attention and MLP")
    assert ours.flops == pytest.approx(theirs.flops, rel=1e-3)
    assert ours.latent_error == pytest.approx(theirs.latent_error, rel=1e-3)
    assert ours.bytes_cached == pytest.approx(theirs.bytes_cached, rel=0.02)


def test_bytes(rows) -> None:
    """Factors of order 0 and 1 of two guidance passes, in float32; 16 image and 8 text tokens, width 32."""
    tensor = len(PROMPTS) * 32 * 4
    in_double = 2 * (16 + 8) * tensor  # attention gives both streams, each feed-forward its own
    in_single = (16 + 8) * tensor
    module_bytes = 2 * 2 * (2 * in_double + 2 * in_single)
    assert rows[MODULE].bytes_cached == pytest.approx(module_bytes, rel=0.02)
    assert rows[LAST_BLOCK].bytes_cached < rows[MODULE].bytes_cached / 5
    assert rows[MODULE].bytes_peak > rows["dense"].bytes_peak


def test_pictures_and_seconds(result) -> None:
    for row in result.rows:
        assert result.pictures[row.label].shape == (2, 16, 16, 3)
        assert len(row.seconds_all) == 2
        assert min(row.seconds_all) <= row.seconds <= max(row.seconds_all)
    dense = result.pictures["dense"]
    assert not np.array_equal(dense, result.pictures[MODULE])


def test_nothing_stays_on_the_pipeline(pipe, result) -> None:
    again = sample(pipe, PROMPTS, SAMPLING)
    assert np.array_equal(again.pictures, result.pictures["dense"])


def test_json_and_csv(result, tmp_path) -> None:
    found = json.loads(result.to_json(tmp_path / "r.json").read_text())
    assert found["prompts"] == PROMPTS
    assert found["settings"]["steps"] == 8
    assert found["machine"]["threads"] >= 1
    assert found["rows"][0]["latent_psnr"] is None  # infinite
    assert found["rows"][1]["latent_error"] == result.rows[1].latent_error
    with result.to_csv(tmp_path / "r.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [line["label"] for line in table] == [row.label for row in result.rows]
    assert float(table[1]["flops"]) == result.rows[1].flops
    assert len(table[0]["seconds_all"].split()) == 2


def test_runs_are_interleaved(pipe, monkeypatch) -> None:
    order: list[str] = []
    draw = module._draw
    monkeypatch.setattr(module, "_draw", lambda p, e, *rest: (order.append(e.row.label), draw(p, e, *rest)))
    bench(pipe, [MODULE], PROMPTS[:1], sampling=Sampling(4), repeats=3, peers=False, plain=False)
    assert order == ["dense", MODULE] * 3


def test_progress_and_judge(pipe) -> None:
    seen: list[tuple[str, int, int]] = []

    def judge(pictures, prompts) -> float:
        assert pictures.shape[0] == len(prompts) == 2
        return 0.5

    result = bench(
        pipe,
        [LAST_BLOCK],
        PROMPTS,
        sampling=Sampling(4),
        repeats=1,
        peers=False,
        judge=judge,
        progress=lambda *news: seen.append(news),
    )
    assert {row.accuracy for row in result.rows} == {0.5}
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(seen))
    assert seen[-1][1] == seen[-1][2]


def test_methods_together_and_as_objects(pipe) -> None:
    both = [ditkit.TaylorSeer(interval=3, granularity="last-block"), ditkit.LocalWindow(radius=2)]
    result = bench(
        pipe,
        [both, f"{LAST_BLOCK}+local-window:radius=2"],
        PROMPTS,
        sampling=SAMPLING,
        repeats=1,
        peers=False,
    )
    one, other = (row for row in result.rows if row.kind == "method")
    assert one.label == other.label == f"{LAST_BLOCK} + local-window:radius=2"
    assert one.latent_error == other.latent_error
    assert one.flops < result.rows[0].flops


def test_a_peer_that_fails_is_a_finding(pipe, monkeypatch) -> None:
    def fail(*_):
        raise RuntimeError("not for this model")

    monkeypatch.setattr(others, "at_intervals", lambda *_: [who.Contestant("other", "peer", fail)])
    result = bench(pipe, [MODULE], PROMPTS[:1], sampling=Sampling(4), repeats=1)
    row = next(row for row in result.rows if row.kind == "peer")
    assert row.notes == ["did not run: RuntimeError: not for this model"]
    assert row.seconds is None
    assert "other" not in result.pictures


def test_a_failure_of_ours_is_an_error(pipe, monkeypatch) -> None:
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(who, "ours", lambda _: who.Contestant("mine", "method", fail))
    with pytest.raises(RuntimeError, match="broken"):
        bench(pipe, ["anything"], PROMPTS[:1], sampling=Sampling(4), repeats=1, peers=False)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"methods": ["taylorser"]}, KeyError, "taylorseer"),
        ({"methods": ["taylorseer:intervl=2"]}, ValueError, "intervl"),
        ({"methods": [()]}, ValueError, "empty sequence"),
        ({"repeats": 0}, ValueError, "repeats=0"),
        ({"prompts": []}, ValueError, "prompts is empty"),
        ({"model": object()}, TypeError, "not a object"),
    ],
)
def test_wrong_calls_before_any_work(pipe, monkeypatch, arguments, error, message) -> None:
    monkeypatch.setattr(module, "sample", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(error, match=message):
        bench(**{"model": pipe, "methods": [MODULE], "prompts": PROMPTS, **arguments})


def test_names_read_back() -> None:
    for text in (MODULE, LAST_BLOCK, "taylorseer", "local-window:radius=4"):
        (method,) = who.parse(text)
        assert who.parse(who.name_of(method)) == (method,)


@pytest.fixture
def chooses():
    """A pipeline whose transformer runs about half of its tokens, others at each step."""
    pipe = tiny_pipelines.flux()
    model = dynamic(pipe.transformer, token_bias=0.0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".token_selection.linear_t." in name:
                parameter.normal_(std=0.5)
    pipe.register_modules(transformer=model.eval())
    return pipe


def test_what_a_model_leaves_out_shows_beside_all_of_it(chooses) -> None:
    result = bench(chooses, [LAST_BLOCK], PROMPTS, sampling=SAMPLING, repeats=1, peers=False, plain=False)
    rows = {row.label: row for row in result.rows}
    assert [row.kind for row in result.rows] == ["dense", "whole", "method"]
    whole, dense = rows["nothing left out"], rows["dense"]
    assert whole.flops is not None and dense.flops is not None
    assert whole.flops_ratio == pytest.approx(whole.flops / dense.flops) and whole.flops_ratio > 1.02
    assert whole.latent_error and whole.latent_error > 0
    static = bench(tiny_pipelines.flux(), [], PROMPTS, sampling=SAMPLING, repeats=1, peers=False, plain=False)
    assert whole.flops == static.rows[0].flops
    assert dense.steps_computed is None and rows[LAST_BLOCK].steps_computed == 4
    assert chooses.transformer.choosing is None


def test_a_report_counts_every_forward_of_a_model_that_chooses(chooses) -> None:
    with ditkit.apply(chooses, *who.parse(LAST_BLOCK)) as run, count(chooses.transformer) as spent:
        sample(chooses, PROMPTS, SAMPLING)
    report = run.report()
    full = [flops for flops in spent.flops_by_forward if flops > 0.5 * max(spent.flops_by_forward)]
    assert len(full) == 8 and len(set(full)) > 2, "its steps differ"
    assert report.flops == spent.flops
    assert report.flops_dense == pytest.approx(sum(full) / len(full) * len(spent.flops_by_forward), rel=1e-6)
