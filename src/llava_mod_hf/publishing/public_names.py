"""What may be said in public: Hub ids as they are, files and folders of this machine by their last part alone."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

WHOLE_PATH = re.compile(r"(?:file:/+|~|\.{1,2}|[A-Za-z]:)[/\\]\S*|(?:[/\\][^\s/\\]+){2,}[/\\]?")

# a path inside a longer text; not what follows the scheme or the host of an address
PATH_IN_TEXT = re.compile(r"(?<![\w:/\\.@~-])(?:(?:[A-Za-z]:)?(?:[/\\][\w.@+-]+){2,}|~(?:[/\\][\w.@+-]+)+)[/\\]?")

TITLES = {"embedded:easy-vqa": "easy-VQA"}  # names under which others know a thing

# where a run's files lay, and who ran it: nobody can use these elsewhere
UNTOLD = ("output_dir", "logging_dir", "hub_token", "push_to_hub_token")


@dataclass(frozen=True)
class PublicNames:
    """
    Tells names of this machine from ids of the Hub, which look alike.

    Args:
        roots (`tuple[Path, ...]`): Folders that a relative name may start from: what is there is no Hub id.
        folders (`frozenset[str]`): First parts of relative names that are folders of this machine, there or removed.
    """

    roots: tuple = (Path(),)
    folders: frozenset = frozenset()

    @classmethod
    def of_run(cls, checkpoint, recipes):
        """Of a stage's output folder, whose relative names started from one of the folders above, and its recipes."""
        outputs = {str(recipe.get("output_dir") or "") for recipe in recipes}
        folders = {name.partition("/")[0] for name in outputs if "/" in name and not WHOLE_PATH.fullmatch(name)}
        return cls((Path(), *Path(checkpoint).resolve().parents), frozenset(folders))

    def is_local(self, name):
        """Whether a name is that of a file or folder of this machine, there or removed."""
        if WHOLE_PATH.fullmatch(name):
            return True
        if "/" not in name or "://" in name or re.search(r"\s", name):
            return False
        return name.partition("/")[0] in self.folders or any(os.path.exists(root / name) for root in self.roots)

    def is_hub_id(self, name):
        """Whether a name is `owner/name`, and nothing of this machine."""
        return HUB_ID.fullmatch(name) is not None and not self.is_local(name)

    def public(self, name):
        """A name as others may read it: title, `embedded:…` name or Hub id; of anything else its last part."""
        if name.startswith("embedded:") or self.is_hub_id(name):
            return TITLES.get(name, name)
        return last_part(name)

    def recipe(self, options):
        """The options of a run as others may read them."""
        return {name: self._value(value) for name, value in options.items() if name not in UNTOLD}

    def _value(self, value):
        if isinstance(value, dict):
            return {name: self._value(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if not isinstance(value, str):
            return value
        return self.public(value) if self.is_local(value) else without_paths(value)


def without_paths(text):
    """A text in which each absolute path is its last part alone."""
    return PATH_IN_TEXT.sub(lambda path: last_part(path[0]), text)


def last_part(path):
    """A path's last part, of Windows too."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
