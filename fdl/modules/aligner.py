"""Language models whose tokenizer is not the data's: what they say, in the data's tokens."""

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
    """A batch of windows in the tokens of two tokenizers.

    Attributes:
        tokens: the model's own tokens, int64 ``[B, S]``, padded on the right with -1.
        positions: int64 ``[B, T]``, for every token of the data the own one that ends with the same byte; -1 where
            there is none.
        owners: int64 ``[B, S]``, for every own token the data's one that holds its last byte; -1 for padding.
    """

    tokens: Tensor
    positions: Tensor
    owners: Tensor


class Aligner(ABC):
    """Finds positions and ids of one tokenizer in another."""

    @abstractmethod
    def align(self, tokens: Tensor, data: Tokenizer, own: Tokenizer) -> Alignment:
        """Write windows in a model's own tokens.

        Args:
            tokens: int64 ``[B, T]`` on the CPU, padded on the right with -1.
            data: whose ids these are.
            own: the model's.
        """

    @abstractmethod
    def translate(self, data: Tokenizer, own: Tokenizer) -> Tensor:
        """Say with which id of the data the text of each own id begins: int64 ``[own.vocab_size]``, -1 for none."""


class BoundaryAligner(Aligner):
    """Compares texts byte by byte: positions where both tokenizers have a boundary, and what tokens begin with.

    What a model says after such a position is about the same text that the data's position has seen. A token of its
    own counts as the token of the same bytes where the data have it, and else as the first of those that the data's
    tokenizer writes for it: "the" is an answer "t" to the question for the next byte. For data in bytes the sum over
    all tokens that begin with a byte is exactly its probability; of longer tokens of the data too little may be said,
    where the model would write them in several of its own. What begins with no token of the data counts to the tail.
    Texts that a tokenizer changes (lower case, spaces) cannot be compared, and are left unanswered.
    """

    name = "boundary"

    def align(self, tokens: Tensor, data: Tokenizer, own: Tokenizer) -> Alignment:
        """Write windows in a model's own tokens, see `Aligner.align`."""
        rows = [self._row([id for id in row if id >= 0], data, own) for row in tokens.tolist()]
        width = max((len(ids) for ids, _, _ in rows), default=0)
        length = tokens.shape[1]
        return Alignment(
            torch.tensor([ids + [-1] * (width - len(ids)) for ids, _, _ in rows]).view(len(rows), width),
            torch.tensor([places + [-1] * (length - len(places)) for _, places, _ in rows]).view(len(rows), length),
            torch.tensor([owners + [-1] * (width - len(owners)) for _, _, owners in rows]).view(len(rows), width),
        )

    def translate(self, data: Tokenizer, own: Tokenizer) -> Tensor:
        """Say with which id of the data the text of each own id begins, see `Aligner.translate`."""
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
        """One window: own ids, positions and owners, as in `Alignment`."""
        # The end of a text counts as one byte, which no text has.
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
    """A causal language model with a tokenizer of its own, on windows of the data's tokens.

    It trains on the same text, written in its own tokens, and answers in the data's. Windows that are longer in its
    own tokens than it can read are cut, and each piece is read by itself.

    Args:
        model: as in `LanguageModel`.
        pretrained: as in `LanguageModel`.
        checkpoint: as in `LanguageModel`.
        config: as in `LanguageModel`.
        own_tokenizer: the model's, as for `make_tokenizer`; default the one beside its weights.
        own_context: positions of a new model; default the data's context.
        aligner: what goes between the two tokenizers; default `BoundaryAligner`.
        tuning: as in `LanguageModel`.
        lora: as in `LanguageModel`.
        gradient_checkpointing: as in `LanguageModel`.
        chunk: as in `LanguageModel`.
        tokenizer: the data's.
        context: tokens of a window of the data.
        optimizer: for a plain Trainer, as in `TransformersModule`.
        scheduler: for a plain Trainer, as in `TransformersModule`.

    Attributes:
        tokenizer: the model's own.
        data_tokenizer: the data's.
        vocab_size: of the model's own logits.

    Raises:
        UserError: as `LanguageModel`, or the model's own tokenizer is not known.
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
        # what is no token of the data is counted behind them, as one more
        self.register_buffer(
            "translation", translation.masked_fill(translation < 0, tokenizer.vocab_size), persistent=False
        )

    def hidden(self, tokens: Tensor) -> Tensor:
        """Refuse: hidden states belong to the model's own tokens, not to the data's.

        Raises:
            UserError: always.
        """
        raise UserError(
            "aligned_causal_lm has no hidden states for the data's tokens, which token_accuracy and distillation into "
            "this model need; it can be a specialist, measured by nll, perplexity and bits_per_byte"
        )

    def forward(self, tokens: Tensor, features: Sequence[str] = ()) -> Output:
        """Answer a batch; logits ``[B, S, V]`` are of the model's own tokens and vocabulary."""
        rows, _ = self._own_rows(tokens)
        if not features:
            states, seen = self._hidden_states(rows), {}
        else:
            with capture(self.network, features) as seen:
                states = self._hidden_states(rows)
        states, rows = (values.flatten(0, 1).unflatten(0, (len(tokens), -1)) for values in (states, rows))
        return Output(self.head(states), masked_mean(states, rows >= 0), seen)

    def token_nll(self, tokens: Tensor) -> Tensor:
        """Return the negative log-likelihood of the text, by tokens of the data.

        That of an own token counts where its last byte is, so sums over a window are those of the own tokens.

        Args:
            tokens: int64 ``[B, T]``, padded on the right with -1.

        Returns:
            float32 ``[B, T-1]`` in nats, 0 at padding, and where no own token ends.
        """
        rows, alignment = self._own_rows(tokens)
        nll = token_nll(self._hidden_states(rows), self.head, rows, self.chunk)
        nll = torch.nn.functional.pad(nll, (1, 0)).flatten().unflatten(0, (len(tokens), -1))
        owners = torch.nn.functional.pad(alignment.owners, (0, nll.shape[1] - alignment.owners.shape[1]), value=-1)
        sums = nll.new_zeros(len(tokens), tokens.shape[1]).scatter_add(1, owners.clamp_min(0), nll)
        return sums[:, 1:]

    @traceable
    def training_step(self, batch: TensorBatch, batch_idx: int = 0) -> dict[str, Tensor]:
        """Return ``loss``, the mean cross entropy of the next own token over the real ones."""
        rows, _ = self._own_rows(batch[0])
        return {"loss": next_token_loss(self._hidden_states(rows), self.head, rows, self.chunk)}

    @torch.no_grad()
    def next_log_probabilities(self, tokens: Tensor, temperature: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
        """Say what comes next in the data's tokens, see `LanguageModel.next_log_probabilities`.

        Answered are the positions that the aligner finds. Tokens of the data that begin none of the model's have
        probability 0, and the model's tokens that begin with none of the data's leave the sum of a row below 1.
        """
        rows, alignment = self._own_rows(tokens)
        states = self._hidden_states(rows).flatten(0, 1)
        starts = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * (len(states) // max(len(tokens), 1))
        places = (alignment.positions + starts).flatten()
        answered = ((alignment.positions >= 0) & (tokens >= 0)).flatten().nonzero().squeeze(1)
        for where in answered.split(self.chunk):
            p = torch.softmax(self.head(states[places[where]]).float() / temperature, dim=-1)
            yield where, self._to_data_vocabulary(p).log()

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, max_new_tokens: int, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue texts, see `LanguageModel.generate`; `max_new_tokens` counts the model's own."""
        prompt = self.aligner.align(tokens.cpu(), self.data_tokenizer, self.tokenizer).tokens.to(tokens.device)
        result = super().generate(prompt, max_new_tokens, temperature, generator).tolist()
        texts = [self.tokenizer.decode([id for id in row if id >= 0]) for row in result]
        rows = [torch.tensor(self.data_tokenizer.encode(text), dtype=torch.int64) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(tokens.device)

    def _own_rows(self, tokens: Tensor) -> tuple[Tensor, Alignment]:
        """Own tokens, cut to what the model can read, ``[B · pieces, L]``, and the alignment of whole windows."""
        alignment = self.aligner.align(tokens.cpu(), self.data_tokenizer, self.tokenizer)
        alignment = Alignment(*(part.to(tokens.device) for part in alignment))
        width = max(alignment.tokens.shape[1], 2)
        limit = min(width, self.positions or width)
        padded = torch.nn.functional.pad(
            alignment.tokens, (0, -(-width // limit) * limit - alignment.tokens.shape[1]), value=-1
        )
        return padded.view(-1, limit), alignment

    def _to_data_vocabulary(self, p: Tensor) -> Tensor:
        """Own probabilities ``[n, V]`` as those of the data's tokens."""
        p, known = p[:, : len(self.translation)], self.data_tokenizer.vocab_size
        return p.new_zeros(len(p), known + 1).index_add_(1, self.translation, p)[:, :known]


def _segment(raw: bytes, own: Tokenizer) -> tuple[list[int], list[int], bool]:
    """Write one text in own ids.

    Returns:
        The ids, the offset in the text at which each ends, and whether these offsets are true: where not, all ends
        are taken to lie at the text's end.
    """
    # A window may begin or end within a character, whose bytes then are no text.
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
    """The tokenizer of a model.

    Raises:
        UserError: it is not known.
    """
    own = make_tokenizer(spec) if spec is not None else own_tokenizer(model) if pretrained else None
    if own is None:
        raise UserError(f"own_tokenizer: missing: nothing lies beside the weights of {model} that would say")
    return own
