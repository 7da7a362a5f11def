"""The parts of a federated round: sampling, execution, exchange, evaluation, records, snapshots."""
