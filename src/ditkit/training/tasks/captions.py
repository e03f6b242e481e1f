"""Captions by number, and what a pipeline's transformer is given of them.

Frozen text encoders see a caption once; those that train see it anew in each step.

Legend: N captions, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ditkit.analysis.sampling import text_length
from ditkit.training.tasks.forms import Form, Given
from ditkit.training.tasks.kept import Kept


class Captions:
    """The captions of a data set; number 0 is the empty one.

    Args:
        pipe: whose text encoders read them.
        form: of that pipeline.
        length: tokens that a text is padded to; None: as in a call of the pipeline.
        trained: whether its text encoders train.
    """

    def __init__(self, pipe: Any, form: Form, length: int | None, trained: bool) -> None:
        self._pipe, self._form = pipe, form
        self.length = text_length(pipe) if length is None else length
        self._texts, self._numbers = [""], {"": 0}
        self._kept = None if trained else Kept(lambda text: self._read([text]), self._device, "reading texts")

    def numbers(self, captions: Sequence[str]) -> Tensor:
        """Numbers (N, 1) of captions; new ones get the next."""
        for text in captions:
            if text not in self._numbers:
                self._numbers[text] = len(self._texts)
                self._texts.append(text)
        return torch.tensor([[self._numbers[text]] for text in captions])

    def given(self, numbers: Tensor) -> Given:
        """Arguments of the transformer for captions of the numbers (B, 1)."""
        wanted = [self._texts[number] for number in numbers[:, 0].tolist()]
        return self._read(wanted) if self._kept is None else self._kept.rows(wanted)

    def _read(self, captions: list[str]) -> Given:
        return self._form.texts(self._pipe, captions, self.length)

    def _device(self) -> torch.device:
        return self._pipe.transformer.device
