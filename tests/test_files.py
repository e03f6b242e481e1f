from __future__ import annotations

import pytest

from ditkit.files import whole_file, write_text


def test_a_file_is_there_when_it_is_whole(tmp_path) -> None:
    target = tmp_path / "deep" / "report.txt"
    with whole_file(target) as part:
        part.write_text("half")
        assert part.suffix == ".txt"
        assert not target.exists()
    assert target.read_text() == "half"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_what_was_there(tmp_path) -> None:
    target = write_text(tmp_path / "report.txt", "first")

    def fail() -> None:
        with whole_file(target) as part:
            part.write_text("second, but only ha")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]
