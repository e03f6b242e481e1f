import json
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

import ditkit
from ditkit.analysis.evaluate_motion import scenes
from ditkit.analysis.motion_judge import MotionJudge
from ditkit.data.config import MotionConfig
from ditkit.data.emoji_motion import EmojiMotion
from ditkit.data.words import unknown_words
from ditkit.hub import BUNDLED, load
from ditkit.training.tasks.latents import decode_video, encode_video
from tiny_pipelines import wan


def test_unknown_names_get_the_nearest(tmp_path):
    with pytest.raises(FileNotFoundError, match="'micro-flux'"):
        load("micro-fluks")
    with pytest.raises(FileNotFoundError, match="bundled are"):
        load("qqqq")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        load("./no/such/folder")


def test_a_call_file_gives_the_defaults_of_a_plain_call(tmp_path):
    (tiny := wan()).save_pretrained(tmp_path)
    call = {"height": 32, "width": 48, "num_frames": 5, "guidance_scale": 1.0}
    (tmp_path / "call.json").write_text(json.dumps(call))
    pipe = load(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("red apple", num_inference_steps=1, output_type="np").frames
    assert drawn.shape == (1, 5, 32, 48, 3)
    assert pipe("red apple", None, 16, num_inference_steps=1, output_type="np").frames.shape[2:4] == (16, 48)
    assert pipe("red apple", num_frames=3, num_inference_steps=1, output_type="np").frames.shape[1] == 3
    assert isinstance(pipe, type(tiny))
    pipe.save_pretrained(tmp_path / "again")
    assert type(WanPipeline.from_pretrained(tmp_path / "again")) is type(tiny)


def test_the_bundled_clips():
    pipe = load("micro-wan")
    assert isinstance(pipe, WanPipeline) and type(pipe).__name__ == "WanPipeline"
    folder = Path(ditkit.__file__).parent / "assets" / "micro-wan"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 15e6
    assert isinstance(WanPipeline.from_pretrained(folder), WanPipeline)
    pipe.set_progress_bar_config(disable=True)
    tokens = []
    pipe.transformer.blocks[0].register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[1]))
    frames = pipe("red apple moving left", num_inference_steps=2, output_type="np").frames
    assert frames.shape == (1, 17, 64, 64, 3) and tokens == [576] * 4
    known = unknown_words(pipe.tokenizer, " ".join(EmojiMotion().captions()))
    assert known == []


def test_the_bundled_autoencoder_restores_clips():
    pipe, judge = load("micro-wan"), MotionJudge()
    for item in scenes(6, seed=5):
        video = EmojiMotion(MotionConfig(spread=0.5)).make([item]).video
        latents = encode_video(pipe.vae, video[None])
        restored = decode_video(pipe.vae, latents)[0]
        seen = judge.look(restored)
        assert seen.name == item.name and seen.moves(item.direction)
        assert -10 * torch.log10((restored - video).square().mean() / 4) >= 25  # decibels
        assert 0.5 < float(latents.std()) < 1.5


def test_bundled_pipeline_is_plain_diffusers():
    from diffusers import FluxPipeline

    pipe = load("micro-flux")
    assert "micro-flux" in BUNDLED and type(pipe) is FluxPipeline
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    assert 5e6 <= parameters <= 12e6
