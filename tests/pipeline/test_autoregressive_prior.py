from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from carrara.pipeline.autoregressive_prior import AutoregressivePrior
from tests.dalle2 import BUCKETS, COMPONENTS, autoregressive_prior
from tests.tiny import CAPTIONS


@pytest.fixture
def made() -> AutoregressivePrior:
    torch.manual_seed(0)
    made = autoregressive_prior()
    torch.nn.init.normal_(made.model.network.project_out.weight, std=0.5)  # some buckets are likelier than others
    return made


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_candidates_are_embeddings_of_tokens_and_the_same_in_any_batch(made, scale):
    made = replace(made, guidance_scale=scale, candidates=3)
    numbers = torch.arange(4, 10)
    found = made.found(CAPTIONS[:6], numbers, 0)
    assert found.shape == (3, 6, 16) and len(found.flatten(0, 1).unique(dim=0)) == 18
    tokens = made.model.network.tokens
    torch.testing.assert_close(tokens.dequantise(tokens.quantise(found.flatten(0, 1))), found.flatten(0, 1))
    for k in range(6):
        torch.testing.assert_close(made.found([CAPTIONS[k]], numbers[k : k + 1], 0)[:, 0], found[:, k])
    assert not torch.equal(made.found(CAPTIONS[:6], numbers, 1), found)


def test_the_nearest_to_the_caption_is_taken(made):
    made = replace(made, candidates=4)
    taken = made(CAPTIONS[:6], range(6), 0)
    torch.testing.assert_close(taken.square().mean(1), torch.ones(6))
    texts = made.model.clip.text_directions(CAPTIONS[:6])
    cosines = F.cosine_similarity(made.found(CAPTIONS[:6], torch.arange(6), 0), texts, dim=2)
    torch.testing.assert_close(F.cosine_similarity(taken, texts), cosines.amax(0))
    assert (cosines.amax(0) > cosines[0]).any()


@torch.no_grad()
def test_tokens_follow_the_networks_probabilities(made):
    """The first two tokens of one caption, drawn often, against softmax(logits / temperature), brute force."""
    made, count = replace(made, candidates=1, temperature=0.7), 3000
    network = made.model.network
    tokens = network.tokens.quantise(made.found([CAPTIONS[3]] * count, torch.arange(count), 0)[0])
    told = made.model.told([CAPTIONS[3]] * BUCKETS)
    known = F.pad(torch.arange(BUCKETS)[:, None], (0, COMPONENTS - 1))
    first, second = (network(known, told)[:, place].double().div(0.7).softmax(1) for place in (0, 1))
    expected = first[0][:, None] * second
    pairs = torch.bincount(tokens[:, 0] * BUCKETS + tokens[:, 1], minlength=BUCKETS**2).double() / count
    assert (pairs - expected.flatten()).abs().max() < 4 * (expected.max() / count) ** 0.5
    assert expected.max() > 3 / BUCKETS**2  # they are not all alike


@torch.no_grad()
def test_guidance_leads_away_from_the_empty_caption(made):
    made, captions = replace(made, candidates=1, top_k=1, guidance_scale=2.5), CAPTIONS[:4]
    found = made.model.network.tokens.quantise(made.found(captions, torch.arange(4), 0)[0])
    known = torch.zeros(4, COMPONENTS, dtype=torch.int64)
    for place in range(COMPONENTS):
        yes, no = (made.model.network(known, made.model.told(of))[:, place] for of in (captions, [""] * 4))
        known[:, place] = (no + 2.5 * (yes - no)).argmax(1)
    assert torch.equal(found, known)
    plain = replace(made, guidance_scale=1.0)
    assert not torch.equal(plain.found(captions, torch.arange(4), 0)[0], made.found(captions, torch.arange(4), 0)[0])


@pytest.mark.parametrize(("setting", "value"), [("candidates", 0), ("temperature", 0.0), ("top_k", 0), ("top_p", 2.0)])
def test_impossible_settings_name_their_key(made, setting, value):
    with pytest.raises(ValueError, match=rf"pipeline\.{setting}={value}"):
        replace(made, **{setting: value})
