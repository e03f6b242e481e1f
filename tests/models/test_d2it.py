"""D2iT: grains, the autoencoder, the correction of fine regions, the losses, the map of grains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import CASES, inputs
from ditkit import models
from ditkit.models.d2it import D2iT, GrainTransformer, dynamic_grain_loss
from ditkit.models.d2it_autoencoder import (
    DualGrainAutoencoder,
    copy_neighbours,
    fit_threshold,
    multi_grained_noise,
    region_entropy,
    share_in_regions,
)

TINY_VAE: dict[str, Any] = dict(
    ch=8, ch_mult=(1, 1, 2), decoder_ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), resolution=16
)
GRAIN = torch.tensor([[[1, 0], [0, 1]], [[0, 0], [0, 0]], [[1, 1], [1, 1]]]).bool()


class TestGrains:
    def test_detail_has_entropy(self) -> None:
        images = -torch.ones(1, 3, 16, 32)
        images[..., 16:] = torch.rand(1, 1, 16, 16) * 2 - 1
        flat, detailed = region_entropy(images)[0, 0].tolist()
        assert flat < 1e-6 and detailed > 2
        with pytest.raises(ValueError, match="regions of side 16"):
            region_entropy(torch.zeros(1, 3, 20, 16))

    @pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
    def test_threshold_gives_the_ratio(self, ratio: float) -> None:
        entropies = torch.rand(400)
        threshold = fit_threshold([entropies[:100], entropies[100:]], ratio)
        assert (entropies > threshold).float().mean().item() == pytest.approx(ratio, abs=0.01)
        with pytest.raises(ValueError, match="fine_ratio=1"):
            fit_threshold(entropies, 1)

    def test_cells_of_a_coarse_region_are_alike(self) -> None:
        coarse, fine = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 4, 4)
        codes = copy_neighbours(coarse, fine, GRAIN)
        noisy = codes + multi_grained_noise(torch.randn(3, 2, 4, 4), GRAIN)
        for values in (codes, noisy, share_in_regions(torch.randn(3, 2, 4, 4), GRAIN)):
            regions = values.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)  # (B, z, h, w, 4)
            alike = (regions == regions[..., :1]).all(-1).all(1)
            assert torch.equal(alike, ~GRAIN)
        assert torch.equal(codes[2], fine[2])  # all fine: an ordinary fine grid

    def test_loss_counts_a_coarse_region_once(self) -> None:
        noise = torch.zeros(3, 4, 4, 4)
        prediction = noise.clone()
        prediction[:, :, :2, 2:] = 2  # one region, coarse in the first two maps
        loss = dynamic_grain_loss(prediction, noise, GRAIN)
        assert loss.tolist() == pytest.approx([4 / 10, 4 / 4, 16 / 16])


class TestAutoencoder:
    def model(self, **config: Any) -> DualGrainAutoencoder:
        torch.manual_seed(0)
        return DualGrainAutoencoder(**{**TINY_VAE, **config}).eval()

    def test_shapes_and_routing(self) -> None:
        model, images = self.model(threshold=0.5), -torch.ones(2, 3, 16, 8)
        images[1] = torch.rand(3, 16, 8) * 2 - 1
        encoded = model.encode(images)
        assert encoded.grain.shape == (2, 4, 2) and encoded.latent_dist.mean.shape == (2, 4, 8, 4)
        assert not encoded.grain[0].any() and encoded.grain[1].all()
        assert model(images).shape == images.shape
        draw = encoded.sample(torch.Generator().manual_seed(0))
        assert torch.equal(draw[0, :, 0, 0], draw[0, :, 1, 1]) and not torch.equal(
            draw[1, :, 0, 0], draw[1, :, 1, 1]
        )

    def test_noise_may_be_given(self) -> None:
        model, images = self.model(), torch.randn(3, 3, 8, 8)
        encoded, noise = model.encode(images, GRAIN), torch.randn(3, 4, 4, 4)
        spread = (encoded.sample(noise=noise) - encoded.mode()) / encoded.latent_dist.std
        torch.testing.assert_close(spread, multi_grained_noise(noise, GRAIN), atol=1e-4, rtol=1e-4)
        first, second = (model.losses(images, noise=n)["reconstruction"] for n in (noise, 0 * noise))
        assert not torch.equal(first, second)
        latent = encoded.mode()
        assert torch.equal(model.decode(latent, return_dict=False)[0], model.decode(latent).sample)

    def test_grains_may_be_given(self) -> None:
        model, images = self.model(), torch.randn(3, 3, 8, 8)
        coarse, fine = model.encoder(images)
        mean = model.encode(images, GRAIN).mode()
        assert torch.equal(mean, copy_neighbours(coarse, fine, GRAIN)[:, :4])

    def test_learns(self) -> None:
        model, images = self.model(threshold=0.5).train(), torch.rand(4, 3, 16, 16) * 2 - 1
        images[:2] = images[:2, :, :1, :1]
        first = model.losses(images)
        first["loss"].sum().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]
        assert set(first) == {"loss", "reconstruction", "kl"} and first["kl"].shape == (4,)

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        model, images = self.model(), torch.randn(1, 3, 16, 16)
        model.save_pretrained(tmp_path)
        loaded = models.load(tmp_path)
        assert torch.equal(loaded.encode(images).mode(), model.encode(images).mode())

    def test_levels_must_fit(self) -> None:
        with pytest.raises(ValueError, match="one level less"):
            self.model(decoder_ch_mult=(1, 1, 2))
        with pytest.raises(ValueError, match="one size"):
            models.create("d2it-vae-xl")


class TestContentTransformer:
    def test_near_the_published_sizes(self) -> None:
        for variant, millions in (("l", 467), ("xl", 687)):
            with torch.device("meta"):
                model = models.create(f"d2it-{variant}")
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)

    @torch.no_grad()
    def test_coarse_regions_are_alike_and_uncorrected(self) -> None:
        model = CASES["d2it"].model()
        latent, times, labels = inputs(model, 2)
        grain = torch.zeros(2, 4, 4)
        grain[0, 1, 2] = 1
        sample = model(latent, times, labels, grain=grain).sample
        for cells in (sample[0, :, :2, :2], sample[1, :, 4:6, 2:4]):
            assert torch.equal(cells, cells[:, :1, :1].expand_as(cells))
        assert not torch.equal(sample[0, :, 2, 4], sample[0, :, 3, 5])
        model.refine_layer.linear.bias.add_(1)
        changed = (model(latent, times, labels, grain=grain).sample - sample).abs()
        assert (changed[0, :4, 2:4, 4:6] > 0.5).all()
        changed[0, :4, 2:4, 4:6] = 0
        assert changed.max() == 0  # the variance, too, is the base's alone

    @torch.no_grad()
    def test_samples_with_different_grains_are_independent(self) -> None:
        model = CASES["d2it"].model()
        latent, times, labels = inputs(model, 3)
        grain = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.4
        grain[2] = False
        together = model(latent, times, labels, grain=grain).sample
        for i in range(3):
            one = slice(i, i + 1)
            alone = model(latent[one], times[one], labels[one], grain=grain[one]).sample
            torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_fine_everywhere_is_the_default(self) -> None:
        model = CASES["d2it"].model()
        batch = inputs(model)
        everywhere = model(*batch, grain=torch.ones(2, 4, 4)).sample
        torch.testing.assert_close(model(*batch).sample, everywhere, atol=1e-6, rtol=1e-6)

    def test_without_refinement(self) -> None:
        model = CASES["d2it"].model(refine_depth=0)
        assert not [name for name in model.state_dict() if "cell" in name or "refine" in name]
        assert model(*inputs(model)).sample.isfinite().all()

    def test_starts_at_zero_and_explains(self) -> None:
        model = D2iT(**CASES["d2it"].tiny).eval()
        latent, times, labels = inputs(model)
        assert model(latent, times, labels).sample.abs().max() == 0
        with pytest.raises(ValueError, match="one for each region"):
            model(latent, times, labels, grain=torch.ones(2, 8, 8))


class TestGrainTransformer:
    def test_learns_the_map_of_a_class(self) -> None:
        """Class 0: the left half fine; class 1: the right."""
        torch.manual_seed(0)
        model = GrainTransformer(4, hidden_size=16, depth=1, num_heads=2, num_classes=2)
        maps = torch.zeros(2, 4, 4, dtype=torch.bool)
        maps[0, :, :2], maps[1, :, 2:] = True, True
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            model.loss(maps.repeat(8, 1, 1), torch.tensor([0, 1] * 8)).mean().backward()
            optimizer.step()
        drawn = model.eval().sample(torch.tensor([0, 1] * 8), num_steps=4)
        assert (drawn == maps.repeat(8, 1, 1)).float().mean() > 0.9

    def test_loss_is_of_hidden_regions_given_the_others(self) -> None:
        torch.manual_seed(0)
        model = GrainTransformer(2, hidden_size=16, depth=1, num_heads=2, num_classes=2).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        labels, hidden = torch.tensor([0, 1, 1]), torch.tensor([[[1, 0], [0, 0]]] * 3).bool()
        shown = torch.where(hidden, 2, GRAIN.long())
        chance = model(shown, labels).log_softmax(-1)[:, 0, 0]  # (B, 2), of the one hidden region
        expected = -chance.gather(1, GRAIN[:, 0, :1].long())[:, 0]
        torch.testing.assert_close(model.loss(GRAIN, labels, hidden=hidden), expected)
        dropped = model.loss(GRAIN, labels, torch.ones(3), hidden)
        torch.testing.assert_close(dropped, model.loss(GRAIN, hidden=hidden))
        assert not torch.allclose(dropped, expected)

    def test_draws(self, tmp_path: Path) -> None:
        model = models.create("d2it-grain", grid=(2, 4), hidden_size=16, depth=1, num_heads=2).eval()
        one, same = (model.sample(batch=64, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert one.shape == (64, 2, 4) and torch.equal(one, same)
        assert 0 < one.float().mean() < 1 and len(one.flatten(1).unique(dim=0)) > 8
        model.save_pretrained(tmp_path)
        assert isinstance(models.load(tmp_path), GrainTransformer)
        with pytest.raises(ValueError, match="give labels or a batch"):
            model.sample()
