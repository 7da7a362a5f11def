"""LightningModules: specialists and students, usable unchanged with a plain Trainer."""
