"""Message authentication: a tag that only the holder of a client's key can compute.

The tag is BLAKE2b keyed with the client's key (RFC 7693), cut to 16 bytes, over the direction, the client, the round,
the run and a digest of the message's bytes. So a message counts for one run, one round, one client and one direction:
played again in another round, sent in another client's name or sent back to where it came from, it is refused. The
digest is the same for all recipients of a message, which is hashed once however many they are.

A client and the server share its key, 32 random bytes. In a simulation keys are derived from the seed: that shows what
authentication costs and refuses, and keeps no secret. `docs/deployment.md` describes how to create and store real keys.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fdl.errors import RejectedMessageError, UserError

TAG = 16
"""Bytes that a tag adds to a message."""

KEY = 32
"""Bytes of a key."""

Key = Callable[[int], bytes]
"""Returns the key of a client, given its id."""

_CONTEXT = struct.Struct("<cII")
_DIRECTIONS = {"up": b"u", "down": b"d"}


class Authentication:
    """Computation and verification of the tags of a run.

    Args:
        key: gives the key of a client by its id.
        run: names the run; a message of another run is refused even if the keys are the same.
    """

    def __init__(self, key: Key, run: str = ""):
        self._key, self._run = key, hashlib.blake2b(run.encode(), digest_size=16).digest()

    def tag(self, digest: bytes, client: int, round: int, direction: str) -> bytes:
        """Return the tag of a message.

        Args:
            digest: of the message's bytes, from `digest`.
            client: id of the sending or receiving client, also for a broadcast.
            round: the round that it belongs to.
            direction: ``"up"`` to the server, ``"down"`` from it.
        """
        context = _CONTEXT.pack(_DIRECTIONS[direction], client, round) + self._run
        return hashlib.blake2b(context + digest, key=self._key(client), digest_size=TAG).digest()

    def verify(self, sealed: bytes, client: int, round: int, direction: str) -> memoryview:
        """Return the message in front of its tag, not copied; the other arguments are those that `tag` had.

        Raises:
            RefusedError: the tag is not the one that belongs there.
        """
        message, tag = memoryview(sealed)[:-TAG], bytes(memoryview(sealed)[-TAG:])
        if not hmac.compare_digest(tag, self.tag(digest(message), client, round, direction)):
            whose = f"client {client}" if direction == "up" else f"the server to client {client}"
            raise RejectedMessageError(
                f"not authentic: was not sent by {whose} in round {round}, or was changed on its way"
            )
        return message


def digest(message: Any) -> bytes:
    """Return the 32 bytes that stand for a message of any length (a buffer).

    Example:
        >>> len(digest(b"a message"))
        32
    """
    return hashlib.blake2b(message, digest_size=32).digest()


def simulated_keys(seed: int) -> Key:
    """Return keys derived from the recipe's seed, which therefore protect nothing; for simulations only.

    Example:
        >>> key = simulated_keys(seed=0)
        >>> key(1) == key(1), key(1) == key(2)
        (True, False)
    """
    known: dict[int, bytes] = {}

    def key(client: int) -> bytes:
        if client not in known:
            known[client] = hashlib.blake2b(f"{seed}/key/{client}".encode(), digest_size=KEY).digest()
        return known[client]

    return key


def read_keys(path: str | Path, clients: Iterable[int] = ()) -> Key:
    """Read a file of keys: a line for each client, its id and its key in hexadecimal digits; ``#`` begins a comment.

    Args:
        path: the file; only its owner may have access to it.
        clients: ids that must be in it.

    Raises:
        UserError: the file cannot be used. Keys are never part of the message.
    """
    path = Path(path)
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: keys cannot be read: {getattr(error, 'strerror', None) or error.reason}") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"{path}: others than its owner may read or write these keys; run chmod 600 {path}")
    keys: dict[int, bytes] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[0].isdecimal() or not _is_key(words[1]):
            raise UserError(f"{path}: line {number}: expected a client's id and {2 * KEY} hexadecimal digits")
        client, key = int(words[0]), bytes.fromhex(words[1])
        if client in keys or key in keys.values():
            what = f"client {client} has a key already" if client in keys else "this is another client's key"
            raise UserError(f"{path}: line {number}: {what}; every client needs one of its own")
        keys[client] = key
    missing = [str(client) for client in clients if client not in keys]
    if missing:
        raise UserError(f"{path}: no key for client {', '.join(missing)}")
    return keys.__getitem__


def write_keys(path: str | Path, clients: int) -> None:
    """Write new random keys for clients 0 … clients - 1 into a file that only its owner can read.

    Raises:
        UserError: the file exists, or cannot be written.
    """
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.writelines(f"{client} {secrets.token_hex(KEY)}\n" for client in range(clients))
    except OSError as error:
        raise UserError(f"{path}: keys cannot be written: {error.strerror}") from error


def _is_key(text: str) -> bool:
    return len(text) == 2 * KEY and all(c in "0123456789abcdefABCDEF" for c in text)
