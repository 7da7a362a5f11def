"""The smallest configuration of each family of language models and text encoders, for bytes."""

import torch

from fdl.modules.tokenizers import ByteTokenizer

BYTES = ByteTokenizer()
_COMMON = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
DECODERS = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2},
    "gpt_neox": _COMMON,
    "opt": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
    },
    "llama": {**_COMMON, "num_key_value_heads": 1},
    "qwen2": {**_COMMON, "num_key_value_heads": 2, "tie_word_embeddings": True},
}
ENCODERS = {
    "bert": _COMMON,
    "distilbert": {"n_layers": 2, "dim": 16, "n_heads": 2, "hidden_dim": 32},
    "roberta": _COMMON,
}


def padded(rows: list[list[int]]) -> torch.Tensor:
    """Token ids, padded on the right with -1."""
    rows = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def windows(context: int = 12, rows: int = 3, vocabulary: int = 257, seed: int = 0) -> torch.Tensor:
    """Random windows, the second of which ends early."""
    tokens = torch.randint(2, vocabulary, (rows, context), generator=torch.Generator().manual_seed(seed))
    tokens[1, context // 2 :] = -1
    return tokens


def saved(module, folder, tokenizer=BYTES) -> str:
    """Write a module's network and its tokenizer as transformers does."""
    module.network.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save(folder)
    return str(folder)
