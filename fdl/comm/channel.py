"""The link between the server and its clients: everything that crosses becomes bytes, and is counted."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from fdl.comm.bandwidth import Bandwidth
from fdl.comm.codec import Codec
from fdl.comm.ladder import Ladder
from fdl.comm.ledger import Ledger
from fdl.comm.memory import Memory
from fdl.comm.wire import BROADCAST, pack, unpack
from fdl.errors import RefusedError, UserError
from fdl.messages import Bundle, Message
from fdl.seeding import numpy_stream


class Channel:
    """Encodes, transmits, decodes and counts messages.

    The receiver gets only what the bytes hold, in a simulation too, so every loss of precision is felt. A refused
    message counts like any other: it was sent. Writing the refusal into the ledger is left to the caller, who may
    refuse a message for reasons of his own.

    A chain that remembers refers to the last message that was accepted here: decoded, and fit to use. Its receiver
    tells the sender so by the checksum, and both ends keep it; after a message that was lost or refused, both go on
    from the one before. Each client then has its own past, so each download is encoded for one client alone.

    On a link with a budget what is too large is coded more cheaply, rung by rung of a `Ladder`, then with fewer of its
    rows (`narrowed`) if it has any; the ledger notes what was chosen. What does not fit at all is refused and not sent.

    The parts of a bundle are packed, counted and remembered one by one, under their own kinds.

    Args:
        upload: chain for messages from clients to the server.
        download: chain for messages from the server to clients.
        ledger: where the bytes are counted.
        seed: the recipe's seed, for rounding noise.
        limit: most bytes that one decoded message may have.
        bandwidth: the clients' links; unlimited when None.
    """

    def __init__(
        self,
        upload: Codec,
        download: Codec,
        ledger: Ledger,
        seed: int,
        limit: int = 1 << 31,
        bandwidth: Bandwidth | None = None,
    ):
        if limit < 1:
            raise UserError(f"limit must be at least 1 byte, got {limit}")
        self.bandwidth = bandwidth or Bandwidth()
        self._codecs = {"up": upload, "down": download}
        self._ladders = {d: Ladder(codec) for d, codec in self._codecs.items() if self.bandwidth.limited(d)}
        self.ledger, self._seed, self._limit = ledger, seed, limit
        ledger.links = self.bandwidth.link if self.bandwidth.timed else None
        self._memories: dict[tuple[str, int, str], Memory] = {}
        self._round = -1
        self._spent: dict[tuple[str, int], int] = {}
        self._sent: WeakKeyDictionary[Message, dict[tuple[Codec, int], list]] = WeakKeyDictionary()

    def upload(self, message: Message | Bundle | None, client: int, round: int) -> Message | Bundle | None:
        """Send a client's message to the server.

        Args:
            message: what the client has to say, None for nothing.
            client: its id.
            round: the current round.

        Returns:
            What the server receives.

        Raises:
            RefusedError: the bytes that arrived do not make a usable message, or too few bytes could be sent.
        """
        return None if message is None else self._carry(message, "up", client, round)

    def download(self, message: Message | Bundle | None, client: int, round: int) -> Message | Bundle | None:
        """Send the server's message to a client; arguments, result and errors as in `upload`.

        One message object is encoded once a round however many clients get it, and counted for each, unless the chain
        remembers. As long as the link hands the bytes on unchanged, these clients share one decoded object: do not
        write into its tensors.
        """
        return None if message is None else self._carry(message, "down", client, round)

    def setup_cost(self, kind: str, nbytes: int, client: int) -> None:
        """Count bytes that a client must get once before the first round, such as an encoder's weights."""
        self.ledger.add(0, client, "setup", kind, nbytes)

    def transmit(self, data: bytes, client: int, round: int, direction: str) -> bytes:
        """Carry bytes over the simulated link; a subclass may damage, cut or delay them."""
        return data

    def state_dict(self) -> dict[str, Any]:
        """Return what both ends of every link remember: tensors, numbers, strings and dicts of them."""
        return {f"{d}/{client}/{kind}": memory.state_dict() for (d, client, kind), memory in self._memories.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the channel that gave this state."""
        self._memories, self._round = {}, -1
        for key, memory in state.items():
            direction, client, kind = key.split("/", 2)
            self._memory(direction, int(client), kind).load_state_dict(memory)

    def _carry(self, message: Message | Bundle, direction: str, client: int, round: int) -> Message | Bundle:
        """Encode for the link, count, transmit, decode."""
        if round != self._round:
            self._sent.clear()
            self._spent.clear()
            self._round = round
        if direction in self._ladders:
            message, codec = self._fit(message, direction, client, round)
        else:
            codec = self._codecs[direction]
        if isinstance(message, Bundle):
            return Bundle(tuple([self._deliver(part, codec, direction, client, round) for part in message.parts]))
        return self._deliver(message, codec, direction, client, round)

    def _deliver(self, message: Message, codec: Codec, direction: str, client: int, round: int) -> Message:
        """Send one message, coded with a chain, and return what the receiver makes of it."""
        sent = self._encode(message, codec, direction, client, round)
        data, decoded = sent
        self.ledger.add(round, client, direction, message.kind, len(data))
        received = self.transmit(data, client, round, direction)
        if decoded is not None and received is data:
            return decoded
        decoded = unpack(
            received,
            self._ladders.get(direction, codec),
            limit=self._limit,
            client=self._address(direction, client),
            round=round,
            memory=self._memory(direction, client, message.kind) if codec.remembers else None,
        )
        if received == data:
            sent[1] = decoded
            if codec.remembers:
                self._memory(direction, client, message.kind).commit()
        return decoded

    def _fit(
        self, message: Message | Bundle, direction: str, client: int, round: int
    ) -> tuple[Message | Bundle, Codec]:
        """Return what to send and the chain to code it with, as dear as the link allows, and note a choice."""
        budget = self.bandwidth.link(client, direction).bytes_per_round
        left = budget - self._spent.get((direction, client), 0)
        rungs = self._ladders[direction].rungs
        share, chosen, size = 1.0, message, 0
        for codec in rungs:
            size = self._size(chosen, codec, direction, client, round)
            if size <= left:
                break
        while size > left:
            share *= min(0.98 * left / size, 0.98)
            chosen = message.narrowed(share) if share > 0 else None
            if chosen is None:
                what = " and ".join(part.kind for part in _parts(message))
                raise RefusedError(
                    f"too large for the link: {what} take {size} bytes at least ({codec}), "
                    f"{left:.0f} of {budget:.0f} bytes are left in this round"
                )
            size = self._size(chosen, codec, direction, client, round)
        self._spent[direction, client] = self._spent.get((direction, client), 0) + size
        if chosen is not message or codec is not rungs[0]:
            self.ledger.note(round, client, direction, repr(codec), share)
        return chosen, codec

    def _size(self, message: Message | Bundle, codec: Codec, direction: str, client: int, round: int) -> int:
        return sum(len(self._encode(part, codec, direction, client, round)[0]) for part in _parts(message))

    def _encode(self, message: Message, codec: Codec, direction: str, client: int, round: int) -> list:
        """Return a message's bytes and what they decode to, None until it is known.

        It is kept for the round where it goes to everybody, or was encoded to learn its size.
        """
        address = self._address(direction, client)
        shared = address == BROADCAST or direction in self._ladders
        if shared:
            known = self._sent.setdefault(message, {})
            key = (codec, address)
            if key in known:
                return known[key]
        rng = memory = None
        if codec.draws:
            rng = numpy_stream(self._seed, f"codec/{direction}", round, -1 if address == BROADCAST else client)
        if codec.remembers:
            memory = self._memory(direction, client, message.kind)
            memory.begin()
            shared = False
        sent = [pack(message, codec, client=address, round=round, rng=rng, memory=memory), None]
        if shared:
            known[key] = sent
        return sent

    def _address(self, direction: str, client: int) -> int:
        return BROADCAST if direction == "down" and not self._codecs[direction].remembers else client

    def _memory(self, direction: str, client: int, kind: str) -> Memory:
        key = (direction, client, kind)
        if key not in self._memories:
            self._memories[key] = Memory(self._limit)
        return self._memories[key]


def _parts(message: Message | Bundle) -> tuple[Message, ...]:
    return message.parts if isinstance(message, Bundle) else (message,)
