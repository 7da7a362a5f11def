"""Tokenizers of exported transformers models, which return the ids that the models were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fdl.modules.tokenizers import Tokenizer

PAD = "<|pad|>"
"""Padding token added to tokenizers without one."""


def save_for_classifier(network: PreTrainedModel, tokenizer: Tokenizer, context: int, folder: Path) -> None:
    """Write a classifier's tokenizer, which adds the special tokens of training, truncates to the context, and pads.

    The padding token differs from the end-of-text token: classification heads of decoders use the last token that is no
    padding, and texts end in the end-of-text token.

    Args:
        network: the network; its configuration gets the padding's id, and its embeddings are extended if necessary.
        tokenizer: the tokenizer of the data.
        context: maximum number of tokens, including special tokens.
        folder: the folder to write to.
    """
    inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    known = {token.content: id for id, token in inner.get_added_tokens_decoder().items() if token.special}
    own = next((known[name] for name in ("[PAD]", "<pad>", PAD) if name in known), None)
    if "roberta" in network.config.model_type:  # its positions start after the padding's id
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
    """Write a language model's tokenizer, which adds no special tokens, since generation continues the text.

    Args:
        tokenizer: the tokenizer of the data.
        positions: maximum number of tokens.
        folder: the folder to write to.
    """
    content = json.loads(tokenizer.inner.to_str())
    content["post_processor"] = None
    inner = tokenizers.Tokenizer.from_str(json.dumps(content))
    # generation continues at the end of a text, so padding is on the left, hidden by the attention mask
    settings: dict[str, Any] = {"padding_side": "left", "add_bos_token": False, "add_eos_token": False}
    if tokenizer.eos is not None:
        settings["pad_token"] = inner.id_to_token(tokenizer.eos)
    _write(inner, tokenizer, folder, {**settings, "model_max_length": positions})


def _write(inner: tokenizers.Tokenizer, tokenizer: Tokenizer, folder: Path, settings: dict[str, Any]) -> None:
    inner.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
    # fdl's models get no token types, not even for pairs of texts
    content["model_input_names"] = ["input_ids", "attention_mask"]
    if tokenizer.eos is not None:
        content["eos_token"] = inner.id_to_token(tokenizer.eos)
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
