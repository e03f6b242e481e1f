import json

import pytest
from diffusers import WanPipeline

from ditkit.hub import BUNDLED, load
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


def test_bundled_pipeline_is_plain_diffusers():
    from diffusers import FluxPipeline

    pipe = load("micro-flux")
    assert "micro-flux" in BUNDLED and type(pipe) is FluxPipeline
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    assert 5e6 <= parameters <= 12e6
