"""fdl: federated distillation of foundation models with PyTorch Lightning."""

import os

# MKL, which multiplies matrices for torch, else chooses kernels by where in memory a matrix happens to lie; it reads
# this once, when it is first used (docs/reproducibility.md)
os.environ.setdefault("MKL_CBWR", "AUTO")

__version__ = "0.1.0"
