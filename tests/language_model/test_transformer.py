from pathlib import Path

import pytest
import torch
import transformers

from carrara.conditioner.pretrained import Pretrained
from carrara.language_model.transformer import LanguageModel
from tests.tiny import CAPTIONS, language_model

PAD, START, END, MASK = range(4)
LONG = " ".join(CAPTIONS)
STRANGE = ["A BIG  Red disc", "", "ünïcode 猫", "a <mask> <start> disc", LONG]


@pytest.fixture(params=["masked", "causal"])
def objective(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(objective: str) -> LanguageModel:
    """With weights that are large enough for every token to matter."""
    model = language_model(objective).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def folder(model: LanguageModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "transformers")
    return tmp_path / "transformers"


@torch.no_grad()
def test_padding_changes_nothing(model):
    for caption in ("", "a big red disc"):
        ids, mask = model.tokenizer([caption])
        padded, longer = model.tokenizer([caption, LONG])
        assert padded.shape[1] > ids.shape[1]
        cut = model.max_length  # of the long caption a causal network does not read the end
        torch.testing.assert_close(model(padded[:, :cut], longer[:, :cut])[:1, : ids.shape[1]], model(ids, mask))


@torch.no_grad()
def test_a_causal_token_has_not_seen_what_follows_and_a_masked_one_has(objective, model):
    ids, mask = model.tokenizer(["a big red disc"])
    other = ids.clone()
    other[:, 3:] = 20
    before, after = (model.logits(model(x, mask)[:, :3]) for x in (ids, other))
    assert torch.equal(before, after) == (objective == "causal")


def test_words_are_predicted_and_by_a_causal_model_the_end(objective, model):
    ids, mask = model.tokenizer(["a big red disc", "a", "a <start> disc"])
    targets = model.targets(ids, mask)
    assert (ids[0, :1] == START).all() and ids[0][mask[0]][-1] == END
    if objective == "causal":
        assert torch.equal(targets[:, 1:], mask[:, 1:]) and not targets[:, 0].any()
    else:
        assert torch.equal(targets, ids > MASK) and targets[1].sum() == 1


def test_every_position_that_can_be_read_is_trained(objective, model):
    ids, mask = model.tokenizer([LONG])
    if objective == "causal":
        ids, mask = ids[:, :-1], mask[:, :-1]
    assert ids.shape[1] == model.max_length and mask.all()
    model.logits(model(ids, mask)).square().sum().backward()
    name = "wpe" if objective == "causal" else "embeddings.position_embeddings"
    gradient = model.encoder.get_parameter(f"{name}.weight").grad
    assert gradient is not None and gradient.abs().sum(1).all()


@torch.no_grad()
def test_transformers_reads_what_was_saved(objective, model, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.AutoModel.from_pretrained(folder, dtype=torch.float64).eval()
    head = transformers.AutoModelForCausalLM if objective == "causal" else transformers.AutoModelForMaskedLM
    whole = head.from_pretrained(folder, dtype=torch.float64).eval()
    ids, mask = model.tokenizer(CAPTIONS)
    encoded = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    torch.testing.assert_close(encoder(**encoded).last_hidden_state[mask], model(ids, mask)[mask])
    torch.testing.assert_close(whole(**encoded).logits[mask], model.logits(model(ids, mask)[mask]))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (PAD, START, END)
    assert tokenizer.mask_token_id == (None if objective == "causal" else MASK)


def test_what_was_saved_tokenizes_as_it_did(model, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids, mask = model.tokenizer(STRANGE)
    saved = tokenizer(STRANGE, truncation=True)["input_ids"]
    for own, row, real in zip(saved, ids, mask, strict=True):
        expected = row[real].tolist()
        if len(expected) > model.max_length:  # causal: what is saved is cut to the positions there are
            expected = [*expected[: model.max_length - 1], END]
        assert own == expected


def test_saving_leaves_the_tokenizer_as_it_is(model, folder):
    before = model.tokenizer(STRANGE)
    model.save_pretrained(folder)
    for a, b in zip(before, model.tokenizer(STRANGE), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_the_conditioner_reads_it_as_it_was_trained(objective, model, folder):
    conditioner = Pretrained(str(folder), 16, model.max_length).double()
    conditioning = conditioner(STRANGE)
    ids, mask = model.tokenizer(STRANGE)
    if objective == "causal":  # no end
        ids, mask = ids[:, :-1], mask[:, :-1] & (ids[:, :-1] != END)
    assert torch.equal(conditioning.mask, mask)
    tokens = model(ids, mask).float()
    torch.testing.assert_close(conditioning.tokens[mask], tokens[mask], atol=1e-6, rtol=0)
    if objective == "causal":
        pooled = torch.stack([row[real][-1] for row, real in zip(tokens, mask, strict=True)])
    else:
        pooled = torch.stack([row[real].mean(0) for row, real in zip(tokens, mask, strict=True)])
    torch.testing.assert_close(conditioning.pooled, pooled, atol=1e-6, rtol=0)


def test_the_conditioner_takes_the_folder_of_a_run_or_a_component(folder, tmp_path):
    captions = ["a big red disc"]
    expected = Pretrained(str(folder), 16, 12)(captions).tokens
    (tmp_path / "run").mkdir()
    (tmp_path / "component").mkdir()
    folder.rename(tmp_path / "component" / "transformers")
    (tmp_path / "component").rename(tmp_path / "run" / "component")
    for name in ("run", "run/component", "run/component/transformers"):
        assert torch.equal(Pretrained(str(tmp_path / name), 16, 12)(captions).tokens, expected)


def test_weights_come_back_from_a_state_dict(objective, model):
    back = LanguageModel(objective, 300, 12, 16, 2, 2).double().eval()
    back.load_state_dict(model.state_dict())
    ids, mask = back.tokenizer(CAPTIONS)
    assert torch.equal(back(ids, mask), model(*model.tokenizer(CAPTIONS)))
    assert torch.equal(back.unigram(ids), model.unigram(ids))


def test_the_output_layer_is_the_embedding(model):
    assert model.network.get_output_embeddings().weight is model.network.get_input_embeddings().weight


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="objective must be masked or causal, not 'prefix'"):
        LanguageModel("prefix", 300, 12, 16, 2, 2)
    for objective in ("masked", "causal"):
        with pytest.raises(ValueError, match="heads"):
            LanguageModel(objective, 300, 12, 16, 2, 3)
    with pytest.raises(ValueError, match="special tokens are 260"):
        LanguageModel("masked", 259, 12, 16, 2, 2)
