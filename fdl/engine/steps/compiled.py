"""Steps whose objective runs through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fdl.engine.compile import Compiler
from fdl.engine.training_loop import EagerStep
from fdl.modules.types import Batch


class CompiledStep:
    """A step that computes full batches with its compiled objective.

    The last batch of an epoch differs in size between clients, which is not worth compiling for.

    Args:
        step: the eager step.
        compiler: keeps compiled objectives from fit to fit.
        mode: mode of ``torch.compile``.
    """

    def __init__(self, step: EagerStep, compiler: Compiler, mode: str):
        self._step, self._compiler, self._mode = step, compiler, mode
        self.fabric, self.module, self.optimizer = step.fabric, step.module, step.optimizer
        self.update, self.reduce_losses = step.update, step.reduce_losses

    def place(self, batch: Batch, full: bool) -> tuple[Any, bool]:
        """Move a batch to the device; also return whether it is full.

        Args:
            batch: a batch in host memory.
            full: True if it has as many samples as the recipe's batch size.
        """
        return self._step.place(batch, full), full

    def backward(self, placed: tuple[Any, bool]) -> Mapping[str, Tensor]:
        """Run a forward and a backward pass, with the compiled objective if the batch is full.

        Args:
            placed: the result of `place`.

        Returns:
            The named losses.
        """
        batch, full = placed
        mode, step = self._mode if full else "none", self._step
        return self._compiler.run(lambda objective: step.gradients(objective, batch), step.module, step.objective, mode)
