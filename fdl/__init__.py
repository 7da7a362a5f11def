"""fdl: federated distillation of foundation models with PyTorch Lightning."""

__version__ = "0.1.0"
