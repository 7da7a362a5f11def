"""Training and inference on Lightning's Fabric."""
