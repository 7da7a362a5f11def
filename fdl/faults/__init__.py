"""Simulated faults of clients: dropouts, stragglers, NaN uploads and late joins, drawn from the recipe's seed."""
