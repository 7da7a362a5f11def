"""The link between the server and its clients: everything that crosses becomes bytes, and is counted."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np

from fdl.comm.codec import Codec
from fdl.comm.ledger import Ledger
from fdl.comm.wire import BROADCAST, pack, unpack
from fdl.errors import UserError
from fdl.messages import Message
from fdl.seeding import numpy_stream


class Channel:
    """Encodes, transmits, decodes and counts messages.

    The receiver gets only what the bytes hold, in a simulation too, so every loss of precision is felt. A refused
    message counts like any other: it was sent. Writing the refusal into the ledger is left to the caller, who may
    refuse a message for reasons of his own.

    Args:
        upload: chain for messages from clients to the server.
        download: chain for messages from the server to clients.
        ledger: where the bytes are counted.
        seed: the recipe's seed, for rounding noise.
        limit: most bytes that one decoded message may have.
    """

    def __init__(self, upload: Codec, download: Codec, ledger: Ledger, seed: int, limit: int = 1 << 31):
        if limit < 1:
            raise UserError(f"limit must be at least 1 byte, got {limit}")
        self._codecs = {"up": upload, "down": download}
        self.ledger, self._seed, self._limit = ledger, seed, limit
        self._sent_round = -1
        self._sent: WeakKeyDictionary[Message, tuple[bytes, Message]] = WeakKeyDictionary()

    def upload(self, message: Message | None, client: int, round: int) -> Message | None:
        """Send a client's message to the server.

        Args:
            message: what the client has to say, None for nothing.
            client: its id.
            round: the current round.

        Returns:
            What the server receives.

        Raises:
            RefusedError: the bytes that arrived do not make a usable message.
        """
        if message is None:
            return None
        data = self._pack(message, "up", round, client, client)
        self.ledger.add(round, client, "up", message.kind, len(data))
        received = self.transmit(data, client, round, "up")
        return unpack(received, self._codecs["up"], limit=self._limit, client=client, round=round)

    def download(self, message: Message | None, client: int, round: int) -> Message | None:
        """Send the server's message to a client; arguments, result and errors as in `upload`.

        One message object is encoded once a round however many clients get it, and counted for each. As long as the
        link hands the bytes on unchanged, these clients share one decoded object: do not write into its tensors.
        """
        if message is None:
            return None
        if round != self._sent_round:
            self._sent.clear()
            self._sent_round = round
        data, decoded = self._sent.get(message, (None, None))
        if data is None:
            data = self._pack(message, "down", round, -1, BROADCAST)
        self.ledger.add(round, client, "down", message.kind, len(data))
        received = self.transmit(data, client, round, "down")
        if decoded is None or received is not data:
            decoded = unpack(received, self._codecs["down"], limit=self._limit, client=BROADCAST, round=round)
            if received is data:
                self._sent[message] = data, decoded
        return decoded

    def setup_cost(self, kind: str, nbytes: int, client: int) -> None:
        """Count bytes that a client must get once before the first round, such as an encoder's weights."""
        self.ledger.add(0, client, "setup", kind, nbytes)

    def transmit(self, data: bytes, client: int, round: int, direction: str) -> bytes:
        """Carry bytes over the simulated link; a subclass may damage, cut or delay them."""
        return data

    def _pack(self, message: Message, direction: str, round: int, stream: int, address: int) -> bytes:
        codec = self._codecs[direction]
        rng: np.random.Generator | None = None
        if codec.draws:
            rng = numpy_stream(self._seed, f"codec/{direction}", round, stream)
        return pack(message, codec, client=address, round=round, rng=rng)
