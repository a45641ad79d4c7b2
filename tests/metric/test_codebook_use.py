import math
from collections import Counter

import pytest
import torch

from carrara.metric.codebook_use import CodebookUse


def test_use_and_perplexity_are_those_of_counting():
    tokens = torch.randint(0, 40, (7, 9), generator=torch.Generator().manual_seed(0))
    metric = CodebookUse(64)
    metric.update(tokens[:3])
    metric.update(tokens[3:])
    counts = Counter(tokens.flatten().tolist())
    entropy = -sum(n / 63 * math.log(n / 63) for n in counts.values())
    found = metric.compute()
    assert found["codebook_use"].item() == len(counts) / 64
    assert found["codebook_perplexity"].item() == pytest.approx(math.exp(entropy), rel=1e-12)


def test_extremes():
    even, one = CodebookUse(8), CodebookUse(8)
    even.update(torch.arange(8).repeat(3))
    one.update(torch.full((2, 3), 5))
    assert {k: v.item() for k, v in even.compute().items()} == pytest.approx(
        {"codebook_use": 1.0, "codebook_perplexity": 8.0}
    )
    assert {k: v.item() for k, v in one.compute().items()} == {"codebook_use": 0.125, "codebook_perplexity": 1.0}
