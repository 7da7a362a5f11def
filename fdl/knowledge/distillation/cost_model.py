"""Costs of a model: floating-point operations of a prediction and of a training step, bytes of weights.

Operations are those of matrix products, convolutions and attention, a product and a sum counted as two; the operations
that torch's counter omits (normalisation, activations) are a small share of any network.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fdl.participants import Client
from fdl.recipe.config import Fit


def prediction_flops(client: Client, module: nn.Module) -> int:
    """Floating-point operations of the prediction of one private sample.

    Args:
        client: holds the sample, and computes.
        module: the model, put into evaluation mode.
    """
    inputs = _first_inputs(client)
    with torch.no_grad(), client.runtime.fabric.autocast(), FlopCounterMode(display=False) as counter:
        module.eval()(inputs)
    return counter.get_total_flops()


def training_flops(client: Client, module: nn.Module) -> int:
    """Floating-point operations of the forward and backward pass of one private sample; the weights do not change.

    Args:
        client: holds the sample, and computes.
        module: the model, put into evaluation mode, in which batch normalisation does not update its statistics.
    """
    inputs = _first_inputs(client)
    weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with torch.enable_grad(), client.runtime.fabric.autocast(), FlopCounterMode(display=False) as counter:
        module.eval()(inputs).logits.sum().backward()
    for weight in weights:
        weight.grad = None
    return counter.get_total_flops()


def samples_seen(count: int, config: Fit) -> int:
    """Number of samples that one fit processes, each counted as often as it is used.

    Args:
        count: number of samples of the data set.
        config: settings of the fit, with the number of epochs, or of steps and the batch size.
    """
    if config.steps is None:
        return config.epochs * count
    epochs, rest = divmod(config.steps, -(-count // config.batch_size))
    return epochs * count + rest * config.batch_size


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a model's weights and buffers, including frozen ones; shared ones count once.

    Args:
        module: the model.
    """
    held = (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.numel())
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in held}
    return sum(tensor.nbytes for tensor in tensors.values())


def _first_inputs(client: Client) -> Any:
    """The inputs of the first private sample as a batch of one, on the model's device."""
    runtime = client.runtime
    batch = move_data_to_device(client.train.batch(torch.tensor([0])), runtime.device)
    return runtime.fabric.strategy.precision.convert_input(batch)[0]
