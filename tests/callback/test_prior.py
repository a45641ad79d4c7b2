import pytest
import torch
import torch.nn.functional as F

from carrara.callback.prior import PriorScore
from tests.dalle2 import unclip
from tests.tiny import CAPTIONS, batch, setting


@pytest.mark.parametrize("autoregressive", [False, True])
@torch.no_grad()
def test_cosines_are_those_of_the_pictures_own_embeddings(autoregressive):
    made = unclip(autoregressive).prior
    model = made.model
    scores = PriorScore(lambda model: made, seed=0, num_images=6, batch_size=6)(model, setting(20))
    rows = batch(range(0, 12, 2))  # the held-out ones
    truth = model.clip.image_directions(rows["images"].float() / 127.5 - 1)
    guess = made(rows["captions"], range(0, 12, 2), 0)
    texts = model.clip.text_directions(rows["captions"])
    assert scores["val/prior_cosine"] == pytest.approx(F.cosine_similarity(guess, truth).mean().item(), abs=1e-5)
    assert scores["val/text_cosine"] == pytest.approx(F.cosine_similarity(texts, truth).mean().item(), abs=1e-5)
    shuffled = F.cosine_similarity(guess.roll(1, 0), truth).mean().item()
    assert scores["val/shuffled_cosine"] == pytest.approx(shuffled, abs=1e-5)
    assert scores["val/num_images"] == 6 and "val_seen/prior_cosine" in scores and CAPTIONS[0] == rows["captions"][0]
