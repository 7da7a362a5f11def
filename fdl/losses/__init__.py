"""Training losses, pure functions of tensors."""
