"""Which words name which things: the published list of CHAIR, from the user's copy, or the kinds of the scenes."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from llava_mod_hf.data.scenes import COLORS, SHAPES

IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "foot": "feet", "mouse": "mice",
    "goose": "geese", "knife": "knives", "calf": "calves", "shelf": "shelves", "loaf": "loaves",
    "sheep": "sheep", "fish": "fish",
}  # fmt: skip

ANIMALS = (
    "animal", "bear", "bird", "cat", "cow", "cub", "dog", "elephant", "giraffe", "horse", "sheep", "zebra",
)  # fmt: skip

# the rules that the published scorer has beside the list, for the objects of COCO
QUALIFIED = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
}

NO_THINGS = ("home plate", "train track")  # neither a plate nor a train


@dataclass(frozen=True)
class Synonyms:
    """
    Which words name which things.

    Args:
        words (`dict[str, str]`): each word, or words, in small letters, and the thing that it names.
        scenes (`bool`, *optional*, defaults to `False`): whether they are the kinds of the scenes.
    """

    words: dict
    scenes: bool = False

    @classmethod
    @functools.cache
    def of_scenes(cls):
        """Those of the embedded world, `red circle` and the others."""
        kinds = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
        return cls({kind: kind for kind in kinds}, scenes=True)

    @classmethod
    def read(cls, path):
        """
        A list as it is published with CHAIR: a line for each thing, its name first, then its synonyms, by commas.

        Raises:
            ValueError: if the file is missing, or is no such list.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"`synonyms` is `{path}`, and no such file is there: give your copy of the list.")
        try:
            lines = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"`synonyms` is `{path}`, which is no text in UTF-8: give CHAIR's list.") from error
        names = [[" ".join(name.lower().split()) for name in line] for line in lines]
        if not any(len(line) > 1 for line in names) or not all(line[0] for line in names):
            raise ValueError(f"`synonyms` is `{path}`, which has no line `thing, synonym, synonym`: give CHAIR's list.")
        return cls({name: line[0] for line in names for name in line if name})

    @functools.cached_property
    def _forms(self):
        """Every word in singular and plural, what it is in the singular, and one pattern for all, longest first."""
        words = {word: word for word in (*self.words, *(() if self.scenes else (*QUALIFIED, *NO_THINGS)))}
        forms = {plural(word): word for word in words} | words
        longest = sorted(forms, key=len, reverse=True)
        return forms, re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest))})(?![\w-])")

    def mentions(self, text):
        """
        Args:
            text (`str`).

        Returns:
            `list[tuple[str, str]]`: the words of a text that name things, in the singular, and the things, in order.
        """
        forms, pattern = self._forms
        found = [forms[match[0]] for match in pattern.finditer(" ".join(text.lower().split()))]
        if not self.scenes:
            found = [QUALIFIED.get(word, word) for word in found]
            if "toilet" in found:  # the seat of a toilet is no chair
                found = [word for word in found if word != "seat"]
        return [(word, self.words[word]) for word in found if word in self.words]


def plural(word):
    """A noun's plural; of several words, that of the last."""
    first, space, last = word.rpartition(" ")
    if last in IRREGULAR:
        return first + space + IRREGULAR[last]
    if re.search(r"([^aeiou]y)$", last):
        return f"{word[:-1]}ies"
    return word + ("es" if re.search(r"(s|x|z|ch|sh)$", last) else "s")
