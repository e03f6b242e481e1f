"""Steps of clips that differ in length: one length a step, and as many clips as make up the batch.

`batch_size` counts frames, so that a step of single frames and one of whole clips cost about the same.
"""

from __future__ import annotations

from pydantic import Field, field_validator

from ditkit.data.config import Section


class Windows(Section):
    """`lengths`: frames of a clip -> share of the steps; 1 + 4k frames, as the causal encoder takes them."""

    lengths: dict[int, float] = Field(default={17: 1.0}, min_length=1)

    @field_validator("lengths")
    @classmethod
    def _causal(cls, lengths: dict[int, float]) -> dict[int, float]:
        bad = [n for n, share in lengths.items() if n % 4 != 1 or share <= 0]
        if bad:
            raise ValueError(f"lengths {bad}: the encoder takes 1 + 4k frames, with a share above 0")
        return lengths

    def length(self, uniform: float) -> int:
        """The length that a uniform number in [0, 1) stands for."""
        total = sum(self.lengths.values())
        for frames, share in self.lengths.items():
            uniform -= share / total
            if uniform < 0:
                return frames
        return next(reversed(self.lengths))
