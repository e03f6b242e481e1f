"""Which part of an output belongs to which token."""

from __future__ import annotations

import pytest
import torch

from ditkit.seams.errors import SeamError
from ditkit.seams.patches import Patches

FORMS = {
    "tokens": Patches((1, 2, 3), (2, 6, 5)),
    "packed": Patches((1, 2, 3), (2, 6, 12), packed=2),
    "picture": Patches((1, 2, 3), (2, 4, 6, 9)),
    "whole": Patches((1, 2, 3), (2, 4, 2, 3)),
    "clip": Patches((2, 2, 3), (2, 4, 4, 4, 6)),
    "frames first": Patches((2, 2, 3), (2, 4, 3, 4, 6), channels=2),
    "beyond the border": Patches((1, 2, 3), (2, 4, 5, 8)),
}
every_form = pytest.mark.parametrize("patches", FORMS.values(), ids=FORMS.keys())


@every_form
def test_what_is_spread_over_a_token_averages_to_the_same(patches: Patches) -> None:
    torch.manual_seed(0)
    figures = torch.randn(2, torch.tensor(patches.grid).prod())
    spread = patches.spread(figures).expand(patches.shape)
    pixels = patches.by_channel(spread)
    for channel in range(pixels.shape[1]):
        torch.testing.assert_close(patches.average(pixels[:, channel]), figures)


@every_form
def test_tokens_are_in_raster_order(patches: Patches) -> None:
    tokens = int(torch.tensor(patches.grid).prod())
    for token in (0, 1, tokens - 1):
        chosen = torch.zeros(2, tokens)
        chosen[:, token] = 1
        where = (patches.spread(chosen) * torch.ones(patches.shape)).nonzero()
        if patches.tokens_first:
            assert set(where[:, 1].tolist()) == {token}
            continue
        place = [at for at in range(len(patches.shape)) if at not in (0, patches.axis)]
        grid = patches.grid[-len(place) :]
        index = [int(part) for part in torch.unravel_index(torch.tensor(token), grid)]
        for axis, n, at in zip(place, grid, index, strict=True):
            cell = -(-patches.shape[axis] // n)
            assert set((where[:, axis] // cell).tolist()) == {at}


def test_packed_tokens_hold_pixels_channel_by_channel() -> None:
    picture = torch.randn(1, 3, 4, 6)
    packed = picture.view(1, 3, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 6, 12)
    of_picture, of_tokens = Patches((1, 2, 3), (1, 3, 4, 6)), Patches((1, 2, 3), (1, 6, 12), packed=2)
    expected = of_picture.average(of_picture.by_channel(picture).std(1))
    torch.testing.assert_close(of_tokens.average(of_tokens.by_channel(packed).std(1)), expected)


def test_other_batches_and_channels_have_the_same_form() -> None:
    patches = FORMS["picture"]
    assert patches.matches(torch.zeros(7, 1, 6, 9))
    assert not patches.matches(torch.zeros(2, 4, 6, 8))
    assert not patches.matches(torch.zeros(2, 54, 4))


@pytest.mark.parametrize("shape", [(1, 7, 4), (1, 4, 1, 3), (1, 4), (1, 4, 3, 2, 3, 1)])
def test_other_grids_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SeamError, match="is not a grid of 1 x 2 x 3 tokens"):
        Patches((1, 2, 3), shape)
