"""Commands that make clips, on a tiny pipeline read from a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageSequence

from ditkit.analysis import demo as library
from ditkit.analysis.sampling import Sampling
from ditkit.data.config import MotionConfig
from ditkit.data.emoji_motion import EmojiMotion
from ditkit.hub import load


def frames_of(path: Path) -> list[np.ndarray]:
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with Image.open(path) as image:
        return [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]


def test_clips_and_strips(ditkit, clips_folder: Path) -> None:
    line = f"generate 'red apple moving left' --model {clips_folder} --steps 2 --seed 3"
    for name in ("a.gif", "deep/a.mp4", "strip.png"):
        result = ditkit(f"{line} --out {name}")
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{name}\n" and "1 clip(s) in" in result.stderr
    gif, mp4 = frames_of(Path("a.gif")), frames_of(Path("deep/a.mp4"))
    assert len(mp4) == 17 and mp4[0].shape == (64, 64, 3)
    assert len(gif) == 17 and gif[0].shape == (64, 64, 3)
    with Image.open("strip.png") as strip:
        assert strip.size == (5 * 64, 64)


def test_several_clips_are_numbered_and_methods_apply(ditkit, clips_folder: Path) -> None:
    line = f"generate 'red apple' 'green rocket' --model {clips_folder} --steps 6 --out c.gif"
    result = ditkit(f"{line} --with taylorseer:interval=3,order=1")
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["c-1.gif", "c-2.gif"]
    assert "forecast" in result.stderr


def test_fewer_frames(ditkit, clips_folder: Path) -> None:
    line = f"generate 'red apple' --model {clips_folder} --steps 1 --frames 5 --size 32 --out a.mp4"
    assert ditkit(line).exit_code == 0
    assert [frame.shape for frame in frames_of(Path("a.mp4"))] == [(32, 32, 3)] * 5


def test_a_model_of_pictures_makes_no_clip(ditkit, folder: Path) -> None:
    refused = ditkit(f"generate apple --model {folder} --frames 5 --out a.png")
    assert refused.exit_code == 2 and "draws pictures, not clips" in refused.stderr
    result = ditkit(f"generate apple --model {folder} --steps 2 --size 16 --out a.mp4")
    assert result.exit_code == 2 and "draws pictures, not clips" in result.stderr
    assert not Path("a.mp4").exists()


def test_eval_of_clips(ditkit, clips_folder: Path) -> None:
    result = ditkit(f"eval {clips_folder} --count 3 --steps 1 --out e")
    assert result.exit_code == 0, result.output
    facts = json.loads(Path("e/eval.json").read_text())
    assert facts["real"] == {"object": 1.0, "motion": 1.0, "both": 1.0, "nearest": 1.0}
    assert len(facts["prompts"]) == 3 and facts["shares"]["both"] <= facts["shares"]["object"]
    assert len(facts["wrong"]) == round(3 * (1 - facts["shares"]["both"]))
    assert frames_of(Path("e/clips.gif"))[0].shape == (64, 3 * 64, 3)
    assert re.search(r"real clips\W+100.0 %", result.stdout)


def test_a_preview_of_the_training_clips(ditkit) -> None:
    result = ditkit("data motion --count 7 --objects 2 --seed 3 --preview clips.gif")
    assert result.exit_code == 0, result.output
    *captions, name = result.stdout.splitlines()
    assert name == "clips.gif" and len(captions) == 7
    clips = EmojiMotion(MotionConfig(count=(1, 2)), seed=3)
    assert all(line.endswith(clips.scene(i)[2]) for i, line in enumerate(captions))
    assert frames_of(Path("clips.gif"))[0].shape == (2 * 64, 6 * 64, 3)
    assert ditkit("data motion --preview clips.png").exit_code == 2


def test_the_demo_has_a_row_of_clips(monkeypatch, folder: Path, clips_folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "CLIP_SAMPLING", Sampling(steps=4))
    library.demo(
        tmp_path,
        load(folder),
        ["apple"],
        Sampling(steps=4, size=(16, 16)),
        repeats=1,
        clips=load(clips_folder),
    )
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/gif;base64,") == 2 * len(library.CLIP_PROMPTS)
    assert "Same prompts, same noise: clips" in page
    assert len(list((tmp_path / "clips").glob("*.gif"))) == 4
    rows = json.loads((tmp_path / "clips.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["dense", "method"]
    assert rows[1]["latent_error"] > 0 and rows[1]["steps_computed"] < 4
