import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditkit.training.order import BatchNoise, SampleOrder, mix, split_rows


@given(st.integers(1, 40), st.integers(0, 5), st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_each_epoch_shows_every_sample_once(count, seed, takes):
    order = SampleOrder(count, seed)
    seen = torch.cat([order.take(n) for n in takes])
    for epoch in seen.split(count):
        assert len(set(epoch.tolist())) == len(epoch)
    assert order.position == divmod(len(seen), count)


@given(st.integers(1, 40), st.integers(0, 90), st.integers(1, 30))
def test_position_is_all_the_state(count, first, then):
    order = SampleOrder(count, 1)
    if first:
        order.take(first)
    twin = SampleOrder(count, 1)
    twin.position = order.position
    assert torch.equal(order.take(then), twin.take(then))


def test_periods_spread_samples_over_epochs():
    order = SampleOrder(6, 0, [1, 1, 3, 3, 3, 2])
    counts = torch.zeros(6)
    for _ in range(6):
        epoch = order.position[0]
        while order.position[0] == epoch:
            counts[order.take(1)] += 1
    assert counts.tolist() == [6, 6, 2, 2, 2, 3]


def test_noise_does_not_depend_on_the_split():
    whole = BatchNoise(1, 5, 8, torch.arange(8), torch.device("cpu"))
    parts = [BatchNoise(1, 5, 8, rows, torch.device("cpu")) for rows in split_rows(8, 4)]
    assert torch.equal(whole.normal(3), torch.cat([p.normal(3) for p in parts]))
    assert torch.equal(whole.uniform(), torch.cat([p.uniform() for p in parts]))


def test_noise_differs_by_step_and_seed():
    draws = [
        BatchNoise(s, n, 4, torch.arange(4), torch.device("cpu")).normal(2) for s in (0, 1) for n in (0, 1)
    ]
    assert len({tuple(d.flatten().tolist()) for d in draws}) == 4
    assert mix(1, 2) != mix(2, 1)


def test_uneven_split_is_refused():
    with pytest.raises(ValueError, match="batch_size=10"):
        list(split_rows(10, 4))
    with pytest.raises(ValueError, match="empty"):
        SampleOrder(0, 0)
