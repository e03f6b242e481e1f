"""What a file of this folder gives: the options of a kind of adapter, and peft's configuration of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from peft import PeftConfig


class Adapter:
    """A kind of adapter; a subclass is a frozen dataclass of its options.

    Attributes:
        learning_rate: what `ditkit adapt` trains with where nothing else is asked for.
        convolutions: whether it adapts full convolutions too, or linear maps alone.
    """

    learning_rate: ClassVar[float] = 1e-4
    convolutions: ClassVar[bool] = True

    def config(self, layers: Sequence[str], saved: Sequence[str] = ()) -> PeftConfig:
        """peft's configuration.

        Args:
            layers: names of the layers it adapts.
            saved: names of modules of which it has a copy of its own, such as a table of classes.
        """
        raise NotImplementedError

    def rates(self) -> Mapping[str, float]:
        """Learning rates of parameters that do not follow the run's, by the name they have in a layer."""
        return {}


def shared_settings(layers: Sequence[str], saved: Sequence[str]) -> dict[str, Any]:
    """The settings that the configurations of all kinds call alike."""
    return {"target_modules": sorted(layers), "modules_to_save": sorted(saved) or None}
