"""Frozen text encoders that others have trained: BERT, GPT-2, T5 and CLIP, read by `transformers`.

`transformers` is imported when one of them is built: that takes seconds.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from carrara.conditioner.base import Conditioner
from carrara.conditioner.pretrained_folder import CONFIG, NEEDED, check_files, local, mistake, reading, weight_files
from carrara.errors import UserError
from carrara.network.by_reference import ByReference
from carrara.network.conditioning import Conditioning
from carrara.network.hugging_face import quieten, sha256_of

_PROBES = ("A photo of 2 cats, Ünïcode\N{GRINNING FACE} & the\tsame again!", "z" * 40)
_SHORTEST = 3  # tokens: a start, a word and an end
_SETTINGS = {  # whatever the model's own config says
    "attn_implementation": "sdpa",  # it may name compiled code to be fetched from the hub
    "use_cache": False,  # of GPT-2: no text is generated
    "return_dict": True,
}


class Pretrained(Conditioner):
    """Captions -> a hidden state of a frozen text encoder.

    The pooled vector is, of

    - BERT (Devlin et al. 2019) the mean over real tokens: without fine-tuning its [CLS] vector is the worse summary
      (Reimers & Gurevych 2019, table 1);
    - GPT-2 (Radford et al. 2019) the vector of the last token, the only one that has seen them all; <|endoftext|> is
      put before every caption, so that the empty one has a token;
    - T5's encoder (Raffel et al. 2020) the mean over real tokens;
    - CLIP's text tower (Radford et al. 2021) the vector of the end token, before the projection.

    Captions are padded to the longest of the batch, and padding is masked, here and in the network. Stable Diffusion
    has learnt to read all 77 tokens of CLIP instead, padding included: `padding="max_length"`.

    The weights are neither trained nor saved: checkpoints and components hold their SHA-256 (`ByReference`). It is
    taken over the file, so it is the one that the hub shows and `sha256sum` prints, and no version of a library changes
    it; of a model in several files, over their SHA-256s. The same weights written anew may be refused.

    Args:
        model: a name on the Hugging Face hub or a folder, in the layout of `transformers`, or in that of `diffusers`
            with the text encoder and its tokenizer in folders of their own; or a run or component of
            `model=language_model`, which has one in it.
        width: see `Conditioner`; the encoder's.
        max_length: most tokens of a caption, start and end included; the end is kept.
        padding: "longest" of the batch, masked; or, of CLIP, "max_length", not masked.
        layer: after how many of its blocks; None: after the last, and its final normalisation if it has one. What
            tells words apart fades in the last layers of a model that has learnt to predict words, not pictures.

    Raises:
        UserError: no such model, or none of these families, weights that are not safetensors, no tokenizer, or
            settings that do not fit the model.
    """

    def __init__(self, model: str, width: int, max_length: int, padding: str = "longest", layer: int | None = None):
        super().__init__(width)
        self.max_length = max_length
        self.padding = padding
        self.layer = layer
        on_meta = torch.get_default_device().type == "meta"  # shapes only: no weights are read
        quieten()
        folder, tokenizer = local(model, (CONFIG,) if on_meta else NEEDED)
        self._family, config = _read_config(model, folder)
        _check_settings(model, config, width, max_length, layer)
        _check_padding(padding, self._family)
        if Path(model).is_dir() or not on_meta:
            check_files(model, folder, tokenizer)
        if on_meta:
            self.encoder = ByReference(self._family.build(config), model, sha256="")
            return
        self._tokenizer = _read_tokenizer(model, tokenizer)
        _check_tokenizer(model, self._tokenizer, self._family, config)
        files = [folder / name for name in weight_files(folder)]
        self.encoder = ByReference(_read_weights(model, folder, self._family, config), model, sha256_of(files))

    def facts(self) -> dict[str, str | int | None]:
        """What its answer depends on: the weights, the longest caption, and the tokenizer by some of its answers."""
        ids, _ = self.tokenize(["", *_PROBES])
        tokenizer = hashlib.sha256(json.dumps(ids.tolist()).encode()).hexdigest()
        return {
            "encoder": self.encoder.sha256,
            "max_length": self.max_length,
            "padding": self.padding,
            "layer": self.layer,
            "tokenizer": tokenizer,
        }

    @property
    def is_clip(self) -> bool:
        return self._family is _CLIP

    def save(self, text_encoder: Path, tokenizer: Path) -> str:
        """Writes both into folders as `transformers` does; the name of the tokenizer's class."""
        model: Any = self.encoder.module
        model.save_pretrained(text_encoder)
        self._tokenizer.model_max_length = self.max_length
        self._tokenizer.save_pretrained(tokenizer)
        return type(self._tokenizer).__name__

    def forward(self, captions: list[str]) -> Conditioning:
        """B captions -> tokens (B, L, D) float32, their mask, and pooled vectors (B, D)."""
        ids, real = self.tokenize(captions)
        device = next(self.encoder.parameters()).device
        ids, real = ids.to(device), real.to(device)
        mask = real if self.padding == "longest" else torch.ones_like(real)
        every = self.layer is not None
        states = self.encoder(ids, attention_mask=mask.long(), output_hidden_states=every)
        tokens = (states.hidden_states[self.layer] if every else states.last_hidden_state).float()
        return Conditioning(tokens, mask, self._family.pool(tokens, real))

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids (B, L) int64 and where they are real (B, L) bool, on the CPU, padded as `padding` says."""
        rows = [torch.tensor(row) for row in self._family.encode(self._tokenizer, list(captions), self.max_length)]
        real = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
        ids = pad_sequence(rows, batch_first=True, padding_value=_padding_id(self._tokenizer))
        if self.padding == "longest":
            return ids, real
        extra = (0, self.max_length - ids.shape[1])
        return F.pad(ids, extra, value=_padding_id(self._tokenizer)), F.pad(real, extra)


# --- families ---


def _with_its_tokens(tokenizer: Any, captions: list[str], max_length: int) -> list[list[int]]:
    """Between the special tokens that the tokenizer itself adds, which are kept when a caption is cut."""
    return tokenizer(captions, truncation=True, max_length=max_length)["input_ids"]


def _after_start(tokenizer: Any, captions: list[str], max_length: int) -> list[list[int]]:
    cut = tokenizer(captions, add_special_tokens=False, truncation=True, max_length=max_length - 1)["input_ids"]
    return [[tokenizer.bos_token_id, *row] for row in cut]


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """tokens (B, L, D), mask (B, L) -> the mean over real ones (B, D)."""
    weight = mask[..., None].to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1)


def _last(tokens: Tensor, mask: Tensor) -> Tensor:
    """tokens (B, L, D), mask (B, L) -> the last real one (B, D)."""
    return tokens[torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1]


@dataclass(frozen=True)
class _Family:
    """How the models of a `model_type` are used.

    Attributes:
        name: the class of `transformers`.
        encode: (tokenizer, captions, max_length) -> ids of each caption, special tokens included.
        pool: tokens (B, L, D) and mask (B, L) -> (B, D).
        settings: of the class.
    """

    name: str
    encode: Callable[[Any, list[str], int], list[list[int]]]
    pool: Callable[[Tensor, Tensor], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def model_class(self) -> Any:
        import transformers

        return getattr(transformers, self.name)

    def build(self, config: Any) -> nn.Module:
        return self.model_class(config, **self.settings)


_CLIP = _Family("CLIPTextModel", _with_its_tokens, _last)  # ends with the end token
_FAMILIES = {
    "bert": _Family("BertModel", _with_its_tokens, _mean, {"add_pooling_layer": False}),
    "gpt2": _Family("GPT2Model", _after_start, _last),
    "t5": _Family("T5EncoderModel", _with_its_tokens, _mean),
    "clip": _CLIP,  # both towers, of which the text's is taken
    "clip_text_model": _CLIP,
}


# --- its parts ---


def _read_config(model: str, folder: Path) -> tuple[_Family, Any]:
    with reading(model, CONFIG):
        model_type = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
        family = _FAMILIES.get(model_type)
        if family is None:
            known = ", ".join(_FAMILIES)
            raise mistake(model, f"a model of type {model_type} is none of the text encoders known here: {known}")
        return family, family.model_class.config_class.from_pretrained(folder, **_SETTINGS)


def _check_settings(model: str, config: Any, width: int, max_length: int, layer: int | None) -> None:
    if width != config.hidden_size:
        raise UserError(f"conditioner.width={width}, but {model} has {config.hidden_size} features: pass that number")
    most = getattr(config, "max_position_embeddings", None)  # T5's positions are relative
    if max_length < _SHORTEST or (most is not None and max_length > most):
        there = f"from {_SHORTEST} on" if most is None else f"from {_SHORTEST} to {most}"
        raise UserError(f"conditioner.max_length={max_length}, but {model} takes captions of {there} tokens")
    check_layer(model, layer, config.num_hidden_layers)


def check_layer(model: str, layer: int | None, depth: int) -> None:
    """A `layer` that a model of so many blocks does not have is a `UserError`."""
    if layer is not None and not 0 <= layer <= depth:
        raise UserError(
            f"conditioner.layer={layer}, but {model} has {depth} blocks: 0 to {depth}, or null for the last"
        )


def _check_padding(padding: str, family: "_Family") -> None:
    if padding not in ("longest", "max_length"):
        raise UserError(f"conditioner.padding={padding} is not known; it is longest or max_length")
    if padding == "max_length" and family is not _CLIP:
        raise UserError("conditioner.padding=max_length is how Stable Diffusion reads CLIP: take longest")


def _read_tokenizer(model: str, folder: Path) -> Any:
    from transformers import AutoTokenizer

    with reading(model, "its tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _check_tokenizer(model: str, tokenizer: Any, family: _Family, config: Any) -> None:
    empty = family.encode(tokenizer, [""], _SHORTEST)[0]
    if not empty or None in empty:
        raise mistake(model, "its tokenizer adds no start or end token, so the empty caption would have no token")
    if max(tokenizer.get_vocab().values()) >= config.vocab_size:
        raise mistake(model, f"its tokenizer has more than the model's {config.vocab_size} tokens: it is of another")


def _padding_id(tokenizer: Any) -> int:
    """GPT-2 has no padding token; which one it is does not matter behind the mask."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _read_weights(model: str, folder: Path, family: _Family, config: Any) -> nn.Module:
    with reading(model, "its weights"):
        encoder, found = family.model_class.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **family.settings,
        )
        missing = sorted(found["missing_keys"])  # transformers draws them at random
        if missing:
            raise mistake(model, f"{len(missing)} of its weights are missing, such as {missing[0]}: fetch it again")
        return encoder
