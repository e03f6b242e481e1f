import numpy as np
import pytest
import torch

from ditkit.analysis.evaluate import UNSEEN, Judge, evaluate
from ditkit.data.emoji import EmojiDataset
from tiny_pipelines import flux


@pytest.fixture(scope="module")
def judge():
    return Judge()


def test_true_pictures_are_recognised_and_others_are_not(judge):
    rows = list(range(0, 3779, 97))
    pictures = judge.dataset.images(rows).permute(0, 2, 3, 1).numpy() / 2 + 0.5
    captions = [judge.dataset.captions[i] for i in rows]
    assert judge(pictures, captions) == 1.0
    assert judge(pictures, captions[1:] + captions[:1]) == 0.0
    assert judge(np.roll(pictures, 1, axis=0), captions) == 0.0


def test_small_noise_and_small_shifts_do_not_change_the_nearest(judge):
    rows = list(range(0, 3779, 97))
    noisy = judge.dataset.images(rows) + 0.1 * torch.randn(
        len(rows), 3, 64, 64, generator=torch.Generator().manual_seed(0)
    )
    assert (judge.nearest(noisy) == torch.tensor(rows)).float().mean() > 0.9


def test_prompts_outside_the_set_are_not_scored(judge):
    picture = np.ones((1, 64, 64, 3), np.float32)
    assert np.isnan(judge(picture, ["an unheard-of thing"]))


def test_unseen_captions_are_unseen():
    assert not set(UNSEEN) & set(EmojiDataset().captions)


def test_evaluate_counts(monkeypatch):
    pipe = flux()
    result = evaluate(pipe, count=3, steps=1, batch=2)
    assert len(result.captions) == 3 and result.accuracy == 1 - len(result.wrong) / 3
    assert sum(asked for _, asked in result.by_group.values()) == 3
    assert result.captions == evaluate(pipe, count=3, steps=1, batch=2, unseen=False).captions
    with pytest.raises(ValueError, match="count=0"):
        evaluate(pipe, count=0)
