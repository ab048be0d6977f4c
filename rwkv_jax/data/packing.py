"""Documents packed whole into contexts, so that none is cut that fits one.

Best fit, the longest first: a piece goes where it leaves least room (Ding et al. 2024,
arXiv:2404.10830). A document longer than a context is cut into full ones and a rest. What stays
empty is padding; with documents of all lengths that is less than a percent.
"""

from typing import NamedTuple

import numpy as np


class Packs(NamedTuple):
    """Which pieces of documents share a context."""

    first: np.ndarray
    """int64 [packs + 1]: where each pack's pieces begin in the other two, and their end."""
    start: np.ndarray
    """int64 [pieces]: which token of the stream is a piece's first target."""
    length: np.ndarray
    """int32 [pieces]: how many targets it has."""


def pack(starts: np.ndarray, context: int) -> Packs:
    """The packs of documents that begin at these tokens, the last of which is the stream's end.

    A document's tokens, its end included, are its targets: `context` of them fit a pack. Memory
    and time are those of the pieces, about a microsecond each.
    """
    start, length = _pieces(starts, context)
    # Equal lengths in the order of the stream: the result depends on nothing else.
    order = np.argsort(-length, kind="stable")
    start, length = start[order], length[order]
    pack_of = _best_fit(length, context)
    by_pack = np.argsort(pack_of, kind="stable")
    count = int(pack_of.max(initial=-1)) + 1
    first = np.searchsorted(pack_of[by_pack], np.arange(count + 1))
    return Packs(first.astype(np.int64), start[by_pack], length[by_pack])


def _pieces(starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    starts = np.asarray(starts, np.int64)
    sizes = np.diff(starts)
    counts = -(-sizes // context)
    piece = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    start = np.repeat(starts[:-1], counts) + piece * context
    length = np.minimum(np.repeat(starts[1:], counts) - start, context)
    return start, length.astype(np.int32)


def _best_fit(length: np.ndarray, context: int) -> np.ndarray:
    """Each piece's pack, for pieces from the longest on."""
    packs = np.empty(len(length), np.int64)
    full = int(np.searchsorted(-length, -context, side="right"))
    packs[:full] = np.arange(full)
    count = full
    open_packs: list[list[int]] = [[] for _ in range(context + 1)]  # by the room left in them
    rooms = 0  # bit r: some pack has room r
    for i, size in enumerate(length[full:].tolist(), full):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            mine = open_packs[room].pop()
            if not open_packs[room]:
                rooms ^= 1 << room
        else:
            room, mine = context, count
            count += 1
        packs[i] = mine
        if left := room - size:
            open_packs[left].append(mine)
            rooms |= 1 << left
    return packs
