"""From text to batches: corpora, tokenizers, token files and the loader. Does not use JAX."""
