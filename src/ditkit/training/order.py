"""Which samples a step sees, and the random numbers it uses: functions of the seed and the position alone.

Nothing depends on how many processes share a batch or on what ran before, so a resumed run and a run on
more processes see the same samples and the same noise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch


class SampleOrder:
    """Endless shuffled epochs over `count` samples.

    Args:
        count: number of samples.
        seed: shuffles differ with the seed and the epoch.
        every: for each sample, in how many epochs it comes once (1: in each). Samples of period k are spread
            evenly over k successive epochs.

    `position` is (epoch, offset) of the next sample; assign it to continue from there.
    """

    def __init__(self, count: int, seed: int, every: Sequence[int] | None = None) -> None:
        if count < 1:
            raise ValueError("the data set is empty")
        self._period = torch.ones(count, dtype=torch.long) if every is None else torch.as_tensor(every)
        self._seed = seed
        self.position = (0, 0)
        self._epoch = (-1, torch.empty(0, dtype=torch.long))

    def _indices(self, epoch: int) -> torch.Tensor:
        if self._epoch[0] != epoch:
            due = ((torch.arange(len(self._period)) + epoch) % self._period == 0).nonzero()[:, 0]
            generator = torch.Generator().manual_seed(mix(self._seed, epoch))
            self._epoch = (epoch, due[torch.randperm(len(due), generator=generator)])
        return self._epoch[1]

    def take(self, count: int) -> torch.Tensor:
        """The next `count` sample indices `(count,)`, int64; moves `position` on."""
        epoch, offset = self.position
        parts: list[torch.Tensor] = []
        while count:
            indices = self._indices(epoch)
            part = indices[offset : offset + count]
            parts.append(part)
            count -= len(part)
            offset += len(part)
            if offset >= len(indices):
                epoch, offset = epoch + 1, 0
        self.position = (epoch, offset)
        return torch.cat(parts)


def mix(*numbers: int) -> int:
    """One 63-bit seed from several small integers, different for different tuples (splitmix64 steps)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class BatchNoise:
    """Random numbers for the rows of a global batch that this process holds.

    Each draw is made for the whole batch and the rows are picked from it, so that the split over processes
    and accumulation steps changes nothing.

    Attributes:
        step: updates made before this one.
        batch_size: of the whole batch.
        rows: which rows of it these are, (B,), int64 on the CPU.
    """

    def __init__(
        self, seed: int, step: int, batch_size: int, rows: torch.Tensor, device: torch.device
    ) -> None:
        self._generator = torch.Generator().manual_seed(mix(seed, step, 1))
        self.step = step
        self.batch_size = batch_size
        self.rows = rows
        self._device = device

    def first(self, count: int) -> BatchNoise:
        """The same draws for the first `count` of these rows alone."""
        fewer = copy.copy(self)  # both draw from the one generator
        fewer.rows = self.rows[:count]
        return fewer

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers `(rows, *shape)`."""
        return torch.randn(self.batch_size, *shape, generator=self._generator)[self.rows].to(self._device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), `(rows, *shape)`."""
        return torch.rand(self.batch_size, *shape, generator=self._generator)[self.rows].to(self._device)

    def shared(self) -> float:
        """One uniform number in [0, 1), the same for every row of the batch."""
        return float(torch.rand((), generator=self._generator))

    def shared_generator(self) -> torch.Generator:
        """A CPU generator for draws of any size that are the same for every row of the batch."""
        seed = torch.randint(2**62, (), generator=self._generator)
        return torch.Generator().manual_seed(int(seed))


def split_rows(batch_size: int, parts: int) -> Iterator[torch.Tensor]:
    """The rows of a batch in `parts` equal, contiguous pieces."""
    if batch_size % parts:
        raise ValueError(
            f"batch_size={batch_size} can't be shared equally by {parts} (processes x accumulation)"
        )
    yield from torch.arange(batch_size).chunk(parts)
