import math

import pytest
import torch

from ditkit.analysis.evaluate_motion import scenes
from ditkit.analysis.motion_judge import MotionJudge, Seen
from ditkit.data.config import MotionConfig
from ditkit.data.emoji_motion import EmojiMotion
from ditkit.data.motions import DIRECTIONS, STILL, VOCABULARY


@pytest.fixture(scope="module")
def judge():
    return MotionJudge()


def test_real_clips_are_recognised_and_followed(judge):
    clips = EmojiMotion(MotionConfig(), seed=11)
    for index in range(24):
        clip = clips.clip(index)
        seen, (item,) = judge.look(clip.video), clip.objects
        assert seen.name == item.name and seen.moves(item.direction), clip.caption
        assert (seen.track - clip.tracks[0]).norm(dim=-1).max() < 1.5
        assert seen.explained > 0.8


def test_other_motions_and_other_objects_are_not_accepted(judge):
    clips = EmojiMotion(MotionConfig(cameras=[]), seed=12)
    for direction in DIRECTIONS:
        clip = clips.make([clips.scenes()[0][0][0].__class__("police car", direction)])
        seen = judge.look(clip.video)
        assert seen.name == "police car" and seen.direction == direction
        accepted = {name for name in DIRECTIONS if seen.moves(name, within=22.5)}
        assert accepted == {direction}
        backwards = judge.look(clip.video.flip(1))
        assert backwards.moves(direction) == (direction == STILL)


def test_it_stands_noise_and_blur(judge):
    clips = EmojiMotion(MotionConfig(), seed=13)
    generator = torch.Generator().manual_seed(0)
    right = 0
    for index in range(12):
        clip = clips.clip(index)
        soft = torch.nn.functional.avg_pool2d(clip.video.transpose(0, 1), 3, 1, 1).transpose(0, 1)
        seen = judge.look(soft + 0.1 * torch.randn(soft.shape, generator=generator))
        right += seen.name == clip.objects[0].name and seen.moves(clip.objects[0].direction)
    assert right >= 11


def test_an_empty_clip_explains_nothing(judge):
    seen = judge.look(torch.ones(3, 5, 64, 64))
    assert seen.explained <= 0


def test_directions_and_angles():
    def going(degrees: float, length: float = 10.0) -> Seen:
        way = (length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees)))
        return Seen("key", way, 1.0, torch.zeros(1, 2))

    assert going(44).moves("right") and not going(46).moves("right")
    assert going(30).direction == "down right" and going(-90).direction == "up"
    assert going(0, 4.0).direction == STILL and going(0, 4.0).moves(STILL)
    assert not going(0, 4.0).moves("right") and not going(0).moves(STILL)


def test_the_judge_of_pictures_reads_strips(judge):
    clips = EmojiMotion(MotionConfig(cameras=[]), seed=14)
    chosen = [clips.clip(i) for i in range(4)]
    strips = torch.stack([torch.cat(list(c.video[:, [0, 4, 8, 12, 16]].unbind(1)), -1) for c in chosen])
    pictures = (strips.permute(0, 2, 3, 1) / 2 + 0.5).numpy()
    captions = [c.caption for c in chosen]
    assert judge(pictures, captions) == 1.0
    assert judge(pictures, [*captions[1:], captions[0]]) < 0.5
    assert math.isnan(judge(pictures[:1], ["something else"]))


def test_prompts_are_spread_evenly():
    asked = scenes(100, seed=3)
    assert asked == scenes(100, seed=3) != scenes(100, seed=4)
    assert {item.name for item in asked} == set(VOCABULARY)
    counts = [sum(item.direction == name for item in asked) for name in DIRECTIONS]
    assert max(counts) - min(counts) <= 2
    assert len(set(asked)) == 100
