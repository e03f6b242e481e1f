import io

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from ditkit.analysis.sampling import strip
from ditkit.analysis.videos import gif, save_clip, wall
from ditkit.data.emoji_motion import EmojiMotion, Moving


@pytest.fixture(scope="module")
def clip():
    clip = EmojiMotion().make([Moving("police car", "up left")])
    return clip.video.permute(1, 2, 3, 0).numpy() / 2 + 0.5  # (F, H, W, 3)


def test_mp4_keeps_every_frame(clip, tmp_path):
    path = save_clip(clip, tmp_path / "deep" / "a.mp4")
    with av.open(str(path)) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]) / 255
        assert container.streams.video[0].codec_context.name == "h264"
    assert frames.shape == clip.shape and np.abs(frames - clip).mean() < 0.01


def test_gif_keeps_every_frame_and_repeats(clip):
    with Image.open(io.BytesIO(gif(clip))) as image:
        assert image.info["loop"] == 0
        frames = np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(image)]) / 255
    assert frames.shape == clip.shape and np.abs(frames - clip).mean() < 0.02


def test_other_suffixes_are_refused(clip, tmp_path):
    with pytest.raises(ValueError, match=r"\.mp4 or \.gif"):
        save_clip(clip, tmp_path / "a.avi")
    assert not list(tmp_path.iterdir())


def test_wall_and_strip(clip):
    clips = np.stack([clip, 1 - clip, clip])
    page = wall(clips, columns=2)
    assert page.shape == (17, 128, 128, 3)
    assert np.array_equal(page[:, :64, 64:], 1 - clip) and (page[:, 64:, 64:] == 1).all()
    strips = strip(clips, 3)
    assert strips.shape == (3, 64, 192, 3)
    assert np.array_equal(strips[0, :, 128:], clip[16]) and np.array_equal(strips[0, :, 64:128], clip[8])
