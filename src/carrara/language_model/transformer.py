"""A masked or causal transformer of captions, as `transformers` has it, with a tokenizer of our own."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from carrara.language_model.unigram import Unigram
from carrara.network.hugging_face import quieten
from carrara.network.tokenizer import END, PAD, SPECIAL_TOKENS, START, Tokenizer

MASK = "<mask>"
MASK_ID = len(SPECIAL_TOKENS)  # the next one
MASKED, CAUSAL = "masked", "causal"

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # as in SPECIAL_TOKENS


class LanguageModel(nn.Module):
    """BERT (Devlin et al. 2019) or GPT-2 (Radford et al. 2019) without dropout, whose draws would not be keyed.

    Args:
        objective: "masked" (BERT: hidden tokens are predicted from both sides) or "causal" (GPT-2: each is predicted
            from those before it, the first from the start token, and after the last the end token).
        vocab_size: most token ids.
        max_length: most tokens that the network reads: of a caption with its start, and its end if it is masked.
        width: features of a token.
        depth: transformer blocks.
        heads: attention heads.

    Raises:
        ValueError: an unknown objective, or heads that do not divide the width.
    """

    def __init__(self, objective: str, vocab_size: int, max_length: int, width: int, depth: int, heads: int):
        super().__init__()
        if objective not in (MASKED, CAUSAL):
            raise ValueError(f"objective must be {MASKED} or {CAUSAL}, not {objective!r}")
        self.causal = objective == CAUSAL
        self.max_length = max_length
        # a causal network never reads the end, so all of its positions are trained with a token more
        self.tokenizer = Tokenizer(vocab_size, max_length + self.causal, () if self.causal else (MASK,))
        self.unigram = Unigram(vocab_size, self._all_targets)  # travels along: whoever has the model can compare
        quieten()
        build = _gpt2 if self.causal else _bert
        self.network = build(vocab_size, max_length, width, depth, heads)

    @property
    def encoder(self) -> nn.Module:
        """The network without its output layer."""
        return self.network.base_model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, L) int64 and mask (B, L) bool, True for real tokens -> last hidden states (B, L, width)."""
        return self.encoder(ids, attention_mask=mask.long()).last_hidden_state

    def logits(self, tokens: Tensor) -> Tensor:
        """Hidden states (N, width) -> logits (N, vocab_size)."""
        return (self.network.lm_head if self.causal else self.network.cls)(tokens)

    def targets(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) bool: which tokens may be predicted. Masked: the words; causal: all after the start, the end too."""
        if not self.causal:
            return mask & (ids >= self.tokenizer.num_special)
        targets = mask.clone()
        targets[:, 0] = False
        return targets

    def save_pretrained(self, folder: Path) -> None:
        """Writes config, weights and tokenizer as `transformers` reads them; the tokenizer adds start and end."""
        from transformers import PreTrainedTokenizerFast

        names = {"pad_token": PAD, "bos_token": START, "eos_token": END}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer.backend,
            model_max_length=self.max_length,
            model_input_names=["input_ids", "attention_mask"],  # GPT-2 would add token types as if they were words
            **(names if self.causal else {**names, "mask_token": MASK}),
        )
        tokenizer.save_pretrained(folder)
        self.network.save_pretrained(folder)

    def _all_targets(self, captions: list[str]) -> Tensor:
        ids, mask = self.tokenizer(captions)
        return ids[self.targets(ids, mask)]


def _bert(vocab_size: int, max_length: int, width: int, depth: int, heads: int) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max_length,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **_IDS,
    )
    return BertForMaskedLM(config)


def _gpt2(vocab_size: int, max_length: int, width: int, depth: int, heads: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=max_length,
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own, in one operation
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        **_IDS,
    )
    return GPT2LMHeadModel(config)
