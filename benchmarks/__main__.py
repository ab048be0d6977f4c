"""Lists the benchmarks: `python -m benchmarks`."""

import ast
import sys
from pathlib import Path


def main() -> int:
    for name, summary in sorted(commands().items()):
        print(f"python -m benchmarks.{name:12} {summary}")
    print("\n`python -m benchmarks.NAME --help` explains each; benchmarks/README.md has them all.")
    return 2 if sys.argv[1:] else 0  # a benchmark is a module: benchmarks.NAME, not an argument


def commands() -> dict[str, str]:
    """Module -> first line of its docstring, of each module that runs as a program."""
    found = {}
    for path in Path(__file__).parent.glob("[!_]*.py"):
        source = path.read_text(encoding="utf-8")
        summary = ast.get_docstring(ast.parse(source))
        if summary and 'if __name__ == "__main__"' in source:
            found[path.stem] = summary.splitlines()[0]
    return found


if __name__ == "__main__":
    sys.exit(main())
