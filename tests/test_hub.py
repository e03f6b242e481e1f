import pytest

from ditkit.hub import BUNDLED, load


def test_unknown_names_get_the_nearest(tmp_path):
    with pytest.raises(FileNotFoundError, match="'micro-flux'"):
        load("micro-fluks")
    with pytest.raises(FileNotFoundError, match="bundled are"):
        load("qqqq")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError):
        load("./no/such/folder")


def test_bundled_pipeline_is_plain_diffusers():
    from diffusers import FluxPipeline

    pipe = load("micro-flux")
    assert "micro-flux" in BUNDLED and type(pipe) is FluxPipeline
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    assert 5e6 <= parameters <= 12e6
