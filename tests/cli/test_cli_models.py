"""`ditkit models NAME` counts, `ditkit convert --from dit` starts another architecture."""

from __future__ import annotations

import json
from pathlib import Path

from ditkit.models.dit import DiT


def test_sizes_beside_the_published_ones(ditkit) -> None:
    result = ditkit("models switch-dit-s/8")
    assert result.exit_code == 0, result.output
    assert "switch-dit-s/8" in result.stdout and "2403.09176" in result.stdout
    result = ditkit("models dit-s/8")
    assert result.stdout.count("33.1 M") == 2 and result.stdout.count("0.36 G") == 2
    assert ditkit("models dit-xxs/2").exit_code == 2


def test_another_architecture_from_a_dit(ditkit) -> None:
    DiT(input_size=8, hidden_size=32, depth=1, num_heads=4, num_classes=3).save_pretrained("teacher")
    result = ditkit("convert teacher --from dit --arch lit --out student")
    assert result.exit_code == 0, result.output
    assert json.loads(Path("student/config.json").read_text())["_class_name"] == "LiT"
    missing = ditkit("convert teacher --from dit --out other")
    assert missing.exit_code == 2 and "--arch" in missing.stderr
    refused = ditkit("convert teacher --from dit --arch dico --out other")
    assert refused.exit_code != 0 and "can't start from a DiT" in refused.stderr
