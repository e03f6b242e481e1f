"""What a model returns: a tensor, a tuple or diffusers' output object. Its prediction comes first."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor


def prediction_of(output: Any) -> Tensor:
    """The prediction in what a model returned."""
    return output if isinstance(output, Tensor) else output[0]


def with_prediction(output: Any, prediction: Tensor | None) -> Any:
    """What the model returned, with another prediction in its place."""
    if isinstance(output, tuple):
        return (prediction, *output[1:])
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **{dataclasses.fields(output)[0].name: prediction})
    return prediction
