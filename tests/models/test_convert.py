"""Conversion of authors' checkpoints: nothing unsafe is run, nothing is guessed, nothing is half written."""

from __future__ import annotations

import argparse
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditkit.models.convert import convert
from ditkit.models.dit import DiT, SiT
from ditkit.models.weight_files import ConversionError
from ditkit.registry import UnknownNameError

TINY: dict[str, Any] = dict(
    input_size=6, patch_size=3, in_channels=2, hidden_size=16, depth=2, num_heads=4, num_classes=7
)
HEADS = {"num_heads": 4}


def weights(seed: int = 0, **config: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = DiT(**{**TINY, **config}).state_dict()
    return {name: torch.randn_like(value) for name, value in state.items()}


def assert_equal(model: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(weights(), tmp_path / "source.pt")
    return tmp_path / "source.pt"


def refused(source: Path, match: str, arch: str | None = "dit", **options: Any) -> None:
    """Conversion fails, and leaves nothing behind."""
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(ConversionError, match=match):
        convert(source, arch, source.parent / "out", **{"config": HEADS, **options})
    assert sorted(source.parent.rglob("*")) == before


class TestRoundTrip:
    @pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".legacy.pt"])
    @pytest.mark.parametrize(
        "change",
        [
            {},
            {"learn_sigma": False},
            {"mlp_ratio": 2.0},
            {"input_size": 12},
            {"in_channels": 3, "patch_size": 2},
        ],
    )
    def test_bit_equal_and_dimensions_from_the_shapes(self, tmp_path: Path, suffix: str, change: Any) -> None:
        state, source = weights(**change), tmp_path / f"source{suffix}"
        if suffix == ".safetensors":
            save_file(state, source)
        else:
            torch.save(state, source, _use_new_zipfile_serialization="legacy" not in suffix)
        done = convert(source, "dit", tmp_path / "new" / "out", config=HEADS)
        model = DiT.from_pretrained(done.output)
        assert_equal(model, state)
        for name, value in {**TINY, **change}.items():
            assert model.config[name] == done.config[name] == value
        assert done.weights == "only" and done.architecture == "dit"
        assert done.parameters == sum(value.numel() for value in state.values())
        assert "null class" in str(done) and str(done.output) == done.as_dict()["output"]
        assert [path.name for path in done.output.parent.iterdir()] == ["out"]

    def test_what_the_shapes_do_not_tell_can_be_given(self, tmp_path: Path) -> None:
        source = tmp_path / "source.safetensors"
        state = weights(input_size=(6, 9), class_dropout_prob=0.0)
        save_file(state, source)
        told = {**HEADS, "input_size": [6, 9], "num_classes": 7}
        model = SiT.from_pretrained(convert(source, "sit", tmp_path / "out", config=told).output)
        assert_equal(model, state)
        assert model.config["class_dropout_prob"] == 0

    def test_wrapped_names(self, tmp_path: Path) -> None:
        torch.save({f"module.{name}": value for name, value in weights().items()}, tmp_path / "a.pt")
        done = convert(tmp_path / "a.pt", "dit", tmp_path / "out", config=HEADS)
        assert_equal(DiT.from_pretrained(done.output), weights())

    def test_half_precision_is_kept(self, tmp_path: Path) -> None:
        torch.save({name: value.half() for name, value in weights().items()}, tmp_path / "a.pt")
        done = convert(tmp_path / "a.pt", "dit", tmp_path / "out", config=HEADS)
        saved = load_file(done.output / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(saved[name], value.half()) for name, value in weights().items())
        assert done.bytes == 2 * done.parameters

    def test_progress(self, checkpoint: Path) -> None:
        seen: list[tuple[str, int, int]] = []
        done = convert(
            checkpoint,
            "dit",
            checkpoint.parent / "out",
            config=HEADS,
            progress=lambda *news: seen.append(news),
        )
        read = [count for stage, count, _ in seen if stage == "read"]
        assert read == sorted(read) and read[-1] == done.bytes
        assert seen[-1] == ("write", done.bytes, done.bytes)


class TestTrainingCheckpoints:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        """As the authors' training scripts write it."""
        size = dict(hidden_size=384, depth=1, num_heads=6, patch_size=2, input_size=6)
        content = {
            "model": weights(1, **size),
            "ema": weights(2, **size),
            "opt": {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]},
            "args": argparse.Namespace(model="SiT-S/2", num_classes=7, results_dir="results"),
        }
        torch.save(content, tmp_path / "0100000.pt")
        return tmp_path / "0100000.pt"

    @pytest.mark.parametrize(("which", "seed"), [("model", 1), ("ema", 2)])
    def test_set_and_architecture(self, source: Path, which: Any, seed: int) -> None:
        done = convert(source, None, source.parent / "out", which, config={"depth": 1})
        model = SiT.from_pretrained(done.output)  # the options name the family, the width gives the heads
        expected = weights(seed, hidden_size=384, depth=1, num_heads=6, patch_size=2, input_size=6)
        assert_equal(model, expected)
        assert (done.weights, model.config["num_heads"]) == (which, 6)

    def test_named_variant_must_fit(self, source: Path) -> None:
        refused(source, r"missing: blocks\.1\..* and \d+ more", None, config={})

    def test_set_that_is_not_there(self, tmp_path: Path) -> None:
        torch.save({"model": weights()}, tmp_path / "a.pt")
        refused(tmp_path / "a.pt", "no 'ema' weights; it has model")

    def test_family_is_assumed_aloud(self, checkpoint: Path) -> None:
        done = convert(checkpoint, None, checkpoint.parent / "out", config=HEADS)
        assert any("a DiT was assumed" in note for note in done.notes)


class TestKeys:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"blocks.1.mlp.fc1.bias": None}, r"missing: blocks\.1\.mlp\.fc1\.bias$"),
            ({"blocks.0.norm1.weight": torch.ones(16)}, r"unexpected: blocks\.0\.norm1\.weight$"),
            ({"blocks.99999.x": torch.ones(1)}, r"unexpected: blocks\.99999\.x$"),
            (
                {"blocks.0.attn.proj.bias": torch.ones(3)},
                r"mis-shaped: blocks\.0\.attn\.proj\.bias \(3,\), expected \(16,\)",
            ),
            ({"x_embedder.proj.weight": None}, "hidden_size can't be told"),
            ({"pos_embed": None}, "input_size can't be told"),
            ({"y_embedder.embedding_table.weight": None}, "num_classes can't be told"),
            ({"x_embedder.proj.weight": torch.ones(0, 2, 3, 3)}, "hidden_size can't be told"),
            ({"epoch": 3}, "not tensors: epoch"),
            ({7: torch.ones(1)}, "not tensors: 7"),
            ({"pos_embed": torch.ones(1, 4, 16).to_sparse()}, "not tensors: pos_embed"),
        ],
    )
    def test_listed(self, tmp_path: Path, change: dict[Any, Any], message: str) -> None:
        state = {**weights(), **change}
        torch.save({name: value for name, value in state.items() if value is not None}, tmp_path / "a.pt")
        refused(tmp_path / "a.pt", message)

    def test_heads_of_an_unknown_width(self, checkpoint: Path) -> None:
        refused(checkpoint, "num_heads can't be told.*width of 16", config={})
        refused(checkpoint, "num_heads=5", config={"num_heads": 5})

    def test_arguments(self, checkpoint: Path) -> None:
        out = checkpoint.parent / "out"
        with pytest.raises(UnknownNameError, match="'dit'"):
            convert(checkpoint, "dti", out)
        refused(checkpoint, "no variant 'xxl/2'", "dit-xxl/2")
        refused(checkpoint, "not 'ema' or 'model'", weights="average")
        with pytest.raises(FileNotFoundError, match="nowhere"):
            convert(checkpoint.parent / "nowhere.pt", "dit", out)
        out.mkdir()
        (out / "mine.txt").write_text("keep")
        with pytest.raises(FileExistsError, match="out"):
            convert(checkpoint, "dit", out, config=HEADS)
        assert [path.name for path in out.iterdir()] == ["mine.txt"]

    def test_empty_output_folder_is_used(self, checkpoint: Path) -> None:
        (checkpoint.parent / "out").mkdir()
        assert DiT.from_pretrained(convert(checkpoint, "dit", checkpoint.parent / "out", config=HEADS).output)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.command = f"touch {canary}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class TestHostileFiles:
    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("place", ["alone", "value", "key", "options", "optimizer"])
    def test_nothing_is_run(self, tmp_path: Path, place: str, zipped: bool) -> None:
        canary = tmp_path / "canary"
        payload: Any = Payload(canary)
        run, arguments = payload.__reduce__()
        assert run(*arguments) == 0 and canary.exists()  # the payload is live
        canary.unlink()
        content = {
            "alone": payload,
            "value": {**weights(), "x": payload},
            "key": {**weights(), payload: torch.ones(1)},
            "options": {"ema": weights(), "args": argparse.Namespace(model=payload)},
            "optimizer": {"ema": weights(), "opt": payload},
        }[place]
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        refused(tmp_path / "a.pt", "refused.*posix.system whose module posix is blocked")
        assert not canary.exists()

    def test_compressed(self, checkpoint: Path) -> None:
        packed = checkpoint.with_name("packed.pt")
        with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        refused(packed, "compressed")

    def test_views_that_repeat_a_few_values(self, tmp_path: Path) -> None:
        torch.save({**weights(), "pos_embed": torch.ones(1).expand(1, 2**40, 16)}, tmp_path / "a.pt")
        refused(tmp_path / "a.pt", "more than twice its own size")

    def test_not_a_checkpoint(self, tmp_path: Path) -> None:
        for content, message in (([torch.ones(2)], "holds a list"), ({}, "it is empty")):
            torch.save(content, tmp_path / "a.pt")
            refused(tmp_path / "a.pt", message)
        (tmp_path / "a.pt").write_text("hello")
        refused(tmp_path / "a.pt", "refused")
        (tmp_path / "a.safetensors").write_text("hello")
        refused(tmp_path / "a.safetensors", "not a readable safetensors")

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data(), suffix=st.sampled_from([".pt", ".safetensors"]))
    def test_damaged(self, tmp_path: Path, data: st.DataObject, suffix: str) -> None:
        """Cut or overwritten anywhere: converted (when only numbers changed) or refused, never a crash."""
        source, out = tmp_path / f"source{suffix}", tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        small = weights(hidden_size=4, depth=1, num_heads=1, in_channels=1)
        save_file(small, source) if suffix == ".safetensors" else torch.save(small, source)
        content = bytearray(source.read_bytes())
        start = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            del content[start:]
        else:
            noise = data.draw(st.binary(min_size=1, max_size=40))
            content[start : start + len(noise)] = noise
        source.write_bytes(content)
        try:
            convert(source, "dit", out, config={"num_heads": 1})
        except ConversionError:
            assert not out.exists()
        assert not list(tmp_path.glob(".*"))


def test_failed_save_leaves_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: DiT, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(DiT, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        convert(checkpoint, "dit", checkpoint.parent / "out", config=HEADS)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
