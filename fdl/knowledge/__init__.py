"""Knowledge of the proxy set: clients' confidence, uploads, aggregation, distillation and feature transfer."""
