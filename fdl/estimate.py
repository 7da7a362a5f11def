"""What a round will send, measured before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fdl.loop import FederatedLoop


def estimate_bytes(loop: FederatedLoop) -> dict[str, dict[int, int]]:
    """Make and encode the messages of a first round with untrained models.

    Sizes are exact where a codec's output does not depend on the values; an entropy stage usually does a little better
    once models are trained.

    Args:
        loop: freshly built; left as it was.

    Returns:
        ``{"down": {client: bytes}, "up": {client: bytes}}``.
    """
    before, server_state = loop.ledger.state_dict(), dict(loop.server.state)
    loop.begin(1)
    with loop.runtime.rehearsal():
        loop.method.setup(loop.server, loop.clients)
        for client in loop.clients:
            state = dict(client.state)
            for _, upload in loop.executor(loop.method, [(client, loop.send(client.id))]):
                loop.channel.upload(upload, client.id, 1)
            client.state = state
    sizes: dict[str, dict[int, int]] = {d: {client.id: 0 for client in loop.clients} for d in ("down", "up")}
    for row in loop.ledger.rows():
        if row.direction in sizes:
            sizes[row.direction][row.client] += row.bytes
    loop.ledger.load_state_dict(before)
    loop.server.state = server_state
    loop.begin(0)
    return sizes
