import math

import pytest

from rwkv_jax.sampling import compiler

CPUS = {
    "avx": ("flags : fpu sse2 avx avx2 fma", math.inf),
    "avx512": ("flags : fpu sse2 avx avx2 fma avx512f avx512vl", compiler.MANY),
    "arm": ("Features : fp asimd sve", compiler.MANY),
    "unknown": (None, compiler.MANY),
}


@pytest.mark.parametrize(("info", "rows"), CPUS.values(), ids=CPUS)
def test_ynnpack_is_used_where_it_is_faster(info, rows, tmp_path, monkeypatch):
    path = tmp_path / "cpuinfo"
    if info is not None:
        path.write_text(f"processor : 0\n{info}\n")
    monkeypatch.setattr(compiler, "CPU_INFO", path)
    compiler.many.cache_clear()
    assert compiler.many() == rows
    monkeypatch.undo()
    compiler.many.cache_clear()


def test_options_that_jaxlib_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(compiler, "NO_YNNPACK", {"no_such_option": "1"})
    compiler._options.cache_clear()
    assert compiler._options() == {}
    monkeypatch.undo()
    compiler._options.cache_clear()
