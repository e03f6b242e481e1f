"""Cached latents: what they hold, work that stops and goes on, damage that is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from ditkit.data import latent_cache
from ditkit.data.config import DataConfig
from ditkit.data.latent_cache import CacheOptions, cache_latents
from ditkit.data.latents import LatentCacheError, LatentSet, open_samples
from ditkit.data.pictures import class_labels, open_pictures
from ditkit.training.tasks.latents import encode_pictures

FIVES = CacheOptions(shard_size=5, batch=2)


def config(tree: Path) -> DataConfig:
    return DataConfig(kind="folder", path=tree, size=16, split="all")


@pytest.fixture
def cached(tree: Path, autoencoder: Path, tmp_path: Path) -> Path:
    return cache_latents(config(tree), autoencoder, tmp_path / "latents", FIVES)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("latents-*")}


def test_latents_are_those_of_the_pictures(cached: Path, tree: Path, autoencoder: Path) -> None:
    found = LatentSet(cached)
    pictures = open_pictures(config(tree))
    network = AutoencoderKL.from_pretrained(autoencoder)
    expected = encode_pictures(network, pictures.images())
    torch.testing.assert_close(found.latents(), expected, atol=1e-5, rtol=1e-5)
    assert found.captions == pictures.captions
    labels, classes = class_labels(found)
    assert (labels.tolist(), classes) == (class_labels(pictures)[0].tolist(), ["blue", "green", "red"])
    assert torch.equal(found.latents([3, 1]), found.latents()[[3, 1]])
    copy = AutoencoderKL.from_pretrained(found.autoencoder)
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), network.parameters(), strict=True))


def test_the_manifest(cached: Path, tmp_path: Path) -> None:
    text = (cached / "manifest.json").read_text()
    facts = json.loads(text)
    assert [shard["count"] for shard in facts["shards"]] == [5, 5, 2] and facts["count"] == 12
    assert facts["autoencoder"]["scaling_factor"] == 0.5 and facts["class_names"] == ["blue", "green", "red"]
    assert str(tmp_path) not in text + (cached / "autoencoder" / "config.json").read_text()


def test_no_pictures_are_needed(cached: Path, tree: Path) -> None:
    for file in tree.rglob("*.png"):
        file.unlink()
    assert len(LatentSet(cached)) == 12


def test_splits_are_those_of_the_pictures(autoencoder: Path, tmp_path: Path) -> None:
    data = DataConfig(groups=["keycap", "flag"], size=64)
    cache_latents(data, autoencoder, tmp_path / "latents")
    for split in ("train", "heldout", "all"):
        cached = open_samples(DataConfig(kind="latents", path=tmp_path / "latents", split=split))
        assert cached.captions == open_pictures(data, split).captions
        assert cached.classes == open_pictures(data, split).classes


def test_half_precision(tree: Path, autoencoder: Path, cached: Path, tmp_path: Path) -> None:
    folder = cache_latents(config(tree), autoencoder, tmp_path / "half", CacheOptions(dtype="float16"))
    found, whole = LatentSet(folder).latents(), LatentSet(cached).latents()
    assert found.dtype == torch.float32 and not torch.equal(found, whole)
    torch.testing.assert_close(found, whole, atol=2e-3, rtol=2e-3)


class TestGoingOn:
    def test_finished_shards_are_kept(
        self, tree: Path, autoencoder: Path, tmp_path: Path, monkeypatch, cached: Path
    ) -> None:
        out = tmp_path / "again"
        encode, calls = latent_cache._encode_shard, []

        def dies(*arguments):
            calls.append(arguments[1])
            if len(calls) == 2:
                raise KeyboardInterrupt
            return encode(*arguments)

        monkeypatch.setattr(latent_cache, "_encode_shard", dies)
        with pytest.raises(KeyboardInterrupt):
            cache_latents(config(tree), autoencoder, out, FIVES)
        with pytest.raises(LatentCacheError, match="goes on where it stopped"):
            LatentSet(out)
        before = times(out)
        cache_latents(config(tree), autoencoder, out, FIVES)
        assert calls == ["latents-00000", "latents-00001", "latents-00001", "latents-00002"]
        assert before.items() <= times(out).items()
        assert torch.equal(LatentSet(out).latents(), LatentSet(cached).latents())
        assert not list(out.glob(".ditkit-*"))

    def test_other_latents_are_not_mixed(
        self, cached: Path, tree: Path, autoencoder: Path, tmp_path: Path
    ) -> None:
        (tree / "red" / "red_square-0.png").rename(tree / "red" / "crimson.png")
        with pytest.raises(LatentCacheError, match=r"names_sha256.*choose another --out"):
            cache_latents(config(tree), autoencoder, cached, FIVES)
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "file").write_text("x")
        with pytest.raises(LatentCacheError, match="other files"):
            cache_latents(config(tree), autoencoder, tmp_path / "taken", FIVES)


class TestDamage:
    @pytest.mark.parametrize("suffix", [".safetensors", ".json"])
    @pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
    def test_a_damaged_shard_is_named_and_made_anew(
        self, cached: Path, tree: Path, autoencoder: Path, suffix: str, how: str
    ) -> None:
        whole = LatentSet(cached).latents()
        file = cached / f"latents-00001{suffix}"
        content = bytearray(file.read_bytes())
        content[-20] ^= 1
        if how == "gone":
            file.unlink()
        else:
            file.write_bytes(bytes(content) if how == "flipped" else bytes(content[: len(content) // 2]))
        with pytest.raises(
            LatentCacheError, match=rf"latents-00001\{suffix}.*run the same `ditkit data"
        ) as error:
            LatentSet(cached)
        assert "00000" not in str(error.value)
        before = times(cached)
        cache_latents(config(tree), autoencoder, cached, FIVES)
        assert torch.equal(LatentSet(cached).latents(), whole)
        kept = {name for name, time in times(cached).items() if before.get(name) == time}
        assert kept >= {f"latents-0000{i}{s}" for i in (0, 2) for s in (".safetensors", ".json")}

    def test_the_manifest_is_checked_too(self, cached: Path) -> None:
        (cached / "manifest.json").write_text("{")
        with pytest.raises(LatentCacheError, match=r"manifest\.json is damaged"):
            LatentSet(cached)
        (cached / "manifest.json").write_text('{"format": 99, "shards": []}')
        with pytest.raises(LatentCacheError, match="format 99"):
            LatentSet(cached)
        with pytest.raises(FileNotFoundError, match="no folder of latents"):
            LatentSet(cached / "nowhere")


def test_damaged_pictures_are_left_out(tree: Path, autoencoder: Path, tmp_path: Path, caplog) -> None:
    (tree / "green" / "bad.png").write_bytes(b"x")
    found = LatentSet(cache_latents(config(tree), autoencoder, tmp_path / "latents", FIVES))
    assert len(found) == 12 and "green/bad.png" in caplog.text


def test_only_an_autoencoder_encodes(tree: Path, autoencoder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no autoencoder"):
        cache_latents(config(tree), tmp_path / "nowhere", tmp_path / "latents")
    (autoencoder / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(LatentCacheError, match="VQModel"):
        cache_latents(config(tree), autoencoder, tmp_path / "latents")
