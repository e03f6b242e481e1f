"""The measure on clips whose truth is known."""

import numpy as np
import pytest
import torch

from ditkit.analysis.evaluate_motion import evaluate_motion, scenes, shares
from ditkit.analysis.motion_judge import MotionJudge
from ditkit.data.config import MotionConfig
from ditkit.data.emoji_motion import EmojiMotion, read_caption
from ditkit.data.motions import VOCABULARY
from tiny_pipelines import flux, wan

EIGHT = MotionConfig(objects=list(VOCABULARY[:8]), spread=0.5)


class Oracle:
    """A pipeline that draws the clip of its caption, with the chosen share of them played backwards."""

    def __init__(self, backwards: float = 0.0) -> None:
        self.vae, self.backwards, self.drawn = wan().vae, backwards, 0

    def __call__(self, prompt, generator=None, num_inference_steps=1, num_frames=17, output_type="np"):
        clips = []
        for text in prompt:
            clip = EmojiMotion(seed=self.drawn).make(*read_caption(text)).video
            self.drawn += 1
            clips.append(clip.flip(1) if self.drawn <= self.backwards * 8 else clip)
        frames = torch.stack(clips).permute(0, 2, 3, 4, 1).numpy() / 2 + 0.5
        return {"frames": frames} if output_type is None else Frames(frames)


class Frames(dict):
    def __init__(self, frames: np.ndarray) -> None:
        super().__init__(frames=frames)
        self.frames = frames


def test_right_clips_count_as_right_and_wrong_ones_as_wrong():
    found = evaluate_motion(Oracle(), count=8, batch=5, config=EIGHT)
    assert vars(found.shares) == vars(found.real) == {"object": 1, "motion": 1, "both": 1, "nearest": 1}
    assert found.wrong == [] and found.explained > 0.8 and found.clips.shape == (8, 17, 64, 64, 3)
    assert 0 <= found.ceiling.both <= 1
    turned = evaluate_motion(Oracle(backwards=0.5), count=8, batch=5, config=EIGHT)
    still = sum("still" in prompt for prompt in turned.prompts[:4])
    assert turned.shares.object == 1 and turned.shares.both == (4 + still) / 8
    assert len(turned.wrong) == 4 - still


def test_shares_of_the_wrong_object():
    asked = scenes(4)
    judge = MotionJudge()
    seen = [judge.look(EmojiMotion(seed=i).make([item]).video) for i, item in enumerate(asked)]
    assert shares(asked, seen[1:] + seen[:1]).object == 0


def test_what_cannot_be_asked():
    with pytest.raises(ValueError, match="count=0"):
        evaluate_motion(Oracle(), count=0)
    with pytest.raises(TypeError, match="draws pictures"):
        evaluate_motion(flux(), count=1, steps=1)
    few = MotionConfig(objects=["key", "bell"], directions=["left", "up"])
    assert {(item.name, item.direction) for item in scenes(4, config=few)} == {
        (name, way) for name in ("key", "bell") for way in ("left", "up")
    }
