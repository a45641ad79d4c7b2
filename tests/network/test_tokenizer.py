import pytest
import torch
from safetensors.torch import load_file, save_file

from carrara.network.tokenizer import Tokenizer

CAPTIONS = ["a red circle above a blue square", "two small green stars", "a blue square", "Ünïcode — 猫 🎨"] * 3
PAD, START, END = 0, 1, 2


def trained(vocab_size: int = 300, max_length: int = 12) -> Tokenizer:
    tokenizer = Tokenizer(vocab_size, max_length)
    tokenizer.train_on(CAPTIONS)
    return tokenizer


def test_the_same_captions_give_the_same_vocabulary():
    a, b = trained(), trained()
    assert torch.equal(a.get_extra_state(), b.get_extra_state())
    assert torch.equal(a(CAPTIONS)[0], b(CAPTIONS)[0])


def test_other_captions_give_another_vocabulary():
    other = Tokenizer(300, 12)
    other.train_on(["entirely different words"] * 5)
    assert not torch.equal(other.get_extra_state(), trained().get_extra_state())


def test_it_travels_in_a_safetensors_file(tmp_path):
    tokenizer = trained(max_length=7)
    save_file(tokenizer.state_dict(), tmp_path / "weights.safetensors")
    back = Tokenizer(300, 7)
    back.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert back.trained
    for a, b in zip(tokenizer([*CAPTIONS, "unseen words", ""]), back([*CAPTIONS, "unseen words", ""]), strict=True):
        assert torch.equal(a, b)


def test_long_captions_are_cut_and_keep_the_end_token():
    ids, mask = trained(max_length=6)(["a red circle above a blue square and much more"])
    assert ids.shape == (1, 6) and mask.all()
    assert ids[0, 0] == START and ids[0, -1] == END


def test_the_empty_caption_is_a_start_and_an_end():
    ids, mask = trained()(["", "a blue square"])
    assert ids[0, :2].tolist() == [START, END]
    assert (ids[0, 2:] == PAD).all() and mask[0].tolist() == [True, True] + [False] * (ids.shape[1] - 2)


def test_captions_are_padded_to_the_longest_of_the_batch():
    tokenizer = trained()
    together, mask = tokenizer(["a blue square", "two small green stars"])
    alone, _ = tokenizer(["a blue square"])
    assert torch.equal(together[0][mask[0]], alone[0])
    assert mask.sum(1).max() == together.shape[1]


def test_case_and_width_do_not_matter_but_words_do():
    tokenizer = trained()
    assert torch.equal(tokenizer(["A RED Circle"])[0], tokenizer(["a red circle"])[0])
    assert torch.equal(tokenizer(["ａ red circle"])[0], tokenizer(["a red circle"])[0])
    assert not torch.equal(tokenizer(["red above blue"])[0], tokenizer(["blue above red"])[0])


def test_every_text_has_tokens_of_the_vocabulary():
    """Bytes are the alphabet, so nothing is unknown; and an id beyond the embedding would be an IndexError."""
    ids, _ = trained(vocab_size=270, max_length=64)(["猫 🎨 \x00 ñ ￿", "zzz qqq 0123456789 !@#$%^&*()"])
    assert ids.max() < 270


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size=100.*259"):
        Tokenizer(100, 12)


def test_an_untrained_tokenizer_says_so():
    with pytest.raises(RuntimeError, match="has not been trained"):
        Tokenizer(300, 12)(["a"])
