"""
`llava-mod COMMAND [--config RECIPE.yaml] [--key value ...]`.

Beside the package, not in it: importing the package registers its classes with transformers, and `--help` need not wait
for that. A command is a file of `llava_mod_hf/commands/` whose docstring begins with "`llava-mod NAME`: summary"; its
`OPTIONS` names the dataclasses that its `run` takes. Both are read without importing the file. One without any reads
its arguments itself, and its `run` returns the exit code.
"""

import ast
import importlib
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "llava_mod_hf" / "commands"


class Command(NamedTuple):
    """
    What the file of a command says of itself.

    Args:
        name, summary (`str`): of its docstring's first line.
        module (`str`): the file, as it is imported.
        options (`tuple[str]`): dataclasses, `module:name` of the package each.
        positional (`str` or `None`): option that a first argument without a name is.
    """

    name: str
    summary: str
    module: str
    options: tuple[str, ...]
    positional: str | None = None

    def groups(self):
        """`list` of the dataclasses that its options are fields of."""
        pairs = [option.split(":") for option in self.options]
        return [getattr(importlib.import_module(f"llava_mod_hf.{module}"), name) for module, name in pairs]


def read_command(path):
    """[`Command`] of a file, or `None` if its docstring is not that of a command."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = re.match(r"`llava-mod ([\w-]+)`: (.*?)\.?(\n|$)", ast.get_docstring(tree) or "")
    if found is None:
        return None
    said = {
        target.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in ("OPTIONS", "POSITIONAL")
    }
    module = f"llava_mod_hf.commands.{path.stem}"
    return Command(found[1], found[2], module, said["OPTIONS"], said.get("POSITIONAL"))


def commands():
    """`{name: Command}` of all files of the folder."""
    found = (read_command(path) for path in sorted(FOLDER.glob("*.py")))
    return {command.name: command for command in found if command is not None}


def main(argv=None):
    """
    Entry point of `llava-mod`.

    Returns:
        `int`: 0; 2 after bad input, with one sentence on standard error; 75 of a run that a signal has ended, and that
        goes on from its checkpoint when it is started again.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    known = commands()
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {command.name:22}{command.summary}\n" for command in known.values()]
        sys.stdout.write("usage: llava-mod COMMAND [--config RECIPE.yaml] [--key value ...]\n\n" + "".join(lines))
        return 0
    name, *rest = argv
    if name not in known:
        sys.stderr.write(f"llava-mod: there is no command `{name}`: give one of {', '.join(known)}.\n")
        return 2

    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports it: the libraries' bars would fill a file
    command = known[name]
    if command.positional and rest and not rest[0].startswith("-"):
        rest = [f"--{command.positional}", *rest]
    from llava_mod_hf import recipes

    try:
        if not command.options:
            return importlib.import_module(command.module).run(rest)
        options = recipes.parse(command.groups(), rest, prog=f"llava-mod {name}", description=command.summary)
        importlib.import_module(command.module).run(*options)
        _leave_processes()
    except SystemExit as end:
        if not hasattr(end, "message"):  # of a run that goes on when it is started again
            raise
        _leave_processes()
        sys.stderr.write(f"llava-mod {name}: {end.message}\n")
        return end.code
    except (ValueError, OSError) as error:
        sys.stderr.write(f"llava-mod {name}: {error}\n")
        return 2
    return 0


def _leave_processes():
    """Ends what several processes talk through: its threads, left to the interpreter's end, may abort there."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
