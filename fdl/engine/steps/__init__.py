"""Strategies for the step of a training loop besides `training_loop.EagerStep`, and the choice among all."""
