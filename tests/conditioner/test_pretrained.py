"""Each family as a tiny model with random weights and its own tokenizer, saved as `transformers` saves them."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from carrara.architecture import meta_modules
from carrara.callback.checkpoint_file import VerifiedCheckpointIO
from carrara.callback.ema import EMA
from carrara.component import load_component, save_component
from carrara.conditioner.pretrained import Pretrained
from carrara.config import build, compose
from carrara.errors import UserError
from carrara.model.conditioned import Conditioned
from carrara.model.diffusion import DiffusionModel
from tests.tiny import CAPTIONS, batches, diffusion_model, trainer

CONF = Path(__file__).parents[2] / "conf"
WIDTH = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
CAPTION = "a big red disc"
CARD = {"fingerprint": "", "data": {}, "scores": {}}


# --- tiny models ---


def bert(folder: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = transformers.BertTokenizer(vocab={piece: k for k, piece in enumerate(pieces)})
    config = transformers.BertConfig(
        vocab_size=len(pieces),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    save(folder, transformers.BertModel(config), tokenizer)  # with the pooler, as the hub's has it


def gpt2(folder: Path) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings: dict[str, Any] = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet}
    backend.train_from_iterator(CAPTIONS, trainers.BpeTrainer(vocab_size=300, show_progress=False, **settings))
    bpe = json.loads(backend.to_str())["model"]
    tokenizer = transformers.GPT2Tokenizer(vocab=bpe["vocab"], merges=[tuple(merge) for merge in bpe["merges"]])
    config = transformers.GPT2Config(
        vocab_size=len(bpe["vocab"]), n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    save(folder, transformers.GPT2Model(config), tokenizer)


def t5(folder: Path) -> None:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS), *LETTERS]
    scores = [0.0, 0.0, 0.0, -2.0, *(-3.0 for _ in WORDS), *(-5.0 for _ in LETTERS)]
    tokenizer = transformers.T5Tokenizer(vocab=list(zip(pieces, scores, strict=True)), extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(pieces), d_model=WIDTH, d_kv=4, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    save(folder, transformers.T5ForConditionalGeneration(config), tokenizer)  # the decoder is not read


def clip_tokenizer() -> Any:
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={piece: k for k, piece in enumerate(pieces)}, merges=[])


def clip_settings(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
        "eos_token_id": 2,  # the published models have this one, which is not their end token's
    }


def clip(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    vision = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(
        text_config=clip_settings(len(tokenizer)), vision_config={**vision, "intermediate_size": 16}, projection_dim=4
    )
    save(folder, transformers.CLIPModel(config), tokenizer)  # both towers, as the hub has them


def clip_text_model(folder: Path) -> None:
    tokenizer = clip_tokenizer()
    config = transformers.CLIPTextConfig(**clip_settings(len(tokenizer)))
    save(folder, transformers.CLIPTextModel(config), tokenizer)


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    """With weights large enough that every token matters, also where they start at zero."""
    generator = torch.Generator().manual_seed(len(folder.name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "bert": bert,
    "gpt2": gpt2,
    "t5": t5,
    "clip": clip,
    "clip_text_model": clip_text_model,
}
TEXT_MODELS = {
    "bert": "BertModel",
    "gpt2": "GPT2Model",
    "t5": "T5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    for name, make in FAMILIES.items():
        make(root / name)
    return {name: root / name for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(folders: dict[str, Path], family: str) -> Path:
    return folders[family]


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A BERT to break."""
    return Path(shutil.copytree(folders["bert"], tmp_path / "bert"))


def pretrained(folder: Path, max_length: int = 24) -> Pretrained:
    return Pretrained(str(folder), WIDTH, max_length)


def model_with(folder: Path) -> DiffusionModel:
    return diffusion_model(conditioner=pretrained(folder))


def bits(conditioner: Pretrained) -> str:
    digest = hashlib.sha256()
    for parameter in conditioner.encoder.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


# --- what it gives ---


def test_captions_become_tokens_a_mask_and_one_vector(folder):
    conditioning = pretrained(folder)([CAPTION, "", "red"])
    count, length = conditioning.mask.shape
    assert conditioning.tokens.shape == (count, length, WIDTH) and conditioning.pooled.shape == (3, WIDTH)
    assert conditioning.tokens.dtype == conditioning.pooled.dtype == torch.float32
    assert conditioning.mask.dtype == torch.bool and conditioning.mask[0].all() and conditioning.mask[:, 0].all()
    assert not conditioning.mask[1:, -1].any()
    assert conditioning.tokens.isfinite().all() and conditioning.pooled.isfinite().all()
    assert not conditioning.tokens.requires_grad


def test_padding_changes_nothing(folder):
    conditioner = pretrained(folder).double()  # float32 rounds other shapes differently, by about 1e-6
    for caption in ("", "red disc"):
        alone, together = conditioner([caption]), conditioner([caption, "a small white cube"])
        length = alone.tokens.shape[1]
        assert together.tokens.shape[1] > length
        torch.testing.assert_close(together.tokens[:1, :length], alone.tokens, atol=1e-6, rtol=0)
        torch.testing.assert_close(together.pooled[:1], alone.pooled, atol=1e-6, rtol=0)


def test_the_order_of_words_matters(folder):
    a, b = (pretrained(folder)([caption]) for caption in ("a big red disc", "a red big disc"))
    assert a.tokens.shape == b.tokens.shape
    assert (a.tokens - b.tokens).abs().max() > 1e-2 and (a.pooled - b.pooled).abs().max() > 1e-3


def output(family: str, folder: Path, caption: str, **more: bool) -> Any:
    """What `transformers` alone answers to one caption, called as its documentation calls it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, TEXT_MODELS[family]).from_pretrained(folder, dtype=torch.float64).eval()
    text = f"<|endoftext|>{caption}" if family == "gpt2" else caption
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt"), **more)


def expected(family: str, folder: Path, caption: str) -> tuple[Tensor, Tensor]:
    """Tokens and pooled vector of one caption by `transformers` alone."""
    answer = output(family, folder, caption)
    tokens = answer.last_hidden_state.float()
    pooled = {"bert": tokens.mean(1), "t5": tokens.mean(1), "gpt2": tokens[:, -1]}
    return tokens, pooled[family] if family in pooled else answer.pooler_output.float()


@pytest.mark.parametrize("caption", ["", CAPTION])
def test_it_is_what_transformers_gives(family, folder, caption):
    conditioning = pretrained(folder).double()([caption, "a small white cube"])
    tokens, pooled = expected(family, folder, caption)
    length = tokens.shape[1]
    assert conditioning.mask[0].sum() == length
    torch.testing.assert_close(conditioning.tokens[:1, :length], tokens, atol=1e-6, rtol=0)
    torch.testing.assert_close(conditioning.pooled[:1], pooled, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_earlier_layer_is_the_hidden_state_that_transformers_gives(family, folder, layer):
    conditioner = Pretrained(str(folder), WIDTH, 24, layer=layer)
    tokens = output(family, folder, CAPTION, output_hidden_states=True).hidden_states[layer].float()
    found = conditioner.double()([CAPTION]).tokens
    torch.testing.assert_close(found, tokens, atol=1e-6, rtol=0)
    assert not torch.allclose(found, pretrained(folder).double()([CAPTION]).tokens, atol=1e-2)
    assert conditioner.facts() != pretrained(folder).facts()


def test_both_layouts_of_clip_hold_a_text_tower(folders, tmp_path):
    """The tower of the whole model, saved alone, gives the same tokens."""
    tower = transformers.CLIPTextModel.from_pretrained(folders["clip"])
    tower.save_pretrained(tmp_path)
    clip_tokenizer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "clip_text_model"
    assert torch.equal(pretrained(tmp_path)([CAPTION]).tokens, pretrained(folders["clip"])([CAPTION]).tokens)


def test_a_long_caption_is_cut_and_keeps_its_end(family, folder):
    conditioner = pretrained(folder, max_length=5)
    cut, _ = conditioner.tokenize([" ".join(6 * WORDS)])
    empty, _ = conditioner.tokenize([""])
    assert cut.shape == (1, 5)
    assert family == "t5" or cut[0, 0] == empty[0, 0]  # T5 has no start token
    assert family == "gpt2" or cut[0, -1] == empty[0, -1]  # GPT-2 has no end token
    assert conditioner([" ".join(6 * WORDS)]).tokens.shape == (1, 5, WIDTH)


def test_bfloat16_autocast_is_near(folder):
    conditioner = pretrained(folder)
    exact = conditioner([CAPTION, ""])
    with torch.autocast("cpu", torch.bfloat16):
        rough = conditioner([CAPTION, ""])
    assert rough.tokens.dtype == torch.float32
    torch.testing.assert_close(rough.tokens[exact.mask], exact.tokens[exact.mask], atol=0.15, rtol=0.1)


# --- frozen, and saved by reference ---


def test_training_leaves_it_as_it_is(tmp_path, folder):
    model = model_with(folder)
    conditioner = model.predictor.conditioner
    assert isinstance(conditioner, Pretrained)
    before, network = bits(conditioner), model.predictor.network.state_dict()
    network = {key: value.clone() for key, value in network.items()}
    ema = EMA(0.9)
    run = trainer(tmp_path, ema, max_steps=3)
    run.fit(model, batches(3))
    assert bits(conditioner) == before
    assert all(p.grad is None and not p.requires_grad for p in conditioner.parameters())
    assert not any(module.training for module in conditioner.encoder.modules())
    assert any(not torch.equal(value, network[key]) for key, value in model.predictor.network.state_dict().items())
    assert not [name for name in ema.average if "conditioner" in name]


def test_the_state_has_a_reference_and_no_weights(folder):
    conditioner = pretrained(folder)
    assert list(conditioner.state_dict()) == ["encoder._extra_state"]
    stated = bytes(conditioner.state_dict()["encoder._extra_state"].tolist()).decode()
    assert stated == f"{hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()} {folder}"
    before = bits(conditioner)
    conditioner.load_state_dict(pretrained(folder).state_dict(), strict=True)
    assert bits(conditioner) == before


def node(folder: Path) -> dict[str, Any]:
    return {
        "_target_": "carrara.model.conditioned.Conditioned",
        "network": {
            "_target_": "carrara.network.unet.UNet",
            "in_channels": 3,
            "resolution": 8,
            "channels": [8],
            "attention": [True],
            "num_blocks": 1,
            "depth": 1,
            "heads": 2,
            "expansion": 2,
            "context_width": WIDTH,
            "pooled_width": WIDTH,
            "qk_norm": True,
            "learned_positions": True,
        },
        "conditioner": {
            "_target_": "carrara.conditioner.pretrained.Pretrained",
            "model": str(folder),
            "width": WIDTH,
            "max_length": 24,
        },
    }


def test_a_component_comes_back_without_its_weights(tmp_path, folder):
    predictor = build(node(folder))
    assert isinstance(predictor, Conditioned)
    save_component(tmp_path / "component", "noise_predictor", node(folder), predictor, CARD)
    written = load_file(tmp_path / "component" / "weights.safetensors")
    assert [key for key in written if not key.startswith("network.")] == ["conditioner.encoder._extra_state"]
    loaded, _ = load_component(tmp_path / "component", "noise_predictor")
    assert isinstance(loaded, Conditioned)
    assert torch.equal(loaded.conditioner([CAPTION]).tokens, predictor.conditioner([CAPTION]).tokens)
    torch.testing.assert_close(loaded.state_dict(), predictor.state_dict(), rtol=0, atol=0)


def other_weights(folder: Path) -> None:
    """The same architecture and tokenizer, one weight apart."""
    model = transformers.BertModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[0] += 1
    model.save_pretrained(folder)


REFUSED = r"trained with the weights of \S+bert \(SHA-256 \w{12}…\), but those of \S+bert are others \(\w{12}…\)"


def test_a_component_refuses_another_encoder(tmp_path, copied):
    save_component(tmp_path / "component", "noise_predictor", node(copied), build(node(copied)), CARD)
    load_component(tmp_path / "component", "noise_predictor")
    other_weights(copied)
    with pytest.raises(UserError, match=REFUSED):
        load_component(tmp_path / "component", "noise_predictor")


def test_a_run_goes_on_with_its_encoder_and_refuses_another(tmp_path, copied):
    model, ema = model_with(copied), EMA(0.9)
    run = trainer(tmp_path, ema, max_steps=2, plugins=[VerifiedCheckpointIO()])
    run.fit(model, batches(2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert [key for key in saved if "conditioner" in key] == ["predictor.conditioner.encoder._extra_state"]

    def go_on() -> DiffusionModel:
        again = model_with(copied)
        run = trainer(tmp_path, EMA(0.9), max_steps=3, plugins=[VerifiedCheckpointIO()])
        run.fit(again, batches(3, start=2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
        assert run.global_step == 3
        return again

    go_on()
    other_weights(copied)
    with pytest.raises(UserError, match=REFUSED):
        go_on()


# --- the plan ---


def overrides(folder: Path) -> list[str]:
    return [
        "conditioner=bert",
        f"conditioner.model={folder}",
        f"conditioner.width={WIDTH}",
        "conditioner.max_length=24",
    ]


@pytest.mark.parametrize("model", ["latent_unet", "pixel_unet"])
def test_the_plan_reads_no_weights(folders, model, monkeypatch):
    config = compose(CONF, "train", [f"model={model}", "size=demo", *overrides(folders["bert"])]).config
    assert (config["network"]["context_width"], config["network"]["pooled_width"]) == (WIDTH, WIDTH)
    real = sum(p.numel() for p in build(config["conditioner"]).parameters())
    monkeypatch.setattr(transformers.BertModel, "from_pretrained", None)
    modules, whole = meta_modules(config)
    assert {p.device.type for p in whole.parameters()} == {"meta"}
    assert sum(p.numel() for p in modules["conditioner"].parameters() if not p.requires_grad) == real
    assert all(not p.requires_grad for p in modules["conditioner"].parameters())


@pytest.mark.parametrize("option", ["bert", "gpt2", "t5", "clip"])
def test_the_named_models_are_asked_for_on_the_hub(option):
    """The tests have no network: what is tested is that names and settings reach the hub, and what is said then."""
    config = compose(CONF, "train", ["size=demo", f"conditioner={option}"]).config
    assert config["network"]["context_width"] == config["conditioner"]["width"] == 768
    name = config["conditioner"]["model"]
    with pytest.raises(UserError, match=rf"model={name}: .* download it once with `hf download {name}`, or name"):
        build(config["conditioner"])


# --- mistakes ---


def one_line(folder: Path | str, width: int = WIDTH, max_length: int = 24) -> str:
    with pytest.raises(UserError) as caught:
        Pretrained(str(folder), width, max_length)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_another_width_is_refused(folder):
    assert f"conditioner.width=16, but {folder} has {WIDTH} features" in one_line(folder, width=16)
    with torch.device("meta"):
        assert "conditioner.width=16" in one_line(folder, width=16)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_is_not_there_is_refused(folder, layer):
    with pytest.raises(UserError, match=rf"conditioner\.layer={layer}, but .* has 2 blocks: 0 to 2, or null"):
        Pretrained(str(folder), WIDTH, 24, layer=layer)


def test_more_tokens_than_the_model_has_positions_are_refused(family, folder):
    assert "from 3" in one_line(folder, max_length=2)
    if family == "t5":
        pretrained(folder, max_length=1000)
    else:
        assert "conditioner.max_length=33" in (message := one_line(folder, max_length=33))
        assert "from 3 to 32 tokens" in message


def test_another_family_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert "type llama is none of the text encoders known here: bert, gpt2, t5, clip" in one_line(copied)


def pickle(folder: Path) -> None:
    state = transformers.BertModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")


def test_pickled_weights_are_not_read(copied):
    pickle(copied)
    assert "it has no model.safetensors; pickled weights are not read" in one_line(copied)
    with torch.device("meta"):  # and the plan says so before parts are trained
        assert "pickled weights are not read" in one_line(copied)


def test_a_folder_without_tokenizer_is_refused(copied):
    for name in ("tokenizer.json", "vocab.txt"):
        (copied / name).unlink(missing_ok=True)
    assert "it has no tokenizer" in one_line(copied)


def test_a_tokenizer_of_a_larger_model_is_refused(copied):
    tokenizer = transformers.AutoTokenizer.from_pretrained(copied)
    tokenizer.add_tokens(["ring"])
    tokenizer.save_pretrained(copied)
    assert "its tokenizer has more than the model's" in one_line(copied)


def test_weights_that_are_missing_are_not_drawn_at_random(copied):
    weights = load_file(copied / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert "1 of its weights are missing, such as encoder.layer.1.output.dense.weight" in one_line(copied)


def test_damaged_files_are_one_line(copied):
    (copied / "model.safetensors").write_bytes(b"not safetensors")
    assert "its weights cannot be read" in one_line(copied)
    (copied / "tokenizer.json").write_text("{")
    assert "its tokenizer cannot be read" in one_line(copied)
    (copied / "config.json").write_text("{")
    assert "config.json cannot be read" in one_line(copied)


def test_code_of_a_model_is_never_run(copied):
    """A folder that brings its own classes, as `trust_remote_code` would run them."""
    mark = copied / "was_run"
    (copied / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    for name, key, value in (
        ("config.json", "AutoConfig", "own.Own"),
        ("tokenizer_config.json", "AutoTokenizer", [None, "own.Own"]),
    ):
        content = json.loads((copied / name).read_text())
        (copied / name).write_text(json.dumps({**content, "auto_map": {key: value, "AutoModel": "own.Own"}}))
    pretrained(copied)([CAPTION])
    assert not mark.exists()


def test_compiled_code_that_a_config_names_is_not_fetched(copied):
    config = json.loads((copied / "config.json").read_text())
    named = {"attn_implementation": "kernels-community/flash-attn3", "return_dict": False, "use_cache": True}
    (copied / "config.json").write_text(json.dumps(config | named))
    conditioner = pretrained(copied)
    encoder = conditioner.encoder.module
    assert isinstance(encoder, transformers.BertModel) and encoder.config._attn_implementation == "sdpa"
    assert conditioner([CAPTION]).tokens.shape[2] == WIDTH
    with torch.device("meta"):
        pretrained(copied)


@pytest.mark.parametrize("name", ["/nowhere/bert", "./nowhere", "no/such/model"])
def test_a_folder_that_is_not_there(name):
    assert f"conditioner.model={name}: there is no such folder, and the hub has no such model" in one_line(name)


def test_padding_that_is_read_is_clips_alone(folders):
    for name in FAMILIES:
        if name.startswith("clip"):
            assert Pretrained(str(folders[name]), WIDTH, 24, "max_length")([CAPTION]).mask.shape == (1, 24)
        else:
            with pytest.raises(UserError, match=r"conditioner\.padding=max_length is how Stable Diffusion reads CLIP"):
                Pretrained(str(folders[name]), WIDTH, 24, "max_length")


def test_a_model_of_the_hub_is_taken_from_its_cache(folders, tmp_path, monkeypatch):
    """As `hf download` leaves it; there is no network."""
    cache = tmp_path / "models--some--bert"
    shutil.copytree(folders["bert"], cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    conditioner = Pretrained("some/bert", WIDTH, 24)
    assert torch.equal(conditioner([CAPTION]).tokens, pretrained(folders["bert"])([CAPTION]).tokens)
    assert conditioner.encoder.name == "some/bert"
    with torch.device("meta"):
        Pretrained("some/bert", WIDTH, 24)


def test_shards_are_weights_like_one_file(folders, tmp_path):
    model = transformers.BertModel.from_pretrained(folders["bert"])
    shutil.copytree(folders["bert"], tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size=2000)
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    sharded, whole = pretrained(tmp_path / "sharded"), pretrained(folders["bert"])
    assert torch.equal(sharded([CAPTION]).tokens, whole([CAPTION]).tokens)
    assert sharded.encoder.sha256 != whole.encoder.sha256
    sorted((tmp_path / "sharded").glob("model-*.safetensors"))[0].unlink()
    assert "it has no model-00001-of-" in one_line(tmp_path / "sharded")


def test_nothing_is_said_on_the_terminal(folder, capfd, caplog):
    with caplog.at_level(logging.INFO):
        pretrained(folder)([CAPTION, " ".join(20 * WORDS)])
    assert capfd.readouterr() == ("", "") and not caplog.records
