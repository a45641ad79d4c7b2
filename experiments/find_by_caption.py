"""How well `shards.py do=search` finds a picture by its own caption: `python -m experiments.find_by_caption EVALUATOR`.

Of the captioned shapes that nothing was trained on, half of them with combinations that were held out; where a caption
occurs twice, its first picture. `EVALUATOR` is the folder of a component or run; the shapes are those of `data/shapes`.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from carrara.component import load_component
from carrara.config import build, compose
from carrara.data.module import ShardData
from carrara.evaluator.clip import CLIP
from carrara.parts import find_component
from carrara.search.embeddings import embed_shards, embed_texts
from carrara.search.index import Approximate, Exact, recall

ROOT = Path(__file__).parents[1]


def main(name: str) -> None:
    folder = find_component(name, "evaluator", Path("runs"))
    evaluator, _ = load_component(folder, "evaluator")
    assert isinstance(evaluator, CLIP)
    node = compose(ROOT / "conf", "shards", ["do=search"]).config["data"]
    data: ShardData = build({**node, "urls": node["val_urls"], "val_urls": None, "val_samples": 1, "make": None})
    samples = data.samples()
    with tempfile.TemporaryDirectory() as place:
        embeddings = embed_shards(data.manifest, samples, evaluator, Path(place), 256, 0)
        assert embeddings is not None
        first: dict[str, int] = {}
        for k in range(len(embeddings)):
            first.setdefault(samples.caption(k), k)
        queries = embed_texts(evaluator, list(first))
        print(f"{len(first)} distinct captions of {len(embeddings)} pictures")
        path = Path(place) / "index.faiss"
        Approximate.build(embeddings, path, queries)
        exact, approximate = (one.search(queries, 10)[1] for one in (Exact(embeddings), Approximate(path, embeddings)))
        for count in (1, 10):
            found = np.mean([own in ids[:count] for own, ids in zip(first.values(), exact.tolist(), strict=True)])
            print(f"its own picture is among the first {count}: {found:.3f}")
        print(f"of the ten nearest the approximate index finds {recall(approximate, exact):.4f}")


if __name__ == "__main__":
    main(sys.argv[1])
