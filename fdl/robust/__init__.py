"""Aggregation that holds where some of the clients lie: rules, and how they are applied to weights and to answers."""
