import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from carrara.pipeline.base import Pipeline
from carrara.pipeline.denoising import Draws, denoised
from carrara.pipeline.prior import Prior
from carrara.pipeline.unclip import UnCLIP, slerp
from tests.dalle2 import WIDTH, unclip
from tests.tiny import CAPTIONS, clip


@pytest.mark.parametrize("autoregressive", [False, True])
def test_embeddings_and_pictures_are_the_same_at_any_batch_size(autoregressive):
    made = unclip(autoregressive)
    embeddings = made.prior(CAPTIONS[:3], [0, 1, 2], 0)
    torch.testing.assert_close(embeddings.square().mean(1), torch.ones(3))
    ones = torch.cat([made.prior([CAPTIONS[k]], [k], 0) for k in range(3)])
    torch.testing.assert_close(ones, embeddings, atol=1e-4, rtol=0)
    whole = made(CAPTIONS[:3], [0, 1, 2], 0)
    torch.testing.assert_close(made([CAPTIONS[2]], [2], 0)[0], whole[2], atol=1e-4, rtol=0)
    assert whole.shape == (3, 3, 8, 8) and not torch.allclose(made(CAPTIONS[:3], [0, 1, 2], 1), whole, atol=0.01)


def test_of_the_candidates_the_nearest_to_the_caption_is_taken():
    made = unclip().prior
    assert isinstance(made, Prior)
    model, captions, positions = made.model, CAPTIONS[:8], torch.arange(8)
    told, nothing = model.told(captions), model.told([""] * 8)
    candidates = [
        denoised(model, told, nothing, (WIDTH,), Draws(0, positions, f"prior/{k}"), made.sampling) for k in range(4)
    ]
    cosines = torch.stack([F.cosine_similarity(c, model.clip.text_directions(captions)) for c in candidates])
    taken = replace(made, candidates=4)(captions, range(8), 0)
    best = F.cosine_similarity(taken, model.clip.text_directions(captions))
    torch.testing.assert_close(best, cosines.amax(0))
    assert (cosines.amax(0) > cosines[0]).any()  # there was something to choose
    with pytest.raises(ValueError, match=r"pipeline\.candidates"):
        replace(made, candidates=0)


def test_captions_come_in_through_the_prior_alone():
    made = unclip()
    embeddings = made.prior(CAPTIONS[:2], [0, 1], 5)
    known = replace(made, embeddings=embeddings)
    assert torch.equal(known(["", ""], [0, 1], 5), made(CAPTIONS[:2], [0, 1], 5))
    other = replace(made, embeddings=embeddings.flip(0))
    assert not torch.allclose(other(["", ""], [0, 1], 5), known(["", ""], [0, 1], 5), atol=1e-3)


def test_points_on_the_great_circle():
    a, b = torch.tensor([[2.0, 0, 0]]), torch.tensor([[0, 2.0, 0]])
    points = slerp(a, b, torch.tensor([[0.0], [1 / 3], [1.0]]))
    angle = math.pi / 6
    expected = 2 * torch.tensor([[1, 0, 0], [math.cos(angle), math.sin(angle), 0], [0, 1, 0]])
    torch.testing.assert_close(points, expected)
    assert torch.equal(slerp(a, a, torch.tensor([[0.0], [0.7]])), a.expand(2, -1))


def test_variations_are_of_the_pictures_embedding_and_ways_lead_from_one_to_the_other():
    made, images = unclip(), torch.rand(2, 3, 8, 8) * 2 - 1
    ends = made.model.clip.image_directions(images)
    one = made.varying(images[:1], 3).embeddings
    assert one is not None
    torch.testing.assert_close(one, ends[:1].expand(3, -1))
    way = made.varying(images, 5).embeddings
    assert way is not None
    torch.testing.assert_close(way[[0, -1]], ends)
    torch.testing.assert_close(way.square().mean(1), torch.ones(5))
    pictures = made.varying(images[:1], 3)([""] * 3, range(3), 0)
    assert not torch.allclose(pictures[0], pictures[1], atol=1e-3)  # other noise
    standing = made.varying(images[:1].expand(2, -1, -1, -1), 3)([""] * 3, range(3), 0)  # from a picture to itself
    torch.testing.assert_close(standing, standing[:1].expand(3, -1, -1, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("autoregressive", [False, True])
def test_a_prior_of_another_clip_is_refused(autoregressive):
    made = unclip(autoregressive)
    torch.manual_seed(9)
    made.prior.model.clip = clip()
    with pytest.raises(ValueError, match=r"part\.prior was trained with another CLIP than part\.clip"):
        UnCLIP(made.model, made.prior, 8, made.sampling)


def test_what_is_no_prior_is_refused():
    made = unclip()
    with pytest.raises(ValueError, match=r"part\.prior makes no embeddings"):
        replace(made, prior=made)  # type: ignore[arg-type]


@pytest.mark.parametrize("autoregressive", [False, True])
def test_a_prior_makes_no_pictures(autoregressive):
    made = unclip(autoregressive)
    assert isinstance(made, Pipeline) and not isinstance(made.prior, Pipeline)
