"""The package as docs/architecture.md has it: which rooms there are, and that imports point down its table alone."""

import ast
import functools
import re
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import llava_mod_hf

PACKAGE = Path(llava_mod_hf.__file__).parent
ARCHITECTURE = Path(__file__).parents[1] / "docs" / "architecture.md"
SHIPPED = {"configuration_llava_mod", "modeling_llava_mod", "moe_llava_mod"}
ROOT = "root"  # the table's word for the files beside the rooms
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def floors():
    """`{room: floor}` of the page's table, whose rows are `| floor | room | … |`."""
    rows = re.findall(r"^\| (\d+) \| `?(\w+)/?`? \|", ARCHITECTURE.read_text(), flags=re.M)
    return {room: int(floor) for floor, room in rows}


def room_of(path):
    return path.parts[0] if len(path.parts) > 1 else ROOT


@functools.cache
def imports(path):
    """`(level, module)` of every import of a file, inside functions too; `from . import x` counts as `.x`."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and is_folder(node.module or ""):
            found |= {(node.level, f"{node.module or ''}.{alias.name}".lstrip(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.level, node.module))
    return found


def is_folder(module):
    """Whether `from module import x` may name a file: in the package itself, and in a room."""
    parts = module.split(".")
    return not module or (parts[0] == "llava_mod_hf" and (PACKAGE.joinpath(*parts[1:])).is_dir())


def package_imports(path):
    """The package's own files that a file imports; what a room's `__init__` hands on counts as the room's."""
    found = set()
    for level, name in imports(path):
        if level:
            found.add(path.parent / f"{name}.py")
        elif name.startswith("llava_mod_hf."):
            parts = name.split(".")[1:]
            file = Path(*parts).with_suffix(".py")
            found.add(file if (PACKAGE / file).is_file() else Path(*parts[:-1]) / "__init__.py")
    assert all((PACKAGE / file).is_file() for file in found), found
    return found


def test_every_room_is_in_the_table_and_says_what_it_is():
    rooms = {room_of(path) for path in FILES}
    assert rooms == set(floors())
    for room in rooms - {ROOT}:
        assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    floor = floors()
    rooms = {room_of(other) for other in package_imports(path)} - {room_of(path)}
    assert {room for room in rooms if floor[room] >= floor[room_of(path)]} == set()


def circle(graph):
    """Files that import each other in a circle, or `None`."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_imports_have_no_circle():
    assert circle({path: package_imports(path) for path in FILES}) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) is not None


@pytest.mark.parametrize("module", sorted(SHIPPED))
def test_shipped_files_import_torch_transformers_safetensors_and_each_other(module):
    path = Path("model", f"{module}.py")
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            # saving copies relative imports by file name: flat siblings, never `from . import x`
            assert (node.level, node.module in SHIPPED) == (1, True)
    others = {name.split(".")[0] for level, name in imports(path) if not level}
    assert others - set(sys.stdlib_module_names) <= {"torch", "transformers", "safetensors"}


def test_the_maths_imports_torch_alone():
    files = [path for path in FILES if room_of(path) == "losses"]
    names = {name.split(".")[0] for path in files for level, name in imports(path) if not level}
    assert names - set(sys.stdlib_module_names) == {"torch", "llava_mod_hf"}
    assert {room_of(other) for path in files for other in package_imports(path)} == {"losses"}
