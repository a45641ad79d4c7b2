from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from carrara.pipeline.autoregressive_prior import AutoregressivePrior
from tests.dalle2 import BUCKETS, COMPONENTS, autoregressive_prior, autoregressive_prior_model
from tests.tiny import CAPTIONS


@pytest.fixture
def made() -> AutoregressivePrior:
    torch.manual_seed(0)
    made = autoregressive_prior()
    for parameter in made.model.network.project_out.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # some buckets are likelier than others
    return made


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_candidates_are_embeddings_of_tokens_and_the_same_in_any_batch(made, scale):
    made = replace(made, guidance_scale=scale, candidates=3)
    numbers = torch.arange(4, 10)
    found = made.found(CAPTIONS[:6], numbers, 0)
    assert found.shape == (3, 6, 16) and len(found.flatten(0, 1).unique(dim=0)) > 9
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


@pytest.mark.slow
def test_a_trained_prior_makes_the_embeddings_of_the_captions_pictures():
    """One caption has two pictures, half of the time each, another one has a third; and each picture a little noise."""
    torch.manual_seed(0)
    model = autoregressive_prior_model(caption_dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    known = torch.randint(0, 256, (3, 3, 8, 8), generator=generator)

    def rows(positions: range) -> dict[str, Any]:
        which = [(0, 2, 1, 2)[k % 4] for k in positions]
        noise = torch.randint(-3, 4, (len(which), 3, 8, 8), generator=generator)
        captions = [CAPTIONS[5] if k == 2 else CAPTIONS[0] for k in which]
        images = (known[which] + noise).clamp(0, 255).to(torch.uint8)
        return {"images": images, "captions": captions, "positions": torch.tensor(positions)}

    model.network.tokens.measure(model.embeddings(model.images(rows(range(256)))))
    optimizer = torch.optim.AdamW(model.generator.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 150)
    for step in range(150):
        optimizer.zero_grad()
        model.loss(rows(range(32 * step, 32 * step + 32)))["loss"].backward()
        optimizer.step()
        scheduler.step()
    made = AutoregressivePrior(model.eval(), 1, 1.0, None, None, 1.0)
    truth = model.embeddings(known / 127.5 - 1)
    shares = []
    for caption in (CAPTIONS[0], CAPTIONS[5]):
        cosines = F.cosine_similarity(made([caption] * 200, range(200), 0)[:, None], truth, dim=2)
        shares.append([(cosines > 0.98)[:, k].float().mean().item() for k in range(3)])
    assert shares[0] == pytest.approx([0.5, 0.5, 0.0], abs=0.1)
    assert shares[1] == pytest.approx([0.0, 0.0, 1.0], abs=0.1)
