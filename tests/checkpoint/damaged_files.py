"""Files damaged at random: a reader returns arrays or raises one line."""

import random

from rwkv_jax.checkpoint.errors import WeightsError


def check_any_damage(read, content, path, times):
    """Changes bytes and truncates the file `times` over; only WeightsError may be raised."""
    rng = random.Random(0)
    for _ in range(times):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.choice((None, rng.randrange(len(damaged))))])
        try:
            tensors = read(path)
        except WeightsError as error:
            assert str(error).isprintable()
        else:
            for array in tensors.values():
                array.copy()
