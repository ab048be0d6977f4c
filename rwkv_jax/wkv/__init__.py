"""The WKV recurrences: what makes RWKV an RNN, in forms that train like attention.

**Version 4** (`wkv4`). Per channel, with log decay log w <= 0 and bonus u:

    y_t = (N_t + e^{u+k_t} v_t) / (D_t + e^{u+k_t})
    N_{t+1} = w N_t + e^{k_t} v_t        D_{t+1} = w D_t + e^{k_t}

The state is (num, den, max_exp), with N = num e^max_exp and D = den e^max_exp, so that no key
overflows.

**Versions 5 and 6** (`wkv6`). Per head, with a state S of shape [v, k] (rows: value index, columns:
key index), a decay w per key channel, and the bonus u of the current token:

    y_t = S_{t-1} r_t + (r_t . (u k_t)) v_t        S_t = S_{t-1} diag(w_t) + v_t k_t^T

Version 5's decay is the same for every token.

**Version 7** (`wkv7`). Per head, with S as above:

    S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t

The states of versions 5 to 7 are [b, h, v, k], float32.

**Implementations** are equal in value and in every gradient. Each takes the state that any other
returns:

    scan         the definition, one token after another (`wkv7_step` is one token)
    chunked      matrix products inside chunks, the state carried from chunk to chunk; for training
    associative  the chunks' summaries combined by `lax.associative_scan`: log depth
    pallas_gpu   the chunked form as one kernel, for NVIDIA GPUs from Ampere on
    pallas_tpu   the same for TPUs
    mosaic_gpu   version 7 in bfloat16 for Hopper GPUs; by name only, until one has run it

`implementation=None` picks the fastest for the program's device, the length and the head size
(`default.py`). A name runs that implementation or raises an error that says why it cannot. On a CPU
the kernels are interpreted, for tests.

**Every operator** returns `y`, in the dtype of `v`, and the state after the last token, float32. It
computes in float32, and if any input is float64, all is float64. It takes

    state      the state before the first token; None for a fresh one
    reset      [b, t], bool: where documents start. Token t with reset[b, t] sees a fresh state;
               documents are isolated bit-exactly (`rwkv_jax.testing.leak_test`)
    initial    [h, v, k] (versions 5 to 7): the state that fresh ones are, learnt by state tuning;
               None for zeros
    lengths    [b], int: the number of valid tokens of each row. The tokens after them are padding:
               they leave the state as it is, and their y is undefined
    mesh_axis  the mesh axis that shards time. Under `jax.set_mesh` the operator maps itself over
               it; inside a `jax.shard_map` over it, pass each device's shard. States are
               replicated over it. Batch and head sharding are inferred from the inputs

Sources: arXiv:2305.13048 (version 4), arXiv:2404.05892 (versions 5 and 6), arXiv:2503.14456
(version 7), RWKV-LM `cuda/`.
"""

from rwkv_jax.renamed import renamed
from rwkv_jax.wkv.operator import IMPLEMENTATIONS, KERNELS, wkv4, wkv6, wkv7
from rwkv_jax.wkv.v4.recurrence import Wkv4State
from rwkv_jax.wkv.v4.recurrence import step as wkv4_step
from rwkv_jax.wkv.v6.recurrence import step as wkv6_step
from rwkv_jax.wkv.v7.recurrence import step as wkv7_step

__all__ = [
    "IMPLEMENTATIONS",
    "KERNELS",
    "Wkv4State",
    "wkv4",
    "wkv4_step",
    "wkv6",
    "wkv6_step",
    "wkv7",
    "wkv7_step",
]

__getattr__ = renamed(
    "rwkv_jax.wkv", {"leak_test": "rwkv_jax.testing.leak_test", "cases": "rwkv_jax.testing"}
)
