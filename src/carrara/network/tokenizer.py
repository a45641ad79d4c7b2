"""Captions to token ids: a byte-pair encoding trained on the captions of the shards."""

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from carrara.network.vocabulary import Vocabulary

PAD, START, END = SPECIAL_TOKENS = ("<pad>", "<start>", "<end>")  # their ids are 0, 1 and 2
_NUM_BYTES = 256


class Tokenizer(Vocabulary):
    """Byte-level BPE (Sennrich et al. 2016) between a start and an end token, lower-cased, NFKC-normalised.

    Args:
        vocab_size: the most token ids it may use; bytes and special tokens alone are 259.
        max_length: tokens a caption is cut to; the end token is kept.
        more_special: further special tokens, whose ids follow those of padding, start and end.
    """

    def __init__(self, vocab_size: int, max_length: int, more_special: Sequence[str] = ()):
        super().__init__()
        self._special = [*SPECIAL_TOKENS, *more_special]
        smallest = _NUM_BYTES + self.num_special
        if vocab_size < smallest:
            raise ValueError(f"vocab_size={vocab_size}, but the bytes and special tokens are {smallest}")
        self.vocab_size = vocab_size
        self.max_length = max_length
        self._backend: BackendTokenizer | None = None

    @property
    def trained(self) -> bool:
        return self._backend is not None

    @property
    def num_special(self) -> int:
        """Ids below this one are special tokens."""
        return len(self._special)

    @property
    def backend(self) -> BackendTokenizer:
        """The trained tokenizer itself, of the library `tokenizers`."""
        if self._backend is None:
            raise RuntimeError("the tokenizer has not been trained: call train_on(captions) or load a state dict")
        return self._backend

    def train_on(self, captions: Iterable[str]) -> None:
        backend = BackendTokenizer(models.BPE())
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=self._special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(captions, trainer)
        self._set(backend)

    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """ids (B, L) int64 and mask (B, L) bool, padded to the longest caption of the batch."""
        encodings = self.backend.encode_batch(captions)
        ids = torch.tensor([e.ids for e in encodings], dtype=torch.int64)
        mask = torch.tensor([e.attention_mask for e in encodings], dtype=torch.bool)
        return ids, mask

    def _set(self, backend: BackendTokenizer) -> None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=[(token, backend.token_to_id(token)) for token in (START, END)]
        )
        backend.enable_truncation(self.max_length)
        backend.enable_padding(pad_id=backend.token_to_id(PAD), pad_token=PAD)
        self._backend = backend

    def to_text(self) -> str:
        return self.backend.to_str()

    def from_text(self, text: str) -> None:
        self._set(BackendTokenizer.from_str(text))
