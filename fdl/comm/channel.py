"""Channel between server and clients, which encodes every message to bytes and counts them."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from fdl.comm.authentication import TAG, Authentication, digest
from fdl.comm.bandwidth import Bandwidth
from fdl.comm.codec import Codec
from fdl.comm.fallback import CodecFallbacks
from fdl.comm.ledger import Ledger
from fdl.comm.link_state import LinkState
from fdl.comm.wire import BROADCAST, pack, unpack
from fdl.errors import RejectedMessageError, UserError
from fdl.messages import Bundle, Message
from fdl.utils.seeding import numpy_stream
from fdl.utils.stopwatch import Stopwatch


class Channel:
    """Simulated channel that encodes, transmits, decodes and counts messages.

    The receiver gets only what the bytes hold, in a simulation too, so every loss of precision is felt. A refused
    message counts like any other: it was sent. Writing the refusal into the ledger is left to the caller, who may
    refuse a message for reasons of his own.

    A chain that remembers refers to the last message that was accepted: decoded, and fit to use. Its receiver tells the
    sender so by the checksum, and both ends keep it; after a message that was lost or refused, both go on from the one
    before. What decodes is accepted, unless its receiver has more to ask of it, and says so (`unconfirmed`). Each
    client then has its own past, so each download is encoded for one client alone.

    On a link with a budget what is too large is coded more cheaply, by the next of `CodecFallbacks`, then with fewer
    rows (`truncated`) if it has any; the ledger notes what was chosen. What does not fit at all is rejected, not sent.

    The parts of a bundle are packed and counted one by one, under their own kinds, and accepted together or not at all.

    Where messages are authenticated, each carries its client's tag behind its bytes. What arrives with another tag is
    refused before anything in it is looked at.

    A client's clock begins with the round: messages over its link take time, and so may what it computes (`busy`). An
    upload that arrives after the deadline is late, and refused.

    Args:
        upload: chain for messages from clients to the server.
        download: chain for messages from the server to clients.
        ledger: where the bytes are counted.
        seed: the recipe's seed, for rounding noise.
        limit: most bytes that one decoded message may have.
        bandwidth: the clients' links; unlimited when None.
        authentication: makes and checks tags; None for messages without.
        deadline: seconds from the beginning of a round after which no upload is taken.

    Attributes:
        clock: where the time of coding goes.
    """

    def __init__(
        self,
        upload: Codec,
        download: Codec,
        ledger: Ledger,
        seed: int,
        limit: int = 1 << 31,
        bandwidth: Bandwidth | None = None,
        authentication: Authentication | None = None,
        deadline: float = math.inf,
    ):
        if limit < 1:
            raise UserError(f"limit must be at least 1 byte, got {limit}")
        self.bandwidth = bandwidth or Bandwidth()
        self._codecs = {"up": upload, "down": download}
        self._ladders = {d: CodecFallbacks(codec) for d, codec in self._codecs.items() if self.bandwidth.limited(d)}
        self.ledger, self._seed, self._limit = ledger, seed, limit
        ledger.links = self.bandwidth.link if self.bandwidth.timed else None
        self._memories: dict[tuple[str, int, str], LinkState] = {}
        self._waiting: dict[int, list[LinkState]] | None = None
        self._authentication, self._deadline = authentication, deadline
        self.clock = Stopwatch()
        self._round = -1
        self._spent: dict[tuple[str, int], int] = {}
        self._elapsed: dict[int, float] = {}
        self._sent: WeakKeyDictionary[Message, dict[tuple[Codec, int], _Sent]] = WeakKeyDictionary()

    def reach(self, asked: Sequence[int], dropped: Sequence[int], round: int) -> tuple[list[int], list[int]]:
        """Return the sampled clients that can be reached, and those of them that upload nothing; here unchanged."""
        return list(asked), list(dropped)

    def upload(self, message: Message | Bundle | None, client: int, round: int) -> Message | Bundle | None:
        """Send a client's message to the server.

        Args:
            message: the client's upload, None for nothing to send.
            client: its id.
            round: the current round.

        Returns:
            The message that the server receives.

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

    @contextmanager
    def unconfirmed(self) -> Iterator[None]:
        """Commit links' states after an upload only once `confirm` is called for it.

        What is not confirmed when the context ends was refused: both ends of the link go on from the message before.
        """
        self._waiting = {}
        try:
            yield
        finally:
            self._waiting = None

    def confirm(self, client: int) -> None:
        """The receiver has accepted the upload that came last from a client; nothing to do for one that came elsewhere.

        Args:
            client: its id.
        """
        for memory in (self._waiting or {}).pop(client, ()):
            memory.commit()

    def busy(self, client: int, round: int, seconds: float) -> None:
        """Add simulated computing time, in seconds, to a client's clock; its next upload waits for it."""
        self._turn_to(round)
        self._elapsed[client] = self._elapsed.get(client, 0.0) + seconds

    def setup_cost(self, kind: str, nbytes: int, client: int) -> None:
        """Count bytes that a client must get once before the first round, such as an encoder's weights."""
        self.ledger.add(0, client, "setup", kind, nbytes)

    def transmit(self, data: bytes, client: int, round: int, direction: str) -> bytes:
        """Carry bytes over the simulated link; a subclass may damage, cut or delay them."""
        return data

    def state_dict(self, clients: Collection[int] | None = None) -> dict[str, Any]:
        """Return what both ends of every link remember: tensors, numbers, strings and dicts of them.

        Args:
            clients: whose links; None for all.
        """
        return {
            f"{d}/{client}/{kind}": memory.state_dict()
            for (d, client, kind), memory in self._memories.items()
            if clients is None or client in clients
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the channel that gave this state."""
        self._memories, self._round = {}, -1
        self._remember(state)

    def fresh(self) -> Channel:
        """Copy the channel with its codecs, links and limits, but with an empty ledger and nothing sent over it."""
        fresh = copy.copy(self)
        fresh.ledger = Ledger()
        fresh.ledger.links = self.ledger.links
        fresh._spent, fresh._elapsed, fresh._sent, fresh._waiting = {}, {}, WeakKeyDictionary(), None
        fresh.load_state_dict({})
        return fresh

    def restore(self, client: int, state: dict[str, Any]) -> None:
        """Let one client's link remember what a state says, and nothing else; arguments as in `load_state_dict`."""
        for key in [key for key in self._memories if key[1] == client]:
            del self._memories[key]
        self._remember({key: memory for key, memory in state.items() if int(key.split("/")[1]) == client})

    def _remember(self, state: dict[str, Any]) -> None:
        for key, memory in state.items():
            direction, client, kind = key.split("/", 2)
            self._memory(direction, int(client), kind).load_state_dict(memory)

    def _carry(self, message: Message | Bundle, direction: str, client: int, round: int) -> Message | Bundle:
        """Encode for the link, count, transmit, decode."""
        self._turn_to(round)
        if direction in self._ladders:
            message, codec = self._fit(message, direction, client, round)
        else:
            codec = self._codecs[direction]
        accepted: list[LinkState] = []
        received = [self._deliver(part, codec, direction, client, round, accepted) for part in _parts(message)]
        if len({type(part) for part in received}) < len(received):
            raise RejectedMessageError("two parts of one type")
        if direction == "up" and self._waiting is not None:
            self._waiting[client] = accepted
        else:
            for memory in accepted:
                memory.commit()
        return Bundle(tuple(received)) if isinstance(message, Bundle) else received[0]

    def _deliver(
        self, message: Message, codec: Codec, direction: str, client: int, round: int, accepted: list[LinkState]
    ) -> Message:
        """Send one message, encoded with a chain, and return the decoded message.

        A memory to commit once all that belongs together is there is added to `accepted`.
        """
        sent = self._encode(message, codec, direction, client, round)
        data, decoded = sent.data, sent.decoded
        if self._authentication is not None:
            sent.digest = sent.digest or digest(data)
            data += self._authentication.tag(sent.digest, client, round, direction)
        self.ledger.add(round, client, direction, message.kind, len(data))
        received = self.transmit(data, client, round, direction)
        if self._deadline < math.inf:
            self._wait(client, direction, len(data))
        if decoded is not None and received is data:
            return decoded
        opened = received
        if self._authentication is not None:
            opened = self._authentication.verify(received, client, round, direction)
        with self.clock.part("decode"):
            decoded = unpack(
                opened,
                self._ladders.get(direction, codec),
                limit=self._limit,
                client=self._address(direction, client),
                round=round,
                memory=self._memory(direction, client, message.kind) if codec.remembers else None,
                intact=opened is sent.data,
            )
        if received == data:
            sent.decoded = decoded
            if codec.remembers:
                accepted.append(self._memory(direction, client, message.kind))
        return decoded

    def _turn_to(self, round: int) -> None:
        """Forget what belongs to another round."""
        if round != self._round:
            self._sent.clear()
            self._spent.clear()
            self._elapsed.clear()
            self._round = round

    def _wait(self, client: int, direction: str, nbytes: int) -> None:
        """Let the time pass that a message takes."""
        elapsed = self._elapsed.get(client, 0.0) + self.bandwidth.link(client, direction).seconds(nbytes)
        self._elapsed[client] = elapsed
        if direction == "up" and elapsed > self._deadline:
            raise RejectedMessageError(f"late: arrived after {elapsed:.3g} s, the deadline is {self._deadline:.3g} s")

    def _fit(
        self, message: Message | Bundle, direction: str, client: int, round: int
    ) -> tuple[Message | Bundle, Codec]:
        """Return the message and the most expensive chain that the link allows, and record the choice."""
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
            chosen = message.truncated(share) if share > 0 else None
            if chosen is None:
                what = " and ".join(part.kind for part in _parts(message))
                raise RejectedMessageError(
                    f"too large for the link: {what} take {size} bytes at least ({codec}), "
                    f"{left:.0f} of {budget:.0f} bytes are left in this round"
                )
            size = self._size(chosen, codec, direction, client, round)
        self._spent[direction, client] = self._spent.get((direction, client), 0) + size
        if chosen is not message or codec is not rungs[0]:
            self.ledger.note(round, client, direction, repr(codec), share)
        return chosen, codec

    def _size(self, message: Message | Bundle, codec: Codec, direction: str, client: int, round: int) -> int:
        tag = 0 if self._authentication is None else TAG
        return sum(len(self._encode(part, codec, direction, client, round).data) + tag for part in _parts(message))

    def _encode(self, message: Message, codec: Codec, direction: str, client: int, round: int) -> _Sent:
        """Return a message's bytes, and what is known of them.

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
        with self.clock.part("encode"):
            sent = _Sent(pack(message, codec, client=address, round=round, rng=rng, memory=memory))
        if shared:
            known[key] = sent
        return sent

    def _address(self, direction: str, client: int) -> int:
        return BROADCAST if direction == "down" and not self._codecs[direction].remembers else client

    def _memory(self, direction: str, client: int, kind: str) -> LinkState:
        key = (direction, client, kind)
        if key not in self._memories:
            self._memories[key] = LinkState(self._limit)
        return self._memories[key]


@dataclass
class _Sent:
    """A message's bytes, what they decode to and their digest; None until these are known."""

    data: bytes
    decoded: Message | None = None
    digest: bytes | None = None


def _parts(message: Message | Bundle) -> tuple[Message, ...]:
    return message.parts if isinstance(message, Bundle) else (message,)
