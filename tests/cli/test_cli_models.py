"""`ditkit models NAME` counts, `ditkit convert --from dit` starts another architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import tiny_pipelines
from ditkit.models.dit import DiT


def test_sizes_beside_the_published_ones(ditkit) -> None:
    result = ditkit("models switch-dit-s/8")
    assert result.exit_code == 0, result.output
    assert "switch-dit-s/8" in result.stdout and "2403.09176" in result.stdout
    result = ditkit("models dit-s/8")
    assert result.stdout.count("33.1 M") == 2 and result.stdout.count("0.36 G") == 2
    assert ditkit("models dit-xxs/2").exit_code == 2


@pytest.mark.parametrize("width", [80, 120])
def test_lists_keep_names_and_papers_whole(ditkit, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Whatever the terminal's width, and without columns that are the same of all."""
    from ditkit.registry import entries

    monkeypatch.setenv("COLUMNS", str(width))
    for command, kind in (("models", "model"), ("methods", "method"), ("objectives", "objective")):
        text = ditkit(command).stdout
        lines = text.splitlines()
        assert max(map(len, lines)) <= width and "…" not in text
        for name, entry in entries(kind).items():  # pyright: ignore[reportArgumentType]
            assert any(name in line and entry.paper.arxiv in line for line in lines), name
    assert "architecture" not in ditkit("models").stdout.replace("\n", " ")
    words = " ".join(ditkit("methods").stdout.replace("│", " ").split())
    assert "a token grid" in words and ("needs: nothing" in words) == (width == 80)


def test_a_text_architecture_from_a_pixart(ditkit, tmp_path: Path) -> None:
    """A whole pipeline becomes one, which draws."""
    tiny_pipelines.pixart().save_pretrained("teacher")
    result = ditkit("convert teacher --from pixart --arch lit-pixart --out student")
    assert result.exit_code == 0, result.output
    index = json.loads(Path("student/model_index.json").read_text())
    assert index["transformer"] == ["ditkit.models.lit_pixart", "LiTPixArtTransformer2DModel"]
    drawn = ditkit("generate 'red apple' --model student --steps 2 --size 32x16 --out a.png")
    assert drawn.exit_code == 0, drawn.output
    with Image.open("a.png") as image:
        assert image.size == (32, 16)
    refused = ditkit("generate 'red apple' --model student --with local-window --out b.png")
    assert refused.exit_code != 0 and "its attention is linear" in refused.stderr
    missing = ditkit("convert teacher --from pixart --out other")
    assert missing.exit_code == 2 and "--from pixart needs --arch" in missing.stderr


def test_another_architecture_from_a_dit(ditkit) -> None:
    DiT(input_size=8, hidden_size=32, depth=1, num_heads=4, num_classes=3).save_pretrained("teacher")
    result = ditkit("convert teacher --from dit --arch lit --out student")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("student/config.json").read_text())["_class_name"] == "LiT"
    missing = ditkit("convert teacher --from dit --out other")
    assert missing.exit_code == 2 and "--arch" in missing.stderr
    refused = ditkit("convert teacher --from dit --arch dico --out other")
    assert refused.exit_code != 0 and "can't start from a DiT" in refused.stderr
