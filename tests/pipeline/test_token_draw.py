import pytest
import torch
from scipy import stats
from torch import Tensor

from carrara.pipeline.token_draw import drawn, truncated

PROBABILITIES = torch.tensor([0.05, 0.4, 0.02, 0.25, 0.03, 0.15, 0.1])


def reference(probabilities: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """The likeliest token, the next one, … until there are top_k or their share of those is top_p; renormalised."""
    order = sorted(range(len(probabilities)), key=lambda k: -float(probabilities[k]))[:top_k]
    total, kept, made_up = sum(float(probabilities[k]) for k in order), torch.zeros(len(probabilities)).double(), 0.0
    for k in order:
        if top_p is not None and made_up >= top_p:
            break
        kept[k] = probabilities[k]
        made_up += float(probabilities[k]) / total
    return kept / kept.sum()


CASES = [(None, None), (1, None), (3, None), (99, None), (None, 0.3), (None, 0.5), (None, 0.9), (None, 1.0), (4, 0.7)]


@pytest.mark.parametrize(("top_k", "top_p"), CASES)
def test_truncation_keeps_the_likeliest_tokens(top_k, top_p):
    logits = PROBABILITIES.log()[None] + torch.tensor([[0.0], [5.0]])
    found = truncated(logits, top_k, top_p).softmax(1).double()
    torch.testing.assert_close(found, reference(PROBABILITIES, top_k, top_p).expand(2, -1), atol=1e-6, rtol=0)


def test_truncation_of_many_rows_is_that_of_each():
    logits = 3 * torch.randn(50, 20)
    found = truncated(logits, 8, 0.8).softmax(1).double()
    wanted = torch.stack([reference(row.double().softmax(0), 8, 0.8) for row in logits])
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_the_logits_that_are_given_stay_as_they_are():
    logits = torch.randn(3, 9)
    before = logits.clone()
    truncated(logits, 2, 0.5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.6)])
def test_tokens_come_as_often_as_they_are_likely(top_k, top_p):
    count = 20_000
    u = torch.rand(count, 7).clamp(1e-7, 1 - 1e-7)
    tokens = drawn(truncated(PROBABILITIES.log().expand(count, -1), top_k, top_p), u)
    wanted = count * reference(PROBABILITIES, top_k, top_p)
    found = torch.bincount(tokens, minlength=7).double()
    assert not found[wanted == 0].any()
    assert stats.chisquare(found[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3
