"""Names of clients whose samples come from natural groups, such as hospitals."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

log = logging.getLogger("fdl")

_MAX_CLIENTS = 12
"""Maximum number of clients that a message names."""

_MAX_GROUPS = 4
"""Maximum number of groups in the name of a client."""


def group_names(parts: Sequence[np.ndarray], groups: np.ndarray) -> list[str]:
    """Name each client after the groups that its samples come from.

    Args:
        parts: indices of each client's samples.
        groups: natural client or domain of each sample, [n] of any type.

    Returns:
        One name per client: ``"a"``, ``"a + b"`` for several groups, ``"a (2/3)"`` for the second of three clients with
        samples of a.

    Example:
        >>> import numpy as np
        >>> groups = np.array(["paris", "paris", "rome", "oslo"])
        >>> group_names([np.array([0]), np.array([1]), np.array([2, 3])], groups)
        ['paris (1/2)', 'paris (2/2)', 'oslo + rome']
    """
    held = [np.unique(groups[part]).tolist() for part in parts]
    owners = Counter(group for own in held for group in own)
    seen: Counter = Counter()
    names = []
    for own in held:
        seen.update(own)
        words = [f"{g} ({seen[g]}/{owners[g]})" if owners[g] > 1 else str(g) for g in own[:_MAX_GROUPS]]
        names.append(" + ".join(words) + (f" + {len(own) - _MAX_GROUPS} more" if len(own) > _MAX_GROUPS else ""))
    return names


def log_groups(partitioner: str, parts: Sequence[np.ndarray], groups: np.ndarray) -> None:
    """Log the groups of each client as a warning, for groups that were merged or divided.

    Args:
        partitioner: name of the partitioner, for the message.
        parts: indices of each client's samples.
        groups: natural client or domain of each sample, [n].
    """
    count, clients = len(np.unique(groups)), len(parts)
    done = "put together" if count > clients else "divided"
    names = [f"client {i}: {name}" for i, name in enumerate(group_names(parts, groups))]
    named = "; ".join(names[:_MAX_CLIENTS]) + (f"; and {clients - _MAX_CLIENTS} more" if clients > _MAX_CLIENTS else "")
    log.warning("%s: %d groups are %s to make %d clients: %s", partitioner, count, done, clients, named)
