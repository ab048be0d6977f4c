"""What a compiled program says of itself: the bytes that its collectives move."""

from rwkv_jax.planning.collectives import collectives


def bytes_moved(program: str) -> dict[str, int]:
    """Bytes of the results of collectives on a device, by kind: of one in a loop, every time."""
    total: dict[str, int] = {}
    for exchange in collectives(program):
        total[exchange.kind] = total.get(exchange.kind, 0) + exchange.times * exchange.size
    return total
