"""Alignment of tokenizers: predictions of language models with their own tokenizer, in the data's tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fdl.errors import UserError
from fdl.losses.tokens import next_token_loss, token_nll
from fdl.modules.features import capture
from fdl.modules.language_model import LanguageModel
from fdl.modules.output import Output
from fdl.modules.tokenizers import Tokenizer, make_tokenizer, own_tokenizer
from fdl.modules.tracing import traceable
from fdl.modules.transformers_module import masked_mean
from fdl.modules.types import TensorBatch


class Alignment(NamedTuple):
    """Batch of windows in the tokens of two tokenizers.

    Attributes:
        tokens: the windows in the model's tokens, int64 ``[B, S]``, padded on the right with -1.
        positions: int64 ``[B, T]``, for every token of the data the position of the model's token that ends with the
            same byte; -1 if none does.
        owners: int64 ``[B, S]``, for every token of the model the position of the data's token that contains its last
            byte; -1 for padding.
    """

    tokens: Tensor
    positions: Tensor
    owners: Tensor


class Aligner(ABC):
    """Base class of mappings between the positions and ids of two tokenizers."""

    @abstractmethod
    def align(self, tokens: Tensor, data: Tokenizer, own: Tokenizer) -> Alignment:
        """Tokenize windows with a model's own tokenizer.

        Args:
            tokens: int64 ``[B, T]`` on the CPU, ids of the data's tokenizer, padded on the right with -1.
            data: tokenizer of the data.
            own: tokenizer of the model.
        """

    @abstractmethod
    def translate(self, data: Tokenizer, own: Tokenizer) -> Tensor:
        """Map every id of the model to the id of the data with which its text begins.

        Args:
            data: tokenizer of the data.
            own: tokenizer of the model.

        Returns:
            int64 ``[own.vocab_size]``; -1 for ids whose text begins with no token of the data.
        """


class BoundaryAligner(Aligner):
    """Alignment at common byte boundaries of both tokenizers.

    At such a boundary the model's prediction is conditioned on the same text as the data's position. A token of the
    model counts as the data's token of the same bytes if one exists, and otherwise as the first of the tokens into
    which the data's tokenizer splits it: "the" predicts the next byte "t". For data in bytes, the sum over all tokens
    that begin with a byte is exactly its probability; longer tokens of the data may get too little probability, if the
    model would split them into several of its own. Tokens that begin with no token of the data count to the tail.
    Texts that a tokenizer modifies (lower case, spaces) cannot be aligned, and get no predictions.
    """

    name = "boundary"

    def align(self, tokens: Tensor, data: Tokenizer, own: Tokenizer) -> Alignment:
        """Tokenize windows with a model's own tokenizer, see `Aligner.align`."""
        rows = [self._row([id for id in row if id >= 0], data, own) for row in tokens.tolist()]
        width = max((len(ids) for ids, _, _ in rows), default=0)
        length = tokens.shape[1]
        return Alignment(
            torch.tensor([ids + [-1] * (width - len(ids)) for ids, _, _ in rows]).view(len(rows), width),
            torch.tensor([places + [-1] * (length - len(places)) for _, places, _ in rows]).view(len(rows), length),
            torch.tensor([owners + [-1] * (width - len(owners)) for _, _, owners in rows]).view(len(rows), width),
        )

    def translate(self, data: Tokenizer, own: Tokenizer) -> Tensor:
        """Map every id of the model to the id of the data with which its text begins, see `Aligner.translate`."""
        same: dict[bytes, int] = {}
        for id, piece in enumerate(data.pieces):
            same.setdefault(piece, id)
        written = data.encode_batch([piece.decode(errors="ignore") for piece in own.pieces])
        result = []
        for piece, ids in zip(own.pieces, written):
            id = same.get(piece, ids[0] if ids else -1)
            begins = id >= 0 and data.pieces[id] and piece.startswith(data.pieces[id])
            result.append(id if begins else -1)
        if own.eos is not None and data.eos is not None:
            result[own.eos] = data.eos
        return torch.tensor(result)

    def _row(self, tokens: list[int], data: Tokenizer, own: Tokenizer) -> tuple[list[int], list[int], list[int]]:
        """Return the model's ids, positions and owners of one window, see `Alignment`."""
        # the end of a text counts as one byte, which no text contains
        lengths = [1 if id == data.eos else len(data.pieces[id]) for id in tokens]
        ends = list(accumulate(lengths))
        ids: list[int] = []
        places: dict[int, int] = {}
        owners: list[int] = []
        start, text = 0, b""
        for id, end in zip([*tokens, None], [*ends, ends[-1] if ends else 0]):
            if id is not None and id != data.eos:
                text += data.pieces[id]
                continue
            segment, offsets, compared = _segment(text, own)
            for own_id, offset in zip(segment, offsets):
                if compared:
                    places[start + offset] = len(ids)
                owners.append(min(bisect_left(ends, start + offset), len(ends) - 1))
                ids.append(own_id)
            if id is not None and own.eos is not None:
                places[end] = len(ids)
                owners.append(bisect_left(ends, end))
                ids.append(own.eos)
            start, text = end, b""
        return ids, [places.get(end, -1) for end in ends], owners


class AlignedLanguageModel(LanguageModel):
    """Causal language model with its own tokenizer, on windows of the data's tokens.

    It is trained on the same text, tokenized with its own tokenizer, and predicts tokens of the data. Windows that are
    longer than its context in its own tokens are cut, and the pieces are processed independently.

    Args:
        model: local folder in the format of transformers, id of the Hugging Face hub, or family of transformers.
        pretrained: load the weights of the folder or the hub.
        checkpoint: local file of weights instead, ``.safetensors`` or of torch.
        config: settings of the model's configuration, by transformers' names.
        own_tokenizer: the model's tokenizer, see `make_tokenizer`; default: the one stored with its weights.
        own_context: number of positions of a new model; default: the data's context.
        aligner: mapping between the two tokenizers; default `BoundaryAligner`.
        tuning: trained part: ``"full"``, ``"head"``, ``"frozen"`` or ``"lora"``.
        lora: settings of ``"lora"``, see `apply_tuning`.
        gradient_checkpointing: store one activation per layer, and recompute the others for the gradient.
        chunk: number of tokens whose logits are in memory at once.
        tokenizer: tokenizer of the data.
        context: number of the data's tokens per window.
        optimizer: ``{target, args}`` for a plain Trainer; default AdamW at 0.0005.
        scheduler: ``{target, args, interval}`` for a plain Trainer; default: none.

    Attributes:
        tokenizer: tokenizer of the model.
        data_tokenizer: tokenizer of the data.
        vocab_size: number of the model's logits per token.

    Raises:
        UserError: the model cannot be loaded or does not match the data (see `LanguageModel`), or its tokenizer is
            unknown.
    """

    name = "aligned_causal_lm"

    def __init__(
        self,
        model: str,
        pretrained: bool = False,
        checkpoint: str | None = None,
        config: dict | None = None,
        own_tokenizer: str | None = None,
        own_context: int | None = None,
        aligner: Aligner | None = None,
        tuning: Literal["full", "head", "frozen", "lora"] = "full",
        lora: dict | None = None,
        gradient_checkpointing: bool = False,
        chunk: int = 512,
        *,
        tokenizer: Tokenizer,
        context: int,
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        super().__init__(
            model,
            pretrained=pretrained,
            checkpoint=checkpoint,
            config=config,
            tuning=tuning,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
            chunk=chunk,
            tokenizer=_resolve_own_tokenizer(model, pretrained, own_tokenizer),
            context=own_context or (1 if pretrained or checkpoint else context),
            optimizer=optimizer,
            scheduler=scheduler,
        )
        self.data_tokenizer, self.aligner, self.context = tokenizer, aligner or BoundaryAligner(), context
        translation = self.aligner.translate(tokenizer, self.tokenizer)
        # tokens without a counterpart in the data share one additional id behind the data's ids
        self.register_buffer(
            "translation", translation.masked_fill(translation < 0, tokenizer.vocab_size), persistent=False
        )

    def hidden(self, tokens: Tensor) -> Tensor:
        """Raise an error, because hidden states belong to the model's own tokens and not to the data's.

        Args:
            tokens: ignored.

        Raises:
            UserError: always.
        """
        raise UserError(
            "aligned_causal_lm has no hidden states for the data's tokens, which token_accuracy and distillation into "
            "this model need; it can be a specialist, measured by nll, perplexity and bits_per_byte"
        )

    def forward(self, tokens: Tensor, features: Sequence[str] = ()) -> Output:
        """Compute logits, embedding and requested activations of a batch.

        Args:
            tokens: int64 ``[B, T]``, ids of the data, padded on the right with -1.
            features: submodules of the network, by dotted name or glob, whose activations are returned.

        Returns:
            Logits ``[B, S, V]`` over the model's own tokens and vocabulary, and the mean of the last hidden states as
            embedding, ``[B, D]``.
        """
        rows, _ = self._own_rows(tokens)
        if not features:
            states, seen = self._hidden_states(rows), {}
        else:
            with capture(self.network, features) as seen:
                states = self._hidden_states(rows)
        states, rows = (values.flatten(0, 1).unflatten(0, (len(tokens), -1)) for values in (states, rows))
        return Output(self.head(states), masked_mean(states, rows >= 0), seen)

    def token_nll(self, tokens: Tensor) -> Tensor:
        """Return the negative log-likelihood of the text, assigned to tokens of the data.

        The value of each of the model's tokens is added to the data's token that contains its last byte, so that sums
        over a window equal those over the model's tokens.

        Args:
            tokens: int64 ``[B, T]``, ids of the data, padded on the right with -1.

        Returns:
            float32 ``[B, T-1]`` in nats, 0 at padding and for tokens in which no token of the model ends.
        """
        rows, alignment = self._own_rows(tokens)
        nll = token_nll(self._hidden_states(rows), self.head, rows, self.chunk)
        nll = torch.nn.functional.pad(nll, (1, 0)).flatten().unflatten(0, (len(tokens), -1))
        owners = torch.nn.functional.pad(alignment.owners, (0, nll.shape[1] - alignment.owners.shape[1]), value=-1)
        sums = nll.new_zeros(len(tokens), tokens.shape[1]).scatter_add(1, owners.clamp_min(0), nll)
        return sums[:, 1:]

    @traceable
    def training_step(self, batch: TensorBatch, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return ``loss``, the mean cross entropy of the model's next token over all real tokens."""
        rows, _ = self._own_rows(batch[0])
        return {"loss": next_token_loss(self._hidden_states(rows), self.head, rows, self.chunk)}

    @torch.no_grad()
    def next_log_probabilities(self, tokens: Tensor, temperature: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        """Predict the next token of the data, see `LanguageModel.next_log_probabilities`.

        Only the positions found by the aligner get a prediction. Tokens of the data with which none of the model's
        tokens begins have probability 0, and the model's tokens that begin with none of the data's reduce the sum of a
        row below 1.

        Args:
            tokens: int64 ``[B, T]``, ids of the data, padded on the right with -1.
            temperature: temperature of the softmax over the model's logits.
        """
        rows, alignment = self._own_rows(tokens)
        states = self._hidden_states(rows).flatten(0, 1)
        starts = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * (len(states) // max(len(tokens), 1))
        places = (alignment.positions + starts).flatten()
        aligned = ((alignment.positions >= 0) & (tokens >= 0)).flatten().nonzero().squeeze(1)
        for where in aligned.split(self.chunk):
            p = torch.softmax(self.head(states[places[where]]).float() / temperature, dim=-1)
            yield where, self._to_data_vocabulary(p).log()

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Generate continuations of texts, see `LanguageModel.generate`.

        Args:
            tokens: int64 ``[B, T]``, ids of the data, padded on the right with -1.
            max_new_tokens: maximum number of the model's own tokens to generate.
            temperature: 0 for greedy decoding; otherwise the temperature of sampling.
            generator: random generator that seeds the sampling.
        """
        prompt = self.aligner.align(tokens.cpu(), self.data_tokenizer, self.tokenizer).tokens.to(tokens.device)
        result = super().generate(prompt, max_new_tokens, temperature, generator).tolist()
        texts = [self.tokenizer.decode([id for id in row if id >= 0]) for row in result]
        rows = [torch.tensor(self.data_tokenizer.encode(text), dtype=torch.int64) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(tokens.device)

    def _own_rows(self, tokens: Tensor) -> tuple[Tensor, Alignment]:
        """Return the model's tokens, cut to its context, ``[B · pieces, L]``, and the alignment of the full windows."""
        alignment = self.aligner.align(tokens.cpu(), self.data_tokenizer, self.tokenizer)
        alignment = Alignment(*(part.to(tokens.device) for part in alignment))
        width = max(alignment.tokens.shape[1], 2)
        limit = min(width, self.positions or width)
        padded = torch.nn.functional.pad(
            alignment.tokens, (0, -(-width // limit) * limit - alignment.tokens.shape[1]), value=-1
        )
        return padded.view(-1, limit), alignment

    def _to_data_vocabulary(self, p: Tensor) -> Tensor:
        """Convert probabilities ``[n, V]`` of the model's tokens into probabilities of the data's tokens."""
        p, known = p[:, : len(self.translation)], self.data_tokenizer.vocab_size
        return p.new_zeros(len(p), known + 1).index_add_(1, self.translation, p)[:, :known]


def _segment(raw: bytes, own: Tokenizer) -> tuple[list[int], list[int], bool]:
    """Tokenize one text with the model's tokenizer.

    Returns:
        The ids, the byte offset in the text at which each token ends, and True if these offsets are exact; if not, all
        tokens are assumed to end at the end of the text.
    """
    # a window may begin or end within a character, whose bytes are then not valid UTF-8
    skipped = next((i for i, byte in enumerate(raw[:4]) if byte & 0xC0 != 0x80), 0)
    text = raw[skipped:].decode(errors="ignore")
    ids, whole = own.encode(text), text.encode()
    lengths = [len(own.pieces[id]) for id in ids]
    written = b"".join(own.pieces[id] for id in ids)
    before = len(written) - len(whole)
    if raw[skipped:].startswith(whole) and written in (whole, b" " + whole):
        return ids, [skipped + max(end - before, 0) for end in accumulate(lengths)], True
    return ids, [len(raw)] * len(ids), False


def _resolve_own_tokenizer(model: str, pretrained: bool, spec: str | None) -> Tokenizer:
    """Return the tokenizer of a model.

    Raises:
        UserError: it is unknown.
    """
    own = make_tokenizer(spec) if spec is not None else own_tokenizer(model) if pretrained else None
    if own is None:
        raise UserError(f"own_tokenizer: missing: no tokenizer is stored with the weights of {model}")
    return own
