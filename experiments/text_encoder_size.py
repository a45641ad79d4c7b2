"""Does the size of the text encoder matter more than that of the U-Net? (Imagen, Saharia et al. 2022, figure 4.)

`python -m experiments.text_encoder_size` prints the tables of experiments/README.md and draws
experiments/text_encoder_size.png: Fréchet distance against CLIP score over guidance scales.
"""

from pathlib import Path

import torch

from carrara.conditioner.pretrained import Pretrained
from carrara.data.shapes import COLORS
from carrara.run_folder import load_config
from experiments.tools import last_scores, scores, table, trained

UNETS = {"U-Net 64": 64, "U-Net 96": 96}  # channels
FROZEN = {  # a masked language model's depth, width, heads; the layer that is read, null being the last, as in Imagen
    "1 × 32": (1, 32, 2, "null"),
    "2 × 64": (2, 64, 4, "null"),
    "4 × 128": (4, 128, 4, "null"),
    "2 × 64 first layer": (2, 64, 4, "1"),
    "4 × 128 first layer": (4, 128, 4, "1"),
}
ALONG = {  # trained along with the U-Net
    "bag of words": ["conditioner.depth=0"],  # a vector a word, and no position: order-blind
    "transformer": [],
}
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
NUM_IMAGES = 256


def encoder(name: str) -> list[str]:
    if name in ALONG:
        return ["conditioner=text", *ALONG[name]]
    *size, layer = FROZEN[name]
    sizes = zip(("depth", "width", "heads"), size, strict=True)
    return [
        "conditioner=language_model",
        f"conditioner.layer={layer}",
        *(f"size.language_model.{key}={value}" for key, value in sizes),
    ]


def telling_apart(run: Path) -> list[str]:
    """Of a run's frozen encoder: perplexity, and how far apart eight colours lie at the colour's own place, by layer.

    The root mean square of the differences from the colours' mean, over that of the features; of the embeddings first.
    """
    config = load_config(run)
    part = Path(config["part"]["language_model"])
    node, apart = config["conditioner"], []
    for layer in range(config["language_model"]["depth"] + 1):
        encoder = Pretrained(str(part), node["width"], node["max_length"], layer=layer)
        with torch.no_grad():
            said = encoder([f"a large {colour} circle on black" for colour in COLORS])
        assert said.mask.all()  # every colour is one token, so the places agree
        differences = (said.tokens - said.tokens.mean(0)).square().mean((0, 2)).sqrt()
        apart.append(float(differences.max() / said.tokens.square().mean().sqrt()))
    return [f"{last_scores(part.parent)['val/perplexity']:.2f}", ", ".join(f"{one:.2f}" for one in apart)]


def main() -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 5), constrained_layout=True)
    rows, encoders = [], []
    for (unet, channels), style in zip(UNETS.items(), ("--", "-"), strict=True):
        for k, name in enumerate([*ALONG, *FROZEN]):
            overrides = ["experiment=text_encoder_size", f"network.channels=[{channels}]", *encoder(name)]
            label = f"{channels}-{name}".replace(" × ", "x").replace(" ", "_")
            run = trained("text_encoder_size", label, overrides)
            if name in FROZEN and FROZEN[name][-1] == "null" and unet == "U-Net 64":
                encoders.append([name, *telling_apart(run)])
            found = [scores(run, NUM_IMAGES, {"guidance_scale": scale}) for scale in SCALES]
            # the scale is chosen on captions of seen combinations, and judged on the held-out ones
            best = max(found, key=lambda one: one["val_seen/prompt_accuracy/all"])
            columns = ("prompt_accuracy/all", "prompt_accuracy/relation", "fd_evaluator", "clip_score")
            rows.append([unet, name, *(f"{best[f'val/{column}']:.3f}" for column in columns)])
            axis.plot(
                [one["val/clip_score"] for one in found], [one["val/fd_evaluator"] for one in found],
                style, marker="o", color=f"C{k}", label=f"{unet}, {name}",
            )  # fmt: skip
    axis.set(xlabel="CLIP score (evaluator)", ylabel="Fréchet distance (evaluator)", yscale="log")
    axis.legend(fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)
    print(table(["frozen", "perplexity", "colours apart, by layer"], encoders), end="\n\n")
    print(table(["U-Net", "text encoder", "all", "relation", "fd_evaluator", "clip_score"], rows))


if __name__ == "__main__":
    main()
