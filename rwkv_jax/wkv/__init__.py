"""The WKV recurrences: what makes RWKV an RNN, in forms that train like attention.

Every operator takes a state and returns one; a state made by one implementation may be handed to
another.

**Version 4** (`wkv4`). Per channel, decay log w <= 0 and bonus u:

    y_t = (N_t + e^{u+k_t} v_t) / (D_t + e^{u+k_t})
    N_{t+1} = w N_t + e^{k_t} v_t        D_{t+1} = w D_t + e^{k_t}

kept as (num, den, max_exp): N = num e^max_exp, D = den e^max_exp, so that no key overflows.

**Versions 5 and 6** (`wkv6`). Per head, with S of shape [v, k] (rows: value index, columns: key
index), a decay per key channel and the bonus u of the current token:

    y_t = S_{t-1} r_t + (r_t . (u k_t)) v_t        S_t = S_{t-1} diag(w_t) + v_t k_t^T

Version 5's decay is the same for every token.

**Version 7** (`wkv7`). Per head, with S as above:

    S_t = S_{t-1} diag(w_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T        y_t = S_t r_t

Their state layout is [b, h, v, k], float32.

**Implementations**, equal in value and in every gradient:

    scan         the definition, one token after another (`step` is one token)
    chunked      matrix products inside chunks, states handed from chunk to chunk; the training form
    associative  the same chunk summaries combined by `lax.associative_scan`: log depth
    pallas_gpu   the chunked form as one kernel, for NVIDIA GPUs from Ampere on
    pallas_tpu   the same for TPUs

`implementation=None` is the fastest for the program's device, the length and the head size
(`default.py`). A name is that one, or an error that says why not; on a CPU the kernels are
interpreted, to test them.

**Every operator** takes

    state      what the tokens before left; None starts a document
    reset      [b, t]: where documents start; the state that token t meets is then a fresh one
    lengths    [b]: how many tokens of each row are real. The others, on the right, leave the state
               as it is after the last real one; their y has no meaning
    mesh_axis  the name of a mesh axis over which time is sharded, its one trace in the call: under
               `jax.set_mesh` the operator splits its inputs itself, inside a `jax.shard_map` over
               that axis it is given each device's part. States are whole, on every device. Rows
               and heads that a mesh shards need no word

and returns the state after the last token. No document's output depends on another's by a bit:
`leak_test` shows it for any function of documents.

Sources: arXiv:2305.13048 (version 4), arXiv:2404.05892 (versions 5 and 6), arXiv:2503.14456
(version 7), RWKV-LM `cuda/`.
"""

from rwkv_jax.wkv.dispatch import IMPLEMENTATIONS, KERNELS, wkv4, wkv6, wkv7
from rwkv_jax.wkv.leaks import leak_test
from rwkv_jax.wkv.v4.recurrence import Wkv4State
from rwkv_jax.wkv.v4.recurrence import step as wkv4_step
from rwkv_jax.wkv.v6.recurrence import step as wkv6_step
from rwkv_jax.wkv.v7.recurrence import step as wkv7_step

__all__ = [
    "IMPLEMENTATIONS",
    "KERNELS",
    "Wkv4State",
    "leak_test",
    "wkv4",
    "wkv4_step",
    "wkv6",
    "wkv6_step",
    "wkv7",
    "wkv7_step",
]
