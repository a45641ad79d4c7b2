"""How well autoregression guesses the tokens of held-out captions and pictures."""

import math

import torch
import torch.nn.functional as F

from carrara.callback.score import Setting, prefix
from carrara.metric.codebook_use import CodebookUse
from carrara.metric.mean import Mean
from carrara.model.autoregressive import AutoregressiveModel
from carrara.model.base import Model


class TokenLikelihood:
    """Logs `val/bits_per_token/{image,text}`: mean negative log₂-probability of the tokens, given those before.

    Beside each what it has to be below: `…_unigram`, of the tokens' own frequencies, so that no model without context
    does better on them, and `…_uniform`, log₂ of the number of tokens there are.

    Args:
        num_images: of each split; all if there are fewer.
        batch_size: pictures a forward pass.
    """

    def __init__(self, num_images: int, batch_size: int):
        self.num_images = num_images
        self.batch_size = batch_size

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        assert isinstance(model, AutoregressiveModel)
        network = model.network
        sizes = {"image": network.num_codes, "text": network.words.num_embeddings}
        scores = {}
        for split, indices in setting.validation.splits.items():
            nats = {name: Mean().to(setting.device) for name in sizes}
            use = {name: CodebookUse(size).to(setting.device) for name, size in sizes.items()}
            for chunk in setting.chunks(indices[: self.num_images], self.batch_size):
                batch = setting.validation.take(chunk)
                batch["images"] = batch["images"].to(setting.device)
                with torch.no_grad(), setting.autocast():
                    image, text, _ = model.predictions(batch, torch.zeros(len(chunk), dtype=torch.bool))
                for name, (logits, tokens) in zip(sizes, (image, text), strict=True):
                    nats[name].update(F.cross_entropy(logits, tokens, reduction="none").double().mean(), len(tokens))
                    use[name].update(tokens)
            for name, size in sizes.items():
                unigram = use[name].compute()["codebook_perplexity"]
                key = f"{prefix(split)}bits_per_token/{name}"
                scores[key] = float(nats[name].compute()) / math.log(2)
                scores |= {f"{key}_unigram": math.log2(float(unigram)), f"{key}_uniform": math.log2(size)}
        return scores
