from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.autoencoder.discrete import Discrete
from carrara.evaluator.clip import CLIP
from carrara.pipeline.autoregressive import AutoregressiveToImage
from carrara.pipeline.base import Watch
from tests.tiny import CAPTIONS, autoregressive_model, awake, clip, gumbel, vq

SETTINGS: dict[str, Any] = {
    "evaluator": None, "temperature": 1.0, "top_k": None, "top_p": None, "guidance_scale": 1.0, "candidates": 1
}  # fmt: skip


def pipeline(autoencoder: Discrete | None = None, **changes: Any) -> AutoregressiveToImage:
    torch.manual_seed(0)
    model = autoregressive_model(autoencoder=autoencoder or vq(downsampling=2, patch=1)).eval()
    awake(model.network)
    for parameter in model.network.image_out.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # some tokens are likelier than others
    return AutoregressiveToImage(model, 8, **SETTINGS | changes)


def sampled(made: AutoregressiveToImage, captions: list[str], indices: list[int], seed: int = 0) -> Tensor:
    """What it samples, (B, 16)."""
    found: list[Tensor] = []
    original = made.model.autoencoder.latents_of

    def watched(tokens: Tensor, h: int, w: int) -> Tensor:
        found.append(tokens)
        return original(tokens, h, w)

    made.model.autoencoder.latents_of = watched  # type: ignore[method-assign]
    try:
        made(captions, indices, seed)
    finally:
        made.model.autoencoder.latents_of = original  # type: ignore[method-assign]
    return torch.cat(found)


def test_pictures_are_those_of_the_tokens():
    for autoencoder in (vq(downsampling=2, patch=1), gumbel(downsampling=2, patch=1)):
        made = pipeline(autoencoder)
        pictures = made(CAPTIONS[:3], [0, 1, 2], 0)
        assert pictures.shape == (3, 3, 8, 8) and pictures.abs().max() <= 1 and not pictures.requires_grad
        of = sampled(made, CAPTIONS[:3], [0, 1, 2])
        assert len(of.unique()) > 4
        torch.testing.assert_close(pictures, autoencoder.decode_tokens(of, 8, 8).clamp(-1, 1))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_picture_is_the_same_in_any_batch(scale):
    made = pipeline(guidance_scale=scale)
    whole = sampled(made, CAPTIONS[:6], [3, 4, 5, 6, 7, 8])
    for k in range(6):
        assert torch.equal(sampled(made, [CAPTIONS[k]], [3 + k])[0], whole[k])
    assert torch.equal(sampled(made, CAPTIONS[2:4], [5, 6]), whole[2:4])


def test_pictures_of_other_seeds_and_numbers_are_others():
    made = pipeline()
    of = sampled(made, ["a"] * 4, [0, 1, 2, 3])
    other = sampled(made, ["a"] * 4, [0, 1, 2, 3], seed=1)
    assert len({tuple(row.tolist()) for row in (*of, *other)}) == 8
    assert torch.equal(sampled(made, ["a"], [2])[0], of[2])


def test_the_likeliest_token_is_taken_with_top_k_1_and_in_the_limit_of_the_cold():
    greedy = sampled(pipeline(top_k=1), CAPTIONS[:4], [0, 1, 2, 3])
    assert torch.equal(sampled(pipeline(top_k=1), CAPTIONS[:4], [4, 5, 6, 7], seed=3), greedy)
    assert torch.equal(sampled(pipeline(temperature=1e-4), CAPTIONS[:4], [4, 5, 6, 7]), greedy)
    assert torch.equal(sampled(pipeline(top_p=1e-9), CAPTIONS[:4], [0, 1, 2, 3]), greedy)
    assert not torch.equal(sampled(pipeline(), CAPTIONS[:4], [0, 1, 2, 3]), greedy)


def test_the_temperature_is_that_of_the_distribution():
    """A single token of many pictures against softmax(logits / temperature)."""
    made = pipeline(temperature=0.5)
    logits = torch.tensor([1.0, 0.0, -0.5, 0.7]).expand(4000, -1)
    found = torch.bincount(made.draw.chooser(0, torch.arange(4000), "")(logits, 0), minlength=4) / 4000
    torch.testing.assert_close(found, (logits[0] / 0.5).softmax(0), atol=0.03, rtol=0)


def counted(made: AutoregressiveToImage) -> list[int]:
    sizes: list[int] = []
    made.model.network.blocks[0].register_forward_hook(lambda _, given, out: sizes.append(len(given[0])))
    return sizes


def test_guidance_of_one_is_off_and_of_zero_the_empty_caption():
    made = pipeline()
    sizes = counted(made)
    plain = sampled(made, CAPTIONS[:2], [0, 1])
    assert set(sizes) == {2}
    empty = sampled(made, ["", ""], [0, 1])
    made.draw = replace(made.draw, guidance_scale=0.0)
    sizes.clear()
    assert torch.equal(sampled(made, CAPTIONS[:2], [0, 1]), empty)
    assert set(sizes) == {4}
    made.draw = replace(made.draw, guidance_scale=1.0 + 1e-7)
    assert torch.equal(sampled(made, CAPTIONS[:2], [0, 1]), plain)


def test_guidance_extrapolates_logits():
    made = pipeline(guidance_scale=3.0, top_k=1)
    positive, negative = torch.randn(5, 16), torch.randn(5, 16)
    choose = made.draw.chooser(0, torch.arange(5), "")
    assert torch.equal(choose(torch.cat([positive, negative]), 0), (3 * positive - 2 * negative).argmax(1))
    made.draw = replace(made.draw, guidance_scale=1e6)  # the limit: what the caption makes likelier, by most
    choose = made.draw.chooser(0, torch.arange(5), "")
    assert torch.equal(choose(torch.cat([positive, negative]), 0), (positive - negative).argmax(1))


class Bright(CLIP):
    """Finds a picture the more similar to any caption, the brighter it is."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def embed_images(self, images: Tensor) -> Tensor:
        angle = images.mean((1, 2, 3))
        return torch.stack([angle.sin(), angle.cos()], dim=1)

    def embed_texts(self, captions: list[str]) -> Tensor:
        return torch.tensor([[1.0, 0.0]]).expand(len(captions), -1)


@pytest.mark.parametrize("evaluator", [Bright(), clip()])
@torch.no_grad()
def test_of_the_candidates_the_most_similar_is_taken(evaluator):
    made = pipeline(evaluator=evaluator, candidates=5)
    best = made(CAPTIONS[:4], [0, 1, 2, 3], 0)
    ids, mask = made.model.network.read(CAPTIONS[:4])
    all_tokens = [
        made.model.network.sample(ids, mask, (4, 4), made.draw.chooser(0, torch.arange(4), f"generation/{k}"))
        for k in range(5)
    ]
    pictures = torch.stack([made.model.autoencoder.decode_tokens(of, 8, 8).clamp(-1, 1) for of in all_tokens])
    texts = evaluator.embed_texts(CAPTIONS[:4])
    similarity = torch.stack([F.cosine_similarity(evaluator.embed_images(of), texts) for of in pictures])
    taken = similarity.argmax(0)
    assert len(taken.unique()) > 1
    for k in range(4):
        torch.testing.assert_close(best[k], pictures[taken[k], k], atol=1e-5, rtol=0)
    if isinstance(evaluator, Bright):
        assert torch.equal(taken, pictures.mean((2, 3, 4)).argmax(0))
    one = pipeline(evaluator=evaluator)(CAPTIONS[:4], [0, 1, 2, 3], 0)
    torch.testing.assert_close(one, pictures[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("autoencoder", [vq(downsampling=2, patch=1), gumbel(downsampling=2, patch=1)])
def test_a_row_of_codes_comes_in_at_a_time(autoencoder):
    made = pipeline(autoencoder, evaluator=Bright(), candidates=2)
    seen: list[tuple[int, float, Tensor]] = []
    pictures = made(CAPTIONS[:2], [0, 1], 0, lambda step, t, z, z_hat: seen.append((step, float(t), z)))
    assert [step for step, _, _ in seen] == list(range(4)) and made.num_steps == 4
    assert [t for _, t, _ in seen] == [0.75, 0.5, 0.25, 0.0]
    whole = seen[-1][2]
    for step, _, z in seen:
        assert torch.equal(z[:, :, : step + 1], whole[:, :, : step + 1]) and not z[:, :, step + 1 :].any()
    assert whole.abs().amax(1).gt(0).all()
    assert torch.equal(made.decode(whole), pictures)
    watch = Watch(made, 10, 2)
    assert torch.equal(made(CAPTIONS[:2], [0, 1], 0, watch), watch.frames[-1]) and len(watch.frames) == 4


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("temperature", 0, "pipeline.temperature=0 must be above 0"),
        ("temperature", -1.0, "pipeline.temperature=-1.0"),
        ("top_k", 0, "pipeline.top_k=0 must be a whole number"),
        ("top_k", 2.5, "pipeline.top_k=2.5"),
        ("top_p", 0.0, "pipeline.top_p=0.0 must be a probability"),
        ("top_p", 1.5, "pipeline.top_p=1.5"),
        ("candidates", 0, "pipeline.candidates=0 must be a whole number"),
        ("candidates", True, "pipeline.candidates=True"),
        ("candidates", 4, "pipeline.candidates=4 are ranked by an evaluator: part.evaluator"),
    ],
)
def test_impossible_settings_name_their_key(setting, value, says):
    with pytest.raises(ValueError, match=says):
        pipeline(**{setting: value})
