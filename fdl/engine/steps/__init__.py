"""Strategies for the step of a training loop beside `training_loop.EagerStep`, and the choice among all."""
