"""Perplexity, KL and agreement against sums written out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from qcompile.evaluate import compare, perplexity, sample_text
from qcompile.evaluate.quality import windows

VOCABULARY = 16


def table_model(seed):
    """A model whose logits depend on the token alone, exact small multiples of 1/8."""
    table = torch.randint(-16, 17, (VOCABULARY, VOCABULARY), generator=torch.Generator().manual_seed(seed)) / 8
    return table, lambda tokens: SimpleNamespace(logits=table[tokens])


@pytest.mark.parametrize(("total", "length"), [(2, 2), (9, 4), (8, 4), (10, 4), (5, 9), (13, 12)])
def test_windows_predict_every_token_once(total, length):
    ids = torch.arange(total)
    predicted = []
    for window, first in windows(ids, length):
        assert window.shape == (1, min(length, total))
        predicted += window[0, first:].tolist()
    assert len(predicted) == len(set(predicted))
    # The first token of each full window has no context.
    assert set(range(total)) - set(predicted) == set(range(0, total, length)) - set(predicted)
    assert predicted == sorted(predicted)


def test_against_sums_by_hand():
    ids = torch.randint(VOCABULARY, (23,), generator=torch.Generator().manual_seed(7))
    (p_table, model), (q_table, reference) = table_model(1), table_model(2)
    p, q = p_table.double().log_softmax(-1), q_table.double().log_softmax(-1)
    surprise, divergence, same = [], [], []
    for window, first in windows(ids, 6):
        for before, token in zip(window[0, first - 1 :].tolist(), window[0, first:].tolist(), strict=False):
            surprise.append(-p[before, token].item())
            divergence.append(
                sum(math.exp(a) * (a - b) for a, b in zip(q[before].tolist(), p[before].tolist(), strict=True))
            )
            same.append(p[before].argmax() == q[before].argmax())
    found = compare(model, reference, ids, 6)
    assert found.tokens == len(surprise)
    assert found.perplexity == pytest.approx(math.exp(sum(surprise) / len(surprise)))
    assert found.kl == pytest.approx(sum(divergence) / len(divergence))
    assert found.top1 == pytest.approx(sum(same) / len(same))
    assert perplexity(model, ids, 6) == found.perplexity


def test_a_model_is_no_distance_from_itself():
    ids = torch.randint(VOCABULARY, (50,), generator=torch.Generator().manual_seed(3))
    _, model = table_model(4)
    found = compare(model, model, ids, 16)
    assert (found.kl, found.top1) == (0, 1)


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    uniform = perplexity(lambda t: SimpleNamespace(logits=torch.zeros(*t.shape, VOCABULARY)), torch.arange(10), 4)
    assert uniform == pytest.approx(VOCABULARY)


@pytest.mark.parametrize(("tokens", "window"), [(1, 8), (8, 1), (0, 8)])
def test_too_short(tokens, window):
    with pytest.raises(ValueError, match="needs 2 tokens"):
        perplexity(table_model(0)[1], torch.zeros(tokens, dtype=torch.int64), window)


def test_the_text_ships_with_the_package():
    assert len(sample_text().split()) == 1659
