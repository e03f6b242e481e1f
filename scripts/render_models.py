"""Write docs/models.md: what methods can do on each class of diffusers."""

from __future__ import annotations

from pathlib import Path

from ditkit.seams.coverage import markdown

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
