"""Small pictures of known content, in files, archives and tables."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

SHARED = Path(__file__).parents[3] / "shared" / "data"
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 40, 230)}


def picture(colour: str, shade: int = 0) -> Image.Image:
    """16 x 16 pixels of one colour."""
    pixels = np.full((16, 16, 3), COLOURS[colour], np.uint8)
    return Image.fromarray(pixels // (shade + 1))


def encoded(colour: str, kind: str = "PNG", shade: int = 0) -> bytes:
    stream = io.BytesIO()
    picture(colour, shade).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three folders of four pictures."""
    folder = tmp_path / "pictures"
    for colour in COLOURS:
        (folder / colour).mkdir(parents=True)
        for shade in range(4):
            picture(colour, shade).save(folder / colour / f"{colour}_square-{shade}.png")
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    """A tiny AutoencoderKL: 16 x 16 pixels to latents of 3 x 8 x 8."""
    torch.manual_seed(0)
    folder = tmp_path / "vae"
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=3,
        mid_block_add_attention=False,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).save_pretrained(folder)
    return folder
