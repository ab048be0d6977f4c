"""The model for EleutherAI's harness, PyPI `lm-eval`: `pip install 'rwkv_jax[lm-eval]'`.

In Python, with a path or with what `load_with_tokenizer` returns:

    from rwkv_jax.evaluation.lm_eval import RWKV
    lm_eval.simple_evaluate(model=RWKV("RWKV-x070-World-0.1B-v2.8.pth"), tasks=["lambada_openai"])

In a terminal, lm-eval's own command line, which then knows the model `rwkv_jax`:

    python -m rwkv_jax.evaluation.lm_eval run --model rwkv_jax \\
        --model_args pretrained=RWKV-x070-World-0.1B-v2.8.pth --tasks lambada_openai --batch_size 16

Every context begins a document: the end-of-document token comes first, in a fresh state. Contexts
are never truncated, as a state has no maximal length. A context that several requests share is read
once.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rwkv_jax.checkpoint.weights import load_with_tokenizer
from rwkv_jax.compiled import keep_compiled_programs
from rwkv_jax.config import DataConfig, ModelConfig
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.errors import UserError
from rwkv_jax.evaluation.bits import Settings, finite, token_costs
from rwkv_jax.evaluation.continuations import encode, groups, score
from rwkv_jax.models import Model
from rwkv_jax.sampling import Generator, Prefix, Sampling, generate_with
from rwkv_jax.sampling.decode import decoding_dtype, decoding_layout
from rwkv_jax.typing import Array

try:
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from tqdm import tqdm
except ImportError as error:
    missing = f"lm-eval cannot be imported ({error}); pip install 'rwkv_jax[lm-eval]'"
    if __name__ == "__main__":
        sys.exit(missing)
    raise ImportError(missing) from error

BATCH = 16
TOKENS = 256
"""Generated at most where a task does not say how many: lm-eval's own default."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""The names that tasks use for it."""


@register_model("rwkv_jax")
class RWKV(LM):
    """A model with lm-eval's interface.

    `pretrained` is a path, or the parameters, config and tokenizer themselves. `dtype` is the
    compute type (float32 on CPU, bfloat16 elsewhere), `batch_size` the number of requests that are
    read side by side; `auto` is 16, or `max_batch_size`. JAX chooses the device: `device` is
    ignored, and accepted because lm-eval's command line always passes one. Raises `UserError` for
    weights that cannot be read.
    """

    def __init__(
        self,
        pretrained: str | Path | tuple[Model[Array], ModelConfig, Tokenizer],
        tokenizer: str = "",
        dtype: str | None = None,
        batch_size: int | str = BATCH,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if isinstance(pretrained, str | Path):
            pretrained = load_with_tokenizer(pretrained, tokenizer)
        params, cfg, self.tokenizer = pretrained
        automatic = str(batch_size).startswith("auto")
        rows = (max_batch_size or BATCH) if automatic else int(batch_size)
        if rows < 1:
            raise UserError(f"batch_size {rows}: 1 or more, or auto")
        self.settings = Settings(cfg, rows, dtype=jnp.dtype(dtype or decoding_dtype()))
        self.params = decoding_layout(params, cfg, self.settings.dtype)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether all of its tokens are the most likely ones."""
        shared: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            shared.setdefault(request.args[0], []).append(index)
        prompts = [
            encode(self.tokenizer, context, [requests[index].args[1] for index in which])
            for context, which in shared.items()
        ]
        with _progress("continuations") as report:
            scores = score(self.params, prompts, self.settings, report=report)
        found = {
            index: (one.log_p, one.greedy)
            for which, some in zip(shared.values(), scores, strict=True)
            for index, one in zip(which, some, strict=True)
        }
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """log p of each text, without its end-of-document token."""
        texts = [np.asarray(self.tokenizer.encode(request.args[0]), int) for request in requests]
        some = [index for index, text in enumerate(texts) if len(text)]
        nats = np.zeros(len(texts))
        documents, eod = [texts[index] for index in some], self.tokenizer.eod
        with _progress("tokens") as report:
            for cost in token_costs(self.params, documents, self.settings, eod=eod, report=report):
                np.add.at(nats, np.array(some)[cost.document], cost.nats.astype(float))
        return (-finite(nats)).tolist()

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The text that the model generates after each context, up to one of the stop strings."""
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        with _progress("texts") as report:
            done = 0
            for settings, indices in alike.items():
                for which in groups(indices, self.settings.rows):
                    contexts = [requests[index].args[0] for index in which]
                    chunks = self._write(contexts, json.loads(settings), which[0])
                    for chunk in chunks:
                        texts[which[chunk.index]] += chunk.text
                    done += len(which)
                    report(done, len(requests))
        return texts

    def _write(self, contexts: list[str], settings: dict[str, Any], seed: int) -> Any:
        generator, prefix = self._generator
        stop = settings.pop("until", None) or []
        lengths = [settings.pop(name) for name in LENGTHS if name in settings]
        return generate_with(
            generator,
            contexts,
            max_tokens=int(lengths[0]) if lengths else TOKENS,
            sampling=_sampling(settings),
            seed=seed,
            stop=[stop] if isinstance(stop, str) else stop,
            prefix=prefix,
        )

    @cached_property
    def _generator(self) -> tuple[Generator, Prefix]:
        """For generating text, and the beginning of a document."""
        generator = Generator(self.params, self.settings.cfg, self.tokenizer)
        document = generator.prefill([[]], [0])
        return generator, Prefix(document.state, self.settings.cfg, document.logits)


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Greedy unless a task asks otherwise. Raises `UserError` for an unknown setting."""
    draws = settings.pop("do_sample", None)
    temperature = float(settings.pop("temperature", 1.0 if draws else 0.0))
    top_p, top_k = float(settings.pop("top_p", 1.0)), int(settings.pop("top_k", 0))
    if settings:
        raise UserError(
            f"generation setting {next(iter(settings))}: unknown; known settings: until,"
            f" {', '.join(LENGTHS)}, do_sample, temperature, top_p and top_k"
        )
    return Sampling(0.0 if draws is False else temperature, top_p, top_k, 0.0, 0.0)


@contextlib.contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    with tqdm(unit=f" {unit}") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


if __name__ == "__main__":
    keep_compiled_programs(DataConfig().cache_root)
    try:
        cli_evaluate()
    except UserError as user_error:
        sys.exit(str(user_error))
