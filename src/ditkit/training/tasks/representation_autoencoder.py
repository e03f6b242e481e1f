"""Train the decoder of a representation autoencoder: pictures from the tokens of a frozen vision transformer.

Losses, arXiv 2510.11690, section 3: mean |x - x'| of pixels in [0, 1]; with `perceptual` LPIPS, where its
weights are at hand, or how differently a frozen vision transformer sees both (`adversary.feature_distance`),
which is no LPIPS; with `adversary` the loss of a discriminator on such a transformer, weighed so that
its gradient at the decoder's last layer is as large as the others'. The authors' shares of the run are the
defaults of when each sets in. Tokens are decoded under noise, sigma n with n standard normal and sigma =
`tau` times an uniform number, as in the code, or, as the paper has it, the size of a normal number of
deviation `tau`.

The discriminator learns in the same backward pass from pictures that are cut off from the decoder, at its own
rate, and the decoder from logits that are cut off from the discriminator: what two passes one after the other
give. The adaptive weight and batch norm are of the pictures that are processed together, as the authors'.

The export is the whole autoencoder, the encoder with it, and the mean and variance of the tokens at each
place over the training pictures.

Dimensions: B pictures of H x W pixels, G x G patches, T = G G, D channels of a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor
from tqdm.auto import tqdm

from ditkit.data.config import Section
from ditkit.models.rae import RepresentationAutoencoder
from ditkit.models.teachers import Teacher, load_teacher
from ditkit.training.adversary import (
    Discriminator,
    adaptive_weight,
    augment,
    check_layers,
    feature_distance,
    hinge,
)
from ditkit.training.config import ConfigError
from ditkit.training.lpips import PerceptualDistance, load_lpips
from ditkit.training.optimizers import OwnRate
from ditkit.training.order import BatchNoise
from ditkit.training.tasks.autoencoder import AutoencoderTask
from ditkit.training.tasks.base import TaskOptions

NoiseLevels = Literal["uniform", "half-normal"]


class PerceptualOptions(Section):
    """`lpips`: a folder with the weights of LPIPS (`ditkit.training.lpips`), as the authors'; else `network`,
    a vision transformer by stage, folder or hub id, and `layers`, behind which its tokens are compared.
    `weight` of the distance; `start`: share of the run before it sets in."""

    lpips: str | None = None
    network: str | None = None
    layers: list[int] = []
    weight: float = Field(default=1.0, ge=0)
    start: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _one_of_both(self) -> PerceptualOptions:
        if (self.lpips is None) == (self.network is None):
            raise ValueError("give lpips, a folder of its weights, or network with layers")
        return self


class AdversaryOptions(Section):
    """`network`, `layers`: as of the perceptual distance; `weight` beside the adaptive one, which is at most
    `most`; `learns_from`, `start`: shares of the run before the discriminator learns, and before the decoder
    is told what it finds; `lr`, `betas` of the discriminator; `augment`: whether it sees pictures under other
    light and moved."""

    network: str
    layers: list[int]
    weight: float = Field(default=0.75, ge=0)
    most: float = Field(default=1e4, gt=0)
    learns_from: float = Field(default=6 / 16, ge=0, le=1)
    start: float = Field(default=8 / 16, ge=0, le=1)
    lr: float = Field(default=2e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    kernel: PositiveInt = 9
    augment: bool = True


class RepresentationAutoencoderOptions(TaskOptions):
    """`encoder`: a vision transformer by stage, folder or hub id; `grid`: of patches in which it sees
    pictures (null: by their size); `model`: of `RepresentationAutoencoder`, the decoder's sizes; `tau`,
    `noise`: of the tokens."""

    encoder: str
    grid: PositiveInt | None = None
    model: dict[str, Any] = {}
    tau: float = Field(default=0.8, ge=0)
    noise: NoiseLevels = "uniform"
    perceptual: PerceptualOptions | None = None
    adversary: AdversaryOptions | None = None


def noise_levels(draws: Tensor, tau: float, kind: NoiseLevels) -> Tensor:
    """The noise of each picture, (B,), of uniform numbers (B,), or normal ones for "half-normal"."""
    return tau * (draws if kind == "uniform" else draws.abs())


class RepresentationAutoencoderTask(AutoencoderTask):
    Options = RepresentationAutoencoderOptions
    autoencoder: RepresentationAutoencoder

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        options = self.options
        self.judges: Teacher | PerceptualDistance | None = None
        self.discriminator: Discriminator | None = None
        if (told := options.perceptual) is not None and told.lpips is not None:
            self.judges = self._fits("perceptual.lpips", lambda: load_lpips(told.lpips))
        elif told is not None:
            self.judges = eyes = self._teacher("perceptual")
            self._fits("perceptual", lambda: check_layers(eyes, told.layers))
        if (asked := options.adversary) is not None:
            if asked.learns_from > asked.start:
                raise ConfigError(
                    f"{self.run.name}.task_options.adversary.learns_from: {asked.learns_from} is after start "
                    f"({asked.start}): the decoder would follow a discriminator that has learned nothing"
                )
            eyes = self._teacher("adversary")
            self.discriminator = self._fits(
                "adversary", lambda: Discriminator(eyes, asked.layers, asked.kernel)
            )

    def _build(self) -> RepresentationAutoencoder:
        teacher, options, size = self._teacher(None), self.options, self.run.data.size
        if teacher.patch[0] != teacher.patch[1]:
            raise ConfigError(
                f"{self.run.name}.task_options.encoder: its patches {teacher.patch} are not square"
            )
        grid = options.grid or size // teacher.patch[0]
        settings = {"grid": grid, "patch_size": size // grid, **options.model}
        try:
            model = RepresentationAutoencoder.around(teacher, **settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.run.name}.task_options.model: {error}") from error
        if model.spatial_compression_ratio * settings["grid"] != size:
            raise ConfigError(
                f"{self.run.name}.task_options.grid: {settings['grid']} patches of "
                f"{model.spatial_compression_ratio} pixels are not the {size} of data.size"
            )
        return model

    def _teacher(self, section: str | None) -> Teacher:
        """The vision transformer that an option names."""
        where = "encoder" if section is None else f"{section}.network"
        name = self.options.encoder if section is None else getattr(self.options, section).network
        return self._fits(where, lambda: load_teacher(name, self.model_folder))

    def _fits(self, where: str, make: Any) -> Any:
        try:
            return make()
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.run.name}.task_options.{where}: {error}") from error

    def own_rates(self) -> list[OwnRate]:
        if self.discriminator is None:
            return []
        asked = self.options.adversary
        return [OwnRate(list(self.discriminator.heads.parameters()), asked.lr, betas=asked.betas)]

    def forward(self, indices: Tensor, noise: BatchNoise) -> dict[str, Tensor]:
        options, progress = self.options, noise.step / self.run.steps
        images = self._images(self.pictures, indices.cpu().numpy())  # (B, 3, H, W)
        tokens = self.autoencoder.tokens(images)  # (B, T, D)
        draws = noise.uniform() if options.noise == "uniform" else noise.normal()
        sigma = noise_levels(draws, options.tau, options.noise)  # (B,)
        tokens = tokens + sigma[:, None, None] * noise.normal(*tokens.shape[1:])
        restored = self.autoencoder.restore(tokens).float()  # (B, 3, H, W)
        losses = {"l1": (restored - images).abs().mean() / 2}
        loss = losses["l1"]
        if self.judges is not None and progress >= options.perceptual.start:
            asked, judges = options.perceptual, self.judges
            if isinstance(judges, PerceptualDistance):
                losses["lpips"] = distance = judges(restored, images)
            else:
                grid = self.autoencoder.grid
                losses["features"] = distance = feature_distance(judges, restored, images, grid, asked.layers)
            loss = loss + asked.weight * distance
        if self.discriminator is not None:
            loss = loss + self._against(images, restored, loss, losses, progress, noise)
        return {"loss": loss, **losses}

    def _against(
        self,
        images: Tensor,
        restored: Tensor,
        loss: Tensor,
        losses: dict[str, Tensor],
        progress: float,
        noise: BatchNoise,
    ) -> Tensor:
        """What decoder and discriminator add to the loss; both are put among the `losses`."""
        asked, adversary = self.options.adversary, self.discriminator
        assert adversary is not None
        grid = self.autoencoder.grid
        draws = [noise.uniform(5) for _ in range(3)]  # drawn always: what comes before changes nothing after

        def seen(pictures: Tensor, which: int) -> list[Tensor]:
            moved = augment(pictures, draws[which]) if asked.augment else pictures
            return adversary.features(moved, grid)

        added = torch.zeros((), device=images.device)
        if progress >= asked.start:
            losses["adversarial"] = -adversary.judge_as_it_is(seen(restored, 0)).mean()
            last = self.autoencoder.decoder.decoder_pred.weight
            losses["adaptive"] = adaptive_weight(loss, losses["adversarial"], last, asked.most)
            added = added + asked.weight * losses["adaptive"] * losses["adversarial"]
        if progress >= asked.learns_from:
            fake = (
                (restored.detach().clamp(-1, 1) + 1) * 127.5
            ).round() / 127.5 - 1  # as a file would hold it
            with torch.no_grad():
                real_features, fake_features = seen(images, 1), seen(fake, 2)
            losses["discriminator"] = hinge(adversary.judge(real_features), adversary.judge(fake_features))
            return added + losses["discriminator"]
        # Processes that share a batch expect a gradient for every parameter.
        return added + 0.0 * sum(parameter.sum() for parameter in adversary.heads.parameters())

    def _restore(self, images: Tensor) -> Tensor:
        return self.autoencoder(images)

    def export(self, folder: Path) -> None:
        chunks = tqdm(self._chunks(), desc="measuring tokens", delay=2)
        model: Any = self.autoencoder
        mean, variance = measure(model.tokens(self._images(self.pictures, c.numpy())) for c in chunks)
        for buffer, values in ((model.latents_mean, mean), (model.latents_var, variance)):
            buffer.copy_(values.transpose(0, 1).unflatten(1, model.grid))  # (D, G, G)
        model.to(memory_format=torch.contiguous_format).save_pretrained(folder)


@torch.no_grad()
def measure(batches: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance of each place and channel, (T, D), of tokens (B, T, D) that come in batches."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for tokens in batches:
        tokens = tokens.double().cpu()
        count, total, squares = (
            count + len(tokens),
            total + tokens.sum(0),
            squares + tokens.square().sum(0),
        )
    mean = total / count
    return mean, squares / count - mean.square()
