"""Tokenizers beside exported models of transformers, which give the ids that the models were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fdl.modules.tokenizers import Tokenizer

PAD = "<|pad|>"
"""The padding of a tokenizer that has none of its own."""


def save_for_classifier(network: PreTrainedModel, tokenizer: Tokenizer, context: int, folder: Path) -> None:
    """Write a classifier's tokenizer: it puts around a text what training did, cuts it to the context, and pads it.

    Padding is a token of its own: heads of decoders look for the last token that is none, and texts end in the token
    that ends a text.

    Args:
        network: gets the padding's id in its configuration, and room for it among its embeddings.
        tokenizer: the data's.
        context: tokens of the longest text, with those around it.
        folder: where to.
    """
    inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    known = {token.content: id for id, token in inner.get_added_tokens_decoder().items() if token.special}
    own = next((known[name] for name in ("[PAD]", "<pad>", PAD) if name in known), None)
    if "roberta" in network.config.model_type:  # it counts positions from its padding's id
        own = network.config.pad_token_id
    if own is None or own == tokenizer.eos:
        inner.add_special_tokens([PAD])
        own = inner.token_to_id(PAD)
    if own >= network.config.vocab_size:
        network.resize_token_embeddings(own + 1, mean_resizing=False)
    network.config.pad_token_id = own
    settings = {"pad_token": inner.id_to_token(own), "padding_side": "right", "truncation_side": "right"}
    _write(inner, tokenizer, folder, {**settings, "model_max_length": context})


def save_for_generation(tokenizer: Tokenizer, positions: int, folder: Path) -> None:
    """Write a language model's tokenizer: it adds nothing to a text, as training went on where the text ended.

    Args:
        tokenizer: the data's.
        positions: the longest text.
        folder: where to.
    """
    content = json.loads(tokenizer.inner.to_str())
    content["post_processor"] = None
    inner = tokenizers.Tokenizer.from_str(json.dumps(content))
    # texts go on at their end, so padding stands before them, and the attention mask hides it
    settings: dict[str, Any] = {"padding_side": "left", "add_bos_token": False, "add_eos_token": False}
    if tokenizer.eos is not None:
        settings["pad_token"] = inner.id_to_token(tokenizer.eos)
    _write(inner, tokenizer, folder, {**settings, "model_max_length": positions})


def _write(inner: tokenizers.Tokenizer, tokenizer: Tokenizer, folder: Path, settings: dict[str, Any]) -> None:
    inner.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    # fdl gives models no types of tokens, of a pair neither
    told["model_input_names"] = ["input_ids", "attention_mask"]
    if tokenizer.eos is not None:
        told["eos_token"] = inner.id_to_token(tokenizer.eos)
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
