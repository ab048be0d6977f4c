"""Compiler options by CPU and jaxlib."""

import math

import pytest

from rwkv_jax.sampling import compiler

CPUS = {
    "avx": ("flags : fpu sse2 avx", compiler.MANY),
    "avx2": ("flags : fpu sse2 avx avx2 fma", math.inf),
    "avx512": ("flags : fpu sse2 avx avx2 fma avx512f avx512vl", compiler.MANY),
    "arm": ("Features : fp asimd sve", compiler.MANY),
    "unknown": (None, compiler.MANY),
}


@pytest.fixture(autouse=True)
def fresh():
    """Nothing is known from before, nor afterwards."""
    memories = (compiler.ynnpack_rows, compiler._options)
    for memory in memories:
        memory.cache_clear()
    yield
    for memory in memories:
        memory.cache_clear()


@pytest.mark.parametrize(("info", "rows"), CPUS.values(), ids=CPUS)
def test_ynnpack_is_used_where_it_is_faster(info, rows, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if info is not None:
        path.write_bytes(b"model name : caf\xe9\n" + info.encode() + b"\n")
    monkeypatch.setattr(compiler, "CPU_INFO", path)
    assert compiler.ynnpack_rows() == rows


def test_options_that_jaxlib_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(compiler, "NO_YNNPACK", {"no_such_option": "1"})
    assert compiler._options() == {}
