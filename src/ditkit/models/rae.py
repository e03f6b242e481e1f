"""A representation autoencoder: a frozen vision transformer encodes, a trained transformer decodes.

"Diffusion Transformers with Representation Autoencoders", arXiv 2510.11690, section 3. Latents are the patch
tokens behind the last layer and its norm without scale and bias, class token and registers dropped, laid out
as the grid they come from and normalised at each place by their mean and variance over the training
pictures. The decoder is diffusers' `RAEDecoder`. diffusers' own `AutoencoderRAE` differs from the authors'
code in two things, which are theirs here: positions count 0, 1, ... on every grid (diffusers scales them to
sixteen), and latents are divided by sqrt(variance + 1e-5) (diffusers: deviation + 1e-5). Pictures are in
[-1, 1], as for every autoencoder here.

Dimensions: B pictures of H x W pixels, G x G patches, T = G G, D channels of a token, P side of a decoded
patch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE, RAEDecoder
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor

from ditkit.models.base import chosen
from ditkit.models.layers import sincos_table
from ditkit.models.teachers import Teacher, fresh_network, plain_config
from ditkit.registry import Paper, register

DINOV2 = {"model_type": "dinov2_with_registers", "patch_size": 14, "image_size": 518}
"""DINOv2-B with registers: 768 channels, which the paper uses."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
EPS = 1e-5  # added to the latents' variance


class RepresentationAutoencoder(ModelMixin, ConfigMixin):
    """The autoencoder.

    Args:
        encoder_config: of the vision transformer, as transformers has it, with its `model_type`.
        image_mean, image_std: of the pixels in [0, 1] that it was trained with.
        grid: G; pictures are scaled so that it has a patch for each cell.
        patch_size: P; decoded pictures have G P pixels a side.
        decoder_hidden_size: width of the decoder, a multiple of 4 and of its heads.
        decoder_num_hidden_layers: its layers.
        decoder_num_attention_heads: its heads.
        decoder_intermediate_size: hidden width of its perceptrons.
        scaling_factor, shift_factor: 1 and 0: latents are normalised at each place.

    Raises:
        ValueError: an encoder that transformers does not know, or sizes that do not divide.
    """

    @register_to_config
    def __init__(
        self,
        encoder_config: Mapping[str, Any] = DINOV2,
        image_mean: Sequence[float] = IMAGENET[0],
        image_std: Sequence[float] = IMAGENET[1],
        grid: int = 16,
        patch_size: int = 16,
        decoder_hidden_size: int = 768,
        decoder_num_hidden_layers: int = 12,
        decoder_num_attention_heads: int = 12,
        decoder_intermediate_size: int = 3072,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        places = sincos_table(decoder_hidden_size, grid, grid)  # (1, T, D_dec)
        self.encoder = Teacher(fresh_network(encoder_config), image_mean, image_std)
        self.normed = self.encoder.drop_last_scale()
        self.decoder = RAEDecoder(
            hidden_size=self.encoder.width,
            decoder_hidden_size=decoder_hidden_size,
            decoder_num_hidden_layers=decoder_num_hidden_layers,
            decoder_num_attention_heads=decoder_num_attention_heads,
            decoder_intermediate_size=decoder_intermediate_size,
            num_patches=grid * grid,
            patch_size=patch_size,
            image_size=grid * patch_size,
        )
        positions = torch.cat([torch.zeros_like(places[:, :1]), places], dim=1)  # none for the class token
        self.decoder.decoder_pos_embed = positions
        size = (self.encoder.width, grid, grid)
        self.latents_mean: Tensor
        self.latents_var: Tensor
        self.register_buffer("latents_mean", torch.zeros(size))  # (D, G, G)
        self.register_buffer("latents_var", torch.ones(size) - EPS)  # no normalisation until it is measured

    @classmethod
    def around(cls, teacher: Teacher, **config: Any) -> RepresentationAutoencoder:
        """An autoencoder with the weights of a vision transformer and a fresh decoder."""
        mean, std = (value.flatten().tolist() for value in (teacher.mean, teacher.std))
        given = {"encoder_config": plain_config(teacher.network), "image_mean": mean, "image_std": std}
        model = cls(**{**given, **config})
        weights = teacher.state_dict()
        model.encoder.load_state_dict({name: weights[name] for name in model.encoder.state_dict()})
        return model

    @classmethod
    def from_diffusers(cls, autoencoder: AutoencoderRAE) -> RepresentationAutoencoder:
        """The same autoencoder as one of ours, such as the authors' released ones (`nyu-visionx/RAE-...`)."""
        theirs: Any = autoencoder.config
        mean, std = (
            value.flatten().tolist() for value in (autoencoder.encoder_mean, autoencoder.encoder_std)
        )
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        model = cls.around(
            Teacher(autoencoder.encoder, mean, std),
            grid=theirs.encoder_input_size // theirs.encoder_patch_size,
            patch_size=theirs.patch_size,
            **{f"decoder_{size}": theirs[f"decoder_{size}"] for size in sizes},
        )
        model.decoder.load_state_dict(autoencoder.decoder.state_dict())
        model.latents_mean.copy_(autoencoder._latents_mean.expand_as(model.latents_mean))
        deviation = autoencoder._latents_std.expand_as(model.latents_var)
        model.latents_var.copy_(deviation.square() - EPS)  # what latents are divided by stays
        return model.eval()

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels a side of a latent."""
        return self.decoder.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        side: int = self.config["grid"]
        return side, side

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """What the encoder sees in pictures (B, 3, H, W) in [-1, 1]: (B, T, D), float32."""
        tokens = self.encoder(images, self.grid).tokens
        eps = self.encoder.network.config.layer_norm_eps
        return tokens if self.normed else F.layer_norm(tokens, tokens.shape[-1:], eps=eps)

    def normalise(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, D) to latents (B, D, G, G)."""
        maps = tokens.transpose(1, 2).unflatten(2, self.grid)
        return (maps - self.latents_mean) / (self.latents_var + EPS).sqrt()

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return (latents * (self.latents_var + EPS).sqrt() + self.latents_mean).flatten(2).transpose(1, 2)

    def restore(self, tokens: Tensor) -> Tensor:
        """Pictures (B, 3, G P, G P), about [-1, 1], of tokens (B, T, D); with gradients."""
        patches = self.decoder(tokens).logits  # (B, T, P P 3), as the encoder's pixels are scaled
        pixels = self.decoder.unpatchify(patches) * self.encoder.std + self.encoder.mean
        return 2 * pixels - 1

    def encode(self, images: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        """Latents (B, D, G, G) of pictures (B, 3, H, W) in [-1, 1], as `.latent` or in a tuple."""
        latent = self.normalise(self.tokens(images))
        return EncoderOutput(latent=latent) if return_dict else (latent,)

    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pictures (B, 3, G P, G P) of latents (B, D, G, G), as `.sample` or in a tuple.

        Raises:
            ValueError: latents of another size: the decoder knows one grid.
        """
        if latents.shape[1:] != self.latents_mean.shape:
            sizes = ", ".join(map(str, self.latents_mean.shape))
            raise ValueError(f"latents have shape {tuple(latents.shape)}; expected (B, {sizes})")
        images = self.restore(self.denormalise(latents))
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures encoded and decoded."""
        return self.restore(self.tokens(images))


def authors_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' decoder weights under the names of `RAEDecoder`; positions are computed."""
    pairs = (
        (r"attention\.attention\.query", "attention.to_q"),
        (r"attention\.attention\.key", "attention.to_k"),
        (r"attention\.attention\.value", "attention.to_v"),
        (r"attention\.output\.dense", "attention.to_out.0"),
    )
    named = {}
    for name, value in state.items():
        for theirs, ours in pairs:
            name = re.sub(theirs, ours, name)
        named[name] = value
    named.pop("decoder_pos_embed", None)
    return named


VARIANTS: dict[str, dict[str, int]] = {
    name: {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": layers,
        "decoder_num_attention_heads": heads,
        "decoder_intermediate_size": hidden,
    }
    for name, width, layers, heads, hidden in (("b", 768, 12, 12, 3072), ("xl", 1152, 28, 16, 4096))
}


@register(
    "model",
    "rae",
    summary="representation autoencoder: a frozen vision transformer and a decoder; rae-{b,xl}",
    paper=Paper("Diffusion Transformers with Representation Autoencoders", "2510.11690", 2025),
    seam=("architecture",),
    variants=tuple(VARIANTS),
)
def rae(variant: str | None = None, **config: Any) -> RepresentationAutoencoder:
    """A fresh autoencoder with a decoder of a named size ("xl"; None: the defaults), encoder included."""
    return RepresentationAutoencoder(**{**chosen(VARIANTS, variant), **config})
