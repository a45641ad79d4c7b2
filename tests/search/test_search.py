import json
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from carrara.command import search as command
from carrara.command import shards
from carrara.data.manifest import Manifest
from carrara.data.reader import Decoding, Samples, ShardReader
from carrara.errors import UserError
from carrara.search import embeddings as embeddings_module
from carrara.search import index as index_module
from carrara.search.embeddings import Embeddings, embed_shards
from carrara.search.index import Approximate, Exact, near_duplicates, open_index, recall
from tests.tiny import evaluator_model


class Rows(Embeddings):
    """Embeddings that are given."""

    def __init__(self, rows: np.ndarray, shards: int = 3) -> None:
        self.parts = [part.astype(np.float16) for part in np.array_split(rows, shards)]
        self.starts = np.cumsum([0, *map(len, self.parts)])


def clustered(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows of unit length around a thousand centres, as embeddings of pictures lie."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(1000, width))
    rows = centres[rng.integers(0, 1000, count)] + 0.5 * rng.normal(size=(count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_rows_and_blocks_are_those_of_the_shards():
    rows = clustered(100, 8)
    held = Rows(rows, 7)
    assert (len(held), held.width) == (100, 8)
    ids = np.array([99, 0, -1, 50, 50])
    wanted = np.where(ids[:, None] >= 0, rows[ids], 0)
    np.testing.assert_allclose(held.rows(ids), wanted, atol=1e-3)
    blocks = list(held.blocks(6))
    assert np.concatenate([first + np.arange(len(block)) for first, block in blocks]).tolist() == list(range(100))
    np.testing.assert_allclose(np.concatenate([block for _, block in blocks]), rows, atol=1e-3)


def test_exact_search_is_a_sort_of_all_cosines():
    rows = clustered(500, 16)
    queries = clustered(5, 16, seed=1).astype(np.float32)
    scores, ids = Exact(Rows(rows)).search(queries, 7)
    truth = queries @ rows.astype(np.float16).astype(np.float32).T
    np.testing.assert_array_equal(ids, np.argsort(-truth, axis=1, kind="stable")[:, :7])
    np.testing.assert_allclose(scores, np.sort(truth, axis=1)[:, ::-1][:, :7], rtol=1e-6)
    few, ids = Exact(Rows(rows[:3])).search(queries, 7)
    assert (ids[:, 3:] == -1).all() and np.isneginf(few[:, 3:]).all()


def test_of_equal_pictures_the_first_are_found(monkeypatch):
    """In blocks that end within a run of equals, which are more than are asked for."""
    rows = np.repeat(clustered(4, 16), 30, axis=0)
    held = Rows(rows)
    monkeypatch.setattr(held, "blocks", lambda: Embeddings.blocks(held, 7))
    scores, ids = Exact(held).search(rows[[0, 30, 60, 90]].astype(np.float32), 10)
    assert ids.tolist() == [list(range(first, first + 10)) for first in (0, 30, 60, 90)]
    assert (scores > 0.99).all()


@pytest.mark.parametrize("kind", ["exact", "approximate"])
def test_a_row_of_zeros_is_like_nothing(tmp_path, kind):
    """Also where all others are unlike, and their cosines below its 0."""
    rows = clustered(600, 16)
    held = Rows(rows)
    query = -rows.sum(axis=0, dtype=np.float32)[None]
    rows = rows[(rows @ query[0]) < -0.1]
    rows[[3, 7]] = 0
    held = Rows(rows)
    index: Exact | Approximate = Exact(held)
    if kind == "approximate":
        Approximate.build(held, tmp_path / "x.faiss", query.astype(np.float32))
        index = Approximate(tmp_path / "x.faiss", held)
    scores, ids = index.search(query.astype(np.float32), 10)
    assert (scores < 0).all() and not {3, 7} & set(ids[0].tolist())
    few = Rows(np.concatenate([rows[:2], np.zeros((4, 16))]))
    assert Exact(few).search(query.astype(np.float32), 4)[1][0].tolist()[2:] == [-1, -1]


def test_many_equals_take_no_more_memory_than_others():
    """Rows that are zero, or all the same, are as near to one another as there are rows."""
    rows = clustered(6000, 16)
    rows[17] = 0
    rows[1000:4000] = rows[0]
    wanted = [0, *range(1000, 4000)]
    tracemalloc.start()
    (group,) = near_duplicates(Rows(rows), Exact(Rows(rows)), 0.999)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert group == wanted, peak
    assert peak < 2000 * 2000 * 32  # bytes for every cosine of a shard's rows with one another's


def test_two_searches_build_an_index_once(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "EXACT_UP_TO", 1000)
    held = Rows(clustered(3000, 16))
    built = []
    both = threading.Barrier(2)

    def build(embeddings, path, queries):
        built.append(path)
        time.sleep(0.2)  # the other comes meanwhile
        real(embeddings, path, queries)

    def search(_):
        both.wait()
        return open_index(held, tmp_path, "a", lambda: np.empty((0, 16), dtype=np.float32))

    real = Approximate.build
    monkeypatch.setattr(Approximate, "build", build)
    with ThreadPoolExecutor(2) as pool:
        assert all(isinstance(one, Approximate) for one in pool.map(search, range(2)))
    assert len(built) == 1


def test_the_approximate_neighbours_are_the_exact_ones(tmp_path):
    held = Rows(clustered(30_000, 32))
    Approximate.build(held, tmp_path / "x.faiss", clustered(64, 32, seed=3).astype(np.float32))
    pictures = held.rows(np.arange(200)) + 0.05 * np.random.default_rng(2).normal(size=(200, 32)).astype(np.float32)
    elsewhere = clustered(200, 32, seed=1).astype(np.float32)  # as sentences are
    for queries in (pictures, elsewhere):
        scores, ids = Approximate(tmp_path / "x.faiss", held).search(queries, 10)
        truth, wanted = Exact(held).search(queries, 10)
        assert recall(ids, wanted) >= 0.99
    np.testing.assert_allclose(scores[:, 0], truth[:, 0], atol=1e-6)  # its cosines are those of the rows
    assert [path.name for path in tmp_path.iterdir()] == ["x.faiss"]


def test_many_rows_get_an_index_that_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "EXACT_UP_TO", 1000)
    held = Rows(clustered(3000, 16))

    def none() -> np.ndarray:
        return np.empty((0, 16), dtype=np.float32)

    assert isinstance(open_index(Rows(clustered(999, 16)), tmp_path, "a", none), Exact)
    assert isinstance(open_index(held, tmp_path, "b", none), Approximate)
    monkeypatch.setattr(Approximate, "build", lambda *_: pytest.fail("built again"))
    open_index(held, tmp_path, "b", none)


def test_near_duplicates_are_found_in_groups():
    rows = clustered(300, 64)
    rng = np.random.default_rng(1)
    rows[250] = rows[17]
    rows[299] = rows[17] + 0.005 * rng.normal(size=64)
    rows[40] = rows[41]
    rows[5] = rows[6] = 0  # two that could not be decoded are not alike
    rows[299] /= np.linalg.norm(rows[299])
    assert near_duplicates(Rows(rows), Exact(Rows(rows)), 0.99) == [[17, 250, 299], [40, 41]]


# --- of shards ---


@pytest.fixture
def evaluator():
    torch.manual_seed(0)
    return evaluator_model().evaluator.eval()


@pytest.fixture
def samples(manifest: Manifest) -> Samples:
    return Samples(ShardReader(manifest, 4), Decoding(8, ".txt"))


def test_every_picture_has_its_row_wherever_it_is_embedded(manifest, samples, evaluator, tmp_path):
    held = embed_shards(manifest, samples, evaluator, tmp_path / "e", 5, 0)
    assert held is not None and len(held) == 48
    for k in (0, 13, 47):
        image = torch.from_numpy(np.array(samples.load(k).image))[None]
        row = embeddings_module.embed_images(evaluator, image)[0]
        np.testing.assert_allclose(held.rows(np.array([k]))[0], row, atol=1e-3)
        assert np.linalg.norm(row) == pytest.approx(1)


def test_shards_that_others_embed_are_left_to_them(manifest, samples, evaluator, tmp_path, monkeypatch):
    place = tmp_path / "e"
    place.mkdir()
    first = place / embeddings_module._name(manifest.shards[0])
    with FileLock(first.with_suffix(".lock")):
        assert embed_shards(manifest, samples, evaluator, place, 5, 0) is None
    assert len(list(place.glob("*.npy"))) == 3
    calls = []
    real = embeddings_module.embed_images

    def embed(*given):
        calls.append(given)
        return real(*given)

    monkeypatch.setattr(embeddings_module, "embed_images", embed)
    assert embed_shards(manifest, samples, evaluator, place, 50, 0) is not None
    assert len(calls) == 1  # the shard that was missing
    first.write_bytes(first.read_bytes()[:-64])
    with pytest.raises(UserError, match="is damaged"):
        embed_shards(manifest, samples, evaluator, place, 50, 0)


def test_a_picture_that_cannot_be_decoded_is_like_nothing(write_shard, sample, evaluator, tmp_path):
    shard = {f"{k}": sample(k) for k in range(4)}
    shard["2"]["png"] = b"broken"
    found = Manifest.load([str(write_shard("a.tar", shard))], tmp_path / "cache")
    held = embed_shards(found, Samples(ShardReader(found), Decoding(8, ".txt")), evaluator, tmp_path / "e", 4, 0)
    assert held is not None
    assert not held.rows(np.array([2])).any() and held.rows(np.array([1, 3])).any(axis=1).all()


@pytest.fixture
def order(write_shard, evaluator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "find_component", lambda *_: Path("part"))
    monkeypatch.setattr(command, "load_component", lambda *_: (evaluator, {"sha256": "5" * 64}))
    conf = Path(__file__).parents[2] / "conf"
    write_shard("a.tar", range(40))

    def run(*overrides: str) -> Path:
        given = ["do=search", "data=laion", "size=demo", "data.urls=a.tar", "data.num_workers=0", "out=found"]
        shards.main(conf, [*given, "part.evaluator=part", *overrides])
        return tmp_path / "found"

    return run


def test_a_sentence_and_a_picture_find_pictures(order, tmp_path, capsys):
    found = order("query=a red circle, {left} of what's 'blue'", "num_results=5")
    results = json.loads((found / "results.json").read_text())
    cosines = [one["cosine"] for one in results]
    assert len(results) == 5 and cosines == sorted(cosines, reverse=True)
    assert Image.open(found / "grid.png").size == (5 * 32, 32)
    assert "a.tar/0000" in capsys.readouterr().out
    Image.new("RGB", (8, 8), (7, 0, 77)).save(tmp_path / "x.png")
    order("image=x.png", "num_results=40")
    results = json.loads((found / "results.json").read_text())
    (same,) = [one for one in results if one["key"] == "a.tar/000007"]
    assert same["cosine"] == pytest.approx(results[0]["cosine"], abs=1e-3) == pytest.approx(1, abs=1e-3)


def test_duplicates_are_written_down(order, capsys):
    found = order("duplicates=0.0")
    (group,) = json.loads((found / "duplicates.json").read_text())
    assert len(group) == 40 and "39 of 40 pictures" in capsys.readouterr().out


@pytest.mark.parametrize("caption", [".txt", "other"])
def test_pictures_without_a_caption_are_found_and_broken_ones_never(order, write_shard, sample, capsys, caption):
    shard = {str(k): sample(k, {"other": f"a {k}" if k != 3 else None}) for k in range(6)}
    shard["2"]["png"] = b"broken"
    del shard["3"]["txt"]
    write_shard("a.tar", shard)
    found = order("query=a red circle", f"data.caption={caption}")
    results = json.loads((found / "results.json").read_text())
    assert sorted(one["key"] for one in results) == [f"a.tar/{k}" for k in (0, 1, 3, 4, 5)]
    (without,) = [one["caption"] for one in results if one["key"] == "a.tar/3"]
    assert without == ("" if caption == ".txt" else "(no_caption)")
    assert Image.open(found / "grid.png").size == (5 * 32, 32)


@pytest.mark.parametrize("left", [b"", b"\x93NUMPY\x01\x00", -64])
def test_damaged_embeddings_are_named(order, left):
    order("query=a")
    (path,) = Path("runs/cache").rglob("*.npy")
    path.write_bytes(path.read_bytes()[:left] if isinstance(left, int) else left)
    with pytest.raises(UserError, match=rf"{path.name} is damaged; remove it"):
        order("query=a")


def test_not_one_picture_that_can_be_decoded(order, write_shard, sample):
    write_shard("a.tar", {str(k): {**sample(k), "png": b"broken"} for k in range(3)})
    with pytest.raises(UserError, match="not one picture can be decoded"):
        order("query=a", "data.val_samples=1")
    found = order("duplicates=-1", "data.val_samples=1")
    assert json.loads((found / "duplicates.json").read_text()) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["query=a", "num_results=0"], "num_results must be a whole number from 1 on, not 0"),
        (["query=a", "num_results=2.5"], r"num_results must be a whole number from 1 on, not 2\.5"),
        (["query=a", "batch_size=0"], "batch_size must be"),
        (["query=a", "num_processes=0"], "num_processes must be"),
        (["duplicates=abc"], "duplicates=abc is a cosine"),
        (["duplicates=98"], "duplicates=98 is a cosine"),
        ([], "say what to search for"),
        (["query=a", "image=b"], "say what to search for"),
        (["query=a", "part.evaluator=null"], r"part\.evaluator=…"),
        (["image=nowhere.png"], r"image=nowhere\.png cannot be read"),
        (["image=a.tar"], r"image=a\.tar is no picture"),
    ],
)
def test_mistakes_are_named(order, overrides, message):
    with pytest.raises(UserError, match=message):
        order(*overrides)
