"""Files and functions stay short enough to be read at once; what is longer says why beside it."""

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE, FUNCTION, PARAMETERS = 400, 80, 8
FILES = sorted(
    path.relative_to(ROOT) for room in ("src", "tests", "benchmarks", "recipes") for path in (ROOT / room).rglob("*.py")
)


def functions(source):
    """`(name, what is over a limit, the comment above)` of every function that is too long or too wide."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = node.args
        count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        length = node.end_lineno - node.lineno + 1
        for kind, over in (("lines", length > FUNCTION), ("parameters", count > PARAMETERS)):
            if over:
                above = itertools.takewhile(lambda line: line.lstrip().startswith("#"), reversed(lines[: first - 1]))
                yield node.name, kind, [line.strip() for line in above]


def too_large(source):
    """What is over a limit and does not say why: in a comment `# <limit>: why` right above a function or at the top."""
    found = [
        f"{name} ({kind})"
        for name, kind, above in functions(source)
        if not any(line.startswith(f"# {kind}: ") for line in above)
    ]
    if len(source.splitlines()) > FILE and not source.startswith("# lines: "):
        found.append("file (lines)")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_what_is_over_a_limit_says_why(path):
    assert too_large((ROOT / path).read_text(encoding="utf-8")) == []


def test_the_limits_are_seen():
    wide = f"def f({', '.join(f'a{i}' for i in range(PARAMETERS + 1))}): pass\n"
    long = "def f():\n" + "    x = 0\n" * FUNCTION
    for source, kind in ((wide, "parameters"), (long, "lines")):
        assert too_large(source) == [f"f ({kind})"]
        assert too_large(f"x = 0\n# {kind}: as torch calls it\n{source}") == []
        assert too_large(f"# why\n{source}") == [f"f ({kind})"]
    assert too_large("x = 0\n" * (FILE + 1)) == ["file (lines)"]
    assert too_large("# lines: a table\n" + "x = 0\n" * FILE) == []
