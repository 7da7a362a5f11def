"""CLIP-like dual encoders of open_clip, by name or from a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fdl.errors import UserError
from fdl.modules.clip_tokenizer import PREFIX, ClipTokenizer, model_config
from fdl.modules.dual_encoder import DualEncoder
from fdl.modules.input_adapter import adapter_for
from fdl.modules.open_clip_networks import (
    create_from_config,
    create_named,
    fill_from_file,
    lora_layers,
    preprocessing_of,
    projection_names,
)
from fdl.modules.tuning import apply_tuning, keep_frozen_in_eval, merge_lora

if TYPE_CHECKING:
    from fdl.modules.tokenizers import Tokenizer


class OpenClip(DualEncoder):
    """Dual encoder of open_clip, by name or from a configuration.

    Args:
        model: open_clip's name, e.g. ``ViT-B-32``, ``ViT-B-16``, ``RN50``, ``ViT-L-14``, of a model that uses CLIP's
            tokenizer; the data's tokenizer must be ``open_clip:<name>``. None: give `config` instead.
        pretrained: tag of open_clip's weights, e.g. ``laion2b_s34b_b79k``, downloaded or from the local cache; it also
            determines the activation function (GELU or QuickGELU).
        checkpoint: local file of weights instead, ``.safetensors`` or torch's. OpenAI's own need a model whose name
            ends in ``-quickgelu``.
        config: arguments of open_clip's CLIP class, ``{embed_dim, vision_cfg, text_cfg}``, for a model that is trained
            from scratch. By default vocabulary, context and image size are those of the data.
        tuning: trained part: ``"full"``: everything; ``"head"``: the last projections of both towers and the scale;
            ``"lora"``: these and low-rank updates of linear layers; ``"frozen"``: nothing. All but the first need
            `pretrained` or `checkpoint`.
        lora: settings of ``"lora"``, see `apply_tuning`.
        adapt: convert images to the size, channels and normalisation that the model expects (see `adapter_for`); None:
            True for a model by name.
        loss: ``"contrastive"`` (CLIP) or ``"sigmoid"`` (SigLIP).
        input_shape: (C, H, W) of one image.
        tokenizer: tokenizer of the captions.
        context: maximum number of tokens per caption.
        normalization: per-channel mean and standard deviation with which the data are normalised, for `adapt`.
        optimizer: ``{target, args}`` for a plain Trainer; default AdamW at 0.001.
        scheduler: ``{target, args, interval}`` for a plain Trainer; default: none.

    Attributes:
        sizes: open_clip's configuration of the network.
        frozen: names in the state that never change and are the same at every site: they are neither sent nor stored.

    Raises:
        UserError: the model or its weights are unknown or cannot be downloaded, or the data do not match the model.
    """

    name = "open_clip"
    frozen: frozenset[str] = frozenset()

    def __init__(
        self,
        model: str | None = None,
        pretrained: str | None = None,
        checkpoint: str | None = None,
        config: dict | None = None,
        tuning: Literal["full", "head", "frozen", "lora"] = "full",
        lora: dict | None = None,
        adapt: bool | dict | None = None,
        loss: Literal["contrastive", "sigmoid"] = "contrastive",
        *,
        input_shape: tuple[int, int, int],
        tokenizer: Tokenizer,
        context: int,
        normalization: tuple[list[float], list[float]] | None = None,
        optimizer: dict | None = None,
        scheduler: dict | None = None,
    ):
        super().__init__(loss, optimizer, scheduler)
        if (model is None) == (config is None):
            raise UserError("give model, a name of open_clip, or config, the sizes of a new one: one of the two")
        if pretrained is not None and (checkpoint is not None or model is None):
            raise UserError("pretrained is a tag of a named model's weights; give it or checkpoint, not both")
        if model is None:
            self.start, self.end = tokenizer.vocab_size, tokenizer.vocab_size + 1
            network, self.sizes = create_from_config(config, tuple(input_shape), tokenizer.vocab_size + 2, context + 2)
        else:
            own = ClipTokenizer(model)
            if tokenizer.fingerprint != own.fingerprint:
                raise UserError(f"{model} reads CLIP's tokens: set the data's tokenizer to {PREFIX}{model}")
            self.start, self.end = own.start, own.eos
            network = create_named(model, pretrained)
            self.sizes = model_config(model)
        if checkpoint is not None:
            fill_from_file(network, checkpoint, model or "the model of config")
        known = pretrained is not None or checkpoint is not None
        self._take_scale(network, known)
        self.backbone, self.context = network, network.context_length
        self.adapter = adapter_for(
            adapt, input_shape, normalization, preprocessing_of(network), wanted=model is not None
        )
        self.embedding_dim = self._probe_model(model or "the model of config", tuple(input_shape))
        self._tune(tuning, lora, known)

    def image_vectors(self, images: Tensor) -> Tensor:
        """Return vectors [B, D] of images [B, C, H, W]."""
        return self.backbone.encode_image(images if self.adapter is None else self.adapter(images))

    def text_vectors(self, tokens: Tensor) -> Tensor:
        """Return vectors [B, D] of texts [B, T], with start and end tokens added."""
        return self.backbone.encode_text(add_start_and_end(tokens, self.start, self.end, self.context))

    def open_clip_state(self) -> dict[str, Tensor]:
        """Return the weights under open_clip's names, with low-rank updates merged into them."""
        state = merge_lora(self.backbone).state_dict() | {"logit_scale": self.logit_scale.detach()}
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias.detach()}
        return {name: tensor.contiguous() for name, tensor in (state | bias).items()}

    def train(self, mode: bool = True) -> OpenClip:
        """Switch to training or evaluation mode; frozen parts stay in evaluation mode.

        Args:
            mode: True for training mode.
        """
        super().train(mode)
        if mode and self.frozen:
            keep_frozen_in_eval(self.backbone)
        return self

    def _tune(self, tuning: str, lora: dict | None, known: bool) -> None:
        """Freeze the untrained parts, and add low-rank updates if requested."""
        if tuning == "lora":
            lora = {"targets": lora_layers(self.backbone), **(lora or {})}
        frozen = apply_tuning(self.backbone, tuning, projection_names(self.backbone), lora, pretrained=known)
        names = [f"backbone.{name}" for name in frozen]
        if tuning == "frozen":
            for name, parameter in (("logit_scale", self.logit_scale), ("logit_bias", self.logit_bias)):
                if parameter is not None:
                    parameter.requires_grad_(False)
                    names.append(name)
        self.frozen = frozenset(names)

    def _take_scale(self, network: nn.Module, known: bool) -> None:
        """Move scale and bias out of the network, keeping the values of pretrained weights."""
        with torch.no_grad():
            if known:
                self.logit_scale.copy_(network.logit_scale.reshape(()))
            if known and self.logit_bias is not None and network.logit_bias is not None:
                self.logit_bias.copy_(network.logit_bias.reshape(()))
        del network.logit_scale, network.logit_bias

    def _probe_model(self, label: str, input_shape: tuple[int, int, int]) -> int:
        """Run one blank image through the network, so that unsuitable images fail here, and return D."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return self.encode_image(torch.zeros(1, *input_shape)).shape[1]
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            size = "×".join(map(str, input_shape))
            raise UserError(f"{label} cannot take images of {size} (channels×height×width): {error}") from error
        finally:
            self.train(training)


def add_start_and_end(tokens: Tensor, start: int, end: int, context: int) -> Tensor:
    """Add start and end tokens to texts, padded with 0 to the context of a CLIP text tower.

    Start and end tokens that are already present are not doubled. A text that is too long is cut before its end token.

    Args:
        tokens: int64 [B, T], padded on the right with -1.
        start: id of the start token.
        end: id of the end token, the largest of all ids, by which the tower finds the end of a text.
        context: number of tokens that the tower reads.

    Returns:
        int64 [B, context].
    """
    present = (tokens >= 0) & (tokens != start) & (tokens != end)
    # words move to the front, in their order; start tokens, end tokens and padding follow
    order = (~present).to(torch.int8).argsort(dim=1, stable=True)
    words = tokens.gather(1, order)[:, : context - 2]
    counts = present.sum(1).clamp_max(context - 2).unsqueeze(1)
    result = tokens.new_zeros(tokens.shape[0], context)  # not len(): traced for export, that is a constant
    places = torch.arange(words.shape[1], device=tokens.device)
    result[:, 1 : 1 + words.shape[1]] = words.where(places < counts, 0)
    result[:, 0] = start
    return result.scatter(1, counts + 1, end)
