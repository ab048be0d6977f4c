"""Documents packed whole into contexts, so that only documents longer than a context are cut.

Best fit, longest first: a piece goes where it leaves the least room (Ding et al. 2024,
arXiv:2404.10830). A document longer than a context is cut into full contexts and a rest. The room
left over is padding: less than a percent with documents of mixed lengths.
"""

from typing import NamedTuple

import numpy as np


class Packs(NamedTuple):
    """The pieces of documents that share a context.

    first   int64 [packs + 1]: the index of each pack's first piece in the other two arrays and,
            last, their length
    start   int64 [pieces]: the token of the stream that is the piece's first target
    length  int32 [pieces]: the number of its targets
    """

    first: np.ndarray
    start: np.ndarray
    length: np.ndarray


def pack(starts: np.ndarray, context: int) -> Packs:
    """The packs of documents that start at these tokens, the last of which is the stream's end.

    A document's tokens, including its end, are its targets; a pack holds `context` of them. Memory
    and time are proportional to the number of pieces, about a microsecond each.
    """
    start, length = _pieces(starts, context)
    # Equal lengths stay in the order of the stream, so the result is unique.
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
    """The pack of each piece; pieces are sorted, the longest first."""
    packs = np.empty(len(length), np.int64)
    full = int(np.searchsorted(-length, -context, side="right"))
    packs[:full] = np.arange(full)
    count = full
    open_packs: list[list[int]] = [[] for _ in range(context + 1)]  # by the room left in them
    rooms = 0  # bit r is set if some pack has room r
    for i, size in enumerate(length[full:].tolist(), full):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = open_packs[room].pop()
            if not open_packs[room]:
                rooms ^= 1 << room
        else:
            room, chosen = context, count
            count += 1
        packs[i] = chosen
        if left := room - size:
            open_packs[left].append(chosen)
            rooms |= 1 << left
    return packs
