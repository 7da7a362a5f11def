"""A run's folder: run, resume, compare, export, audit, report."""
