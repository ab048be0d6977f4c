"""Worker: a package that encodes text by the World vocabulary, timed on text that is in memory."""

import json
import time
from pathlib import Path

from benchmarks.worker import serve, versions


def start(options: dict):
    encode = ENCODERS[options["package"]](options["one_by_one"])
    texts, held = [], 0
    with Path(options["text"]).open(encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            held += len(texts[-1].encode())
            if held >= options["bytes"]:
                break

    def handle(_: dict) -> dict:
        begun, busy, tokens = time.perf_counter(), time.process_time(), 0
        for batch in batches(texts):
            tokens += sum(map(len, encode(batch)))
        seconds, busy = time.perf_counter() - begun, time.process_time() - busy
        return {"seconds": seconds, "core_seconds": busy, "bytes": held, "tokens": tokens}

    encode(["Words to begin with."])
    return handle, {"versions": versions(options["package"])}


def batches(texts: list[str]):
    """Batches of about 4 MB, so that nobody has to hold the ids of all texts at once."""
    group, size = [], 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= 4_000_000:
            yield group
            group, size = [], 0
    yield group


def pyrwkv(one_by_one: bool):
    import pyrwkv_tokenizer

    tokenizer = pyrwkv_tokenizer.RWKVTokenizer()
    return one_at_a_time(tokenizer.encode) if one_by_one else tokenizer.encode_batch


def rwkv_tokenizer(one_by_one: bool):
    import rwkv_tokenizer

    folder = Path(rwkv_tokenizer.__file__).parent
    tokenizer = rwkv_tokenizer.WorldTokenizer(str(folder / "rwkv_vocab_v20230424.txt"))
    return one_at_a_time(tokenizer.encode)  # it has no other way


def rwkv(one_by_one: bool):
    import importlib.util

    # By its path: the package itself imports torch.
    if not (package := importlib.util.find_spec("rwkv")):
        raise ImportError("rwkv", name="rwkv")
    folder = Path(package.origin).parent
    found = importlib.util.spec_from_file_location("trie", folder / "rwkv_tokenizer.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    tokenizer = module.TRIE_TOKENIZER(str(folder / "rwkv_vocab_v20230424.txt"))
    return one_at_a_time(tokenizer.encode)


def one_at_a_time(encode):
    return lambda texts: [encode(text) for text in texts]


ENCODERS = {"pyrwkv-tokenizer": pyrwkv, "rwkv-tokenizer": rwkv_tokenizer, "rwkv": rwkv}

if __name__ == "__main__":
    serve(start)
