"""LightningModules: specialists and students, usable with a plain Trainer as they are."""
