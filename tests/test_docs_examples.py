"""Examples in README.md, docs/ and docstrings run as written; tables in docs/ match the data."""

import ast
import doctest
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rwkv_jax.__main__ import main
from rwkv_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def python_blocks(markdown: str) -> list[tuple[int, str]]:
    """The ```python blocks with the line each starts on."""
    blocks = re.finditer(r"^```python\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    return [(markdown[: block.start(1)].count("\n"), block[1]) for block in blocks]


def docstrings_with_examples() -> list[tuple[str, str, int, str]]:
    """Module, name, line and text of each docstring that holds an example.

    They are read from the source, since doctest's own finder passes over functions that are
    wrapped, by `jax.jit` or by the import hook of conftest.py.
    """
    found = []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted((ROOT / "rwkv_jax").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)) if ">>>" in source else ():
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and ">>>" in text:
                found.append((module, getattr(node, "name", ""), node.body[0].lineno, text))
    return found


SLOW = pytest.mark.slow
BLOCKS = {page: python_blocks(page.read_text(encoding="utf-8")) for page in PAGES}
DOCSTRINGS = docstrings_with_examples()


def test_there_are_examples():
    assert any(BLOCKS.values()), "no page shows a python block"
    assert DOCSTRINGS, "no docstring of the package holds an example"


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=() if page.name == "README.md" else SLOW)
        for page in PAGES
        if BLOCKS[page]
    ],
)
def test_blocks_run(page, tmp_path, monkeypatch):
    """One after another, as a reader would."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, code in BLOCKS[page]:
        padded = "\n" * line + code  # so that a traceback names the page's own lines
        exec(compile(padded, str(page), "exec"), names)


SMALL = [
    *("model.layers=1", "model.width=64", "train.steps=2", "train.batch=2", "train.context=16"),
    *("data.heldout=0.2", "data.cache=cache", "sample.tokens=0", "train.log_every=1"),
    "mesh.fsdp=1",  # of the eight devices of a test
]
"""What makes a run of a page's command one of seconds."""


@pytest.mark.slow
def test_commands_of_the_data_page_run(tmp_path, monkeypatch):
    """In order, in a folder with such files as they name; runs are small ones."""
    monkeypatch.chdir(tmp_path)
    _write_examples()
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert len(commands) > 5
    for number, (python, dash_m, package, *rest) in enumerate(commands):
        assert (python, dash_m, package) == ("python", "-m", "rwkv_jax")
        small = [*SMALL, f"train.output=run{number}"] if rest[0] == "train" else []
        assert main([*rest, *small]) == 0, rest
        if small:
            lines = read_metrics(Path(f"run{number}") / "metrics.jsonl")
            assert [line["step"] for line in lines if "loss" in line] == [1, 2]


def _write_examples() -> None:
    texts = [f"Once upon a time there were {i} friends. " * 4 for i in range(60)]
    turns = [
        [{"role": "user", "content": f"And {i}?"}, {"role": "assistant", "content": text}]
        for i, text in enumerate(texts)
    ]
    notes = Path("notes")
    notes.mkdir()
    for i, text in enumerate(texts):
        (notes / f"{i}.txt").write_text(text)
    Path("stories.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
    Path("chat.jsonl").write_text("".join(json.dumps({"messages": x}) + "\n" for x in turns))
    Path("tokens").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), "stories.parquet")


def test_tables_match_the_results():
    command = [sys.executable, "-m", "benchmarks.tables", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "name", "line", "text"),
    DOCSTRINGS,
    ids=[f"{module}.{name}".rstrip(".") for module, name, *_ in DOCSTRINGS],
)
def test_docstring_example_runs(module, name, line, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = dict(vars(importlib.import_module(module)))
    example = doctest.DocTestParser().get_doctest(text, names, name or module, module, line)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(example, out=report.append)
    assert not report, "".join(report)
