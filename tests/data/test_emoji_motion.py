import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ditkit.data.clips import open_clips
from ditkit.data.config import DataConfig, MotionConfig
from ditkit.data.emoji import EmojiDataset
from ditkit.data.emoji_motion import EmojiMotion, Moving, caption, read_caption, sprite, videos
from ditkit.data.motions import CAMERAS, DIRECTIONS, STILL, VOCABULARY, ZOOM

EVERYTHING = MotionConfig(
    count=(1, 3),
    cameras=list(CAMERAS[1:]),
    camera_share=0.7,
    background="dots",
    travel=(6, 9),
    object_size=22,
)


def centroids(masks: torch.Tensor) -> torch.Tensor:
    """(..., H, W) -> (..., 2), x and y."""
    places = torch.arange(masks.shape[-1]) + 0.5
    mass = masks.double()
    total = mass.sum((-2, -1))
    return torch.stack([(mass.sum(-2) * places).sum(-1) / total, (mass.sum(-1) * places).sum(-1) / total], -1)


def test_the_vocabulary_is_in_the_emoji_set():
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 80
    assert set(VOCABULARY) <= set(EmojiDataset().captions)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), index=st.integers(0, 2**40))
def test_a_clip_is_a_function_of_seed_and_index(seed, index):
    one, two = (EmojiMotion(EVERYTHING, seed=seed).clip(index) for _ in range(2))
    assert torch.equal(one.video, two.video) and one.caption == two.caption
    assert torch.equal(one.tracks, two.tracks) and torch.equal(one.masks, two.masks)
    assert EmojiMotion(EVERYTHING, seed=seed).scene(index)[2] == one.caption
    assert one.video.shape == (3, 17, 64, 64) and one.video.abs().max() <= 1
    assert not torch.equal(one.video, EmojiMotion(EVERYTHING, seed=seed + 1).clip(index).video)


@pytest.mark.parametrize("config", [MotionConfig(), EVERYTHING])
def test_tracks_are_the_masks_centres(config):
    clips = EmojiMotion(config, seed=4)
    for index in range(30):
        clip = clips.clip(index)
        assert clip.masks.any(-1).any(-1).all(), clip.caption
        apart = (centroids(clip.masks) - clip.tracks).norm(dim=-1)
        assert apart.max() < 1, (clip.caption, float(apart.max()))


def test_every_caption_says_what_moves_where():
    clips = EmojiMotion(MotionConfig(objects=["red apple", "key"], cameras=[]), seed=1)
    for objects, camera in clips.scenes():
        clip = clips.make(objects, camera)
        way = clip.tracks[0, -1] - clip.tracks[0, 0]
        (item,) = objects
        if item.direction == STILL:
            assert clip.caption == f"{item.name} staying still" and way.norm() == 0
        else:
            assert clip.caption == f"{item.name} moving {item.direction}"
            assert 14 <= way.norm() <= 20
            assert torch.allclose(
                way / way.norm(), torch.tensor(DIRECTIONS[item.direction]).float(), atol=1e-4
            )


def test_the_camera_does_what_its_words_say():
    clips = EmojiMotion(MotionConfig(cameras=list(CAMERAS[1:]), travel=(6, 8), object_size=22))
    for camera in CAMERAS:
        clip = clips.make([Moving("key", STILL)], camera)
        areas = clip.masks[0].sum((1, 2)).double()
        grown, way = float(areas[-1] / areas[0]), clip.tracks[0, -1] - clip.tracks[0, 0]
        if "zoom" in camera:
            expected = ZOOM**2 if camera == "zooms in" else ZOOM**-2
            assert grown == pytest.approx(expected, rel=0.1)
            assert float(clip.camera_path[-1, 0] / clip.camera_path[0, 0]) ** 2 == pytest.approx(
                expected, rel=1e-4
            )
        elif "pans" in camera:  # the world passes the other way
            assert grown == pytest.approx(1, rel=0.1)
            seen = -way / (0.2 * 64)
            assert torch.allclose(seen, torch.tensor(DIRECTIONS[camera[5:]]).float(), atol=1e-4)
        else:
            assert grown == 1 and way.norm() == 0


def test_nearer_objects_hide_farther_ones():
    clips = EmojiMotion(MotionConfig(spread=0.0))
    near, far = Moving("red apple", STILL), Moving("police car", STILL)
    clip, alone = clips.make([near, far]), clips.make([near])
    assert clip.caption == "red apple staying still in front of police car staying still"
    assert not (clip.visible[0] & clip.visible[1]).any()
    assert torch.equal(clip.visible[0], clip.masks[0])
    assert clip.visible[1].sum() < clip.masks[1].sum()
    inside = clip.masks[0].float().flatten(1).bool() & clip.masks[0].flatten(1)
    same = (clip.video - alone.video).abs().amax(0).flatten(1)
    assert same[inside].median() < 1e-3


def test_captions_are_read_back():
    clips = EmojiMotion(EVERYTHING, seed=3)
    for index in range(20):
        objects, camera, text = clips.scene(index)
        assert read_caption(text) == (objects, camera)
        assert caption(objects, camera) == text
    for text in (
        "red apple",
        "red apple moving sideways",
        "no such thing moving left",
        "key moving up, camera dances",
    ):
        with pytest.raises(ValueError, match="is no caption"):
            read_caption(text)


def test_an_emoji_without_its_ground():
    layers, x, y = sprite("jack-o-lantern", 64)
    assert layers[3, 0, 0] == 0 and layers[3, 32, 32] == 1 and 28 < x < 36 and 28 < y < 40
    assert (layers[:3] <= layers[3:] + 1e-6).all()
    on_white = layers[:3] + 1 - layers[3:]
    picture = EmojiDataset().images([EmojiDataset().find("jack-o-lantern")])[0] / 2 + 0.5
    assert (on_white - picture).abs().mean() < 0.01


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ValueError, match=r"motion\.objects.*no such emoji"):
        EmojiMotion(MotionConfig(objects=["no such emoji"]))
    with pytest.raises(ValueError, match=r"motion\.travel: 60\.0 pixels"):
        EmojiMotion(MotionConfig(travel=(10, 60)))
    for bad in (
        {"directions": ["sideways"]},
        {"cameras": ["is static"]},
        {"count": (0, 1)},
        {"travel": (5, 4)},
    ):
        with pytest.raises(ValidationError):
            MotionConfig(**bad)
    with pytest.raises(ValueError, match="needs clips"):
        open_clips(DataConfig(), 0)
    with pytest.raises(KeyError, match="this set has"):
        EmojiMotion().make([Moving("key", "left")], "pans left")


def test_single_frames_and_other_sizes():
    clip = EmojiMotion(MotionConfig(frames=1, object_size=14, travel=(7, 9)), size=32).clip(0)
    assert clip.video.shape == (3, 1, 32, 32) and clip.tracks.shape == (1, 1, 2)
    clips = open_clips(DataConfig(kind="emoji-motion", size=64, motion=MotionConfig(background="soft")), 5)
    batch = videos([clips.clip(i) for i in range(2)])
    assert batch.shape == (2, 3, 17, 64, 64)
    corner = clips.clip(0).video[:, 0, 0, 0]
    np.testing.assert_allclose((corner.numpy() + 1) * 127.5, clips.clip(0).background, atol=0.1)
