"""Text in, token arrays out: corpora, tokenizers, the token cache and the loader. Knows no jax."""
