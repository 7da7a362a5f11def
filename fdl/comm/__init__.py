"""From messages to counted bytes and back: codec stages, wire format, channel, ledger."""
