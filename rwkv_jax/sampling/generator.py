"""A model and its tokenizer, prepared for decoding."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.models import Model
from rwkv_jax.sampling import decode as device
from rwkv_jax.sampling.decode import DecodeState, Prefix
from rwkv_jax.sampling.settings import check_seed
from rwkv_jax.sampling.transforms import Settings, Vocabulary
from rwkv_jax.typing import Array

UNCOUNTED = " \t0123456789"
"""Tokens whose text is a substring of this add nothing to the frequency penalty."""

NO_LOGITS = "the state to start from has no logits of the next token: give a prompt"


class Generator:
    """A model and its tokenizer, prepared for decoding: make one, use it for many texts.

    Raises `UserError` if the tokenizer has more tokens than the model.
    """

    def __init__(self, params: Model[Array], cfg: ModelConfig, tokenizer: Tokenizer):
        if tokenizer.vocab_size > cfg.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {cfg.vocab_size}: "
                "they do not belong together; use the tokenizer that the model was trained with"
            )
        self.params = device.decoding_layout(params, cfg)
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary_of(tokenizer, cfg.vocab_size)

    def check_tokenizer(self, identity: str | None) -> None:
        """Raises `UserError` if a state was written with another tokenizer. None: not recorded."""
        if identity not in (None, ours := self.tokenizer.identity()):
            raise UserError(
                f"written with the tokenizer {identity}, but this is {ours}; use the model that"
                " it was written with"
            )

    def prefill(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], prefix: Prefix | None = None
    ) -> DecodeState[Array]:
        """`decode.prefill`. Raises `UserError` for a seed out of range, and for an empty prompt
        after a prefix without logits."""
        for seed in seeds:
            check_seed(seed)
        if prefix is not None and prefix.logits is None and not all(prompts):
            raise UserError(NO_LOGITS)
        eod = self.tokenizer.eod
        return device.prefill(self.params, prompts, seeds, cfg=self.cfg, end=eod, prefix=prefix)

    def extend(self, decoding: DecodeState[Array], tokens: Sequence[int]) -> DecodeState[Array]:
        """`decode.extend`."""
        return device.extend(self.params, decoding, tokens, cfg=self.cfg)

    def restart(
        self, decoding: DecodeState[Array], prefix: Prefix | None = None
    ) -> DecodeState[Array]:
        """`decode.restart`."""
        return device.restart(self.params, decoding, cfg=self.cfg, prefix=prefix)

    def decode(
        self, decoding: DecodeState[Array], settings: Settings[Array], steps: int
    ) -> tuple[np.ndarray, DecodeState[Array]]:
        """`decode.decode`, the tokens as int32 [b, steps] on the host."""
        # JAX would compile again if some of the arrays were committed to a device, others not.
        decoding = jax.device_put(decoding, decoding.logits.sharding)
        eod = self.tokenizer.eod
        tokens, decoding = device.decode(
            self.params, decoding, settings, self.vocabulary, steps, cfg=self.cfg, end=eod
        )
        return np.asarray(tokens)[:, :steps], decoding


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary[Array]:
    """The `Vocabulary` of a model with `vocab_size` rows."""
    increment = np.ones(vocab_size, np.float32)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.decode_bytes([token])
        if len(text) <= len(UNCOUNTED) and text in UNCOUNTED.encode():
            increment[token] = 0
    allowed = np.arange(vocab_size) < tokenizer.vocab_size
    return Vocabulary(allowed=jnp.asarray(allowed), increment=jnp.asarray(increment))
