"""What in a description is right: the things that it names and are not there, and those that it misses."""

from dataclasses import dataclass

from llava_mod_hf.data.scenes import MENTION, named_kinds


@dataclass(frozen=True)
class Marked:
    """
    A description of a scene, compared with what is there.

    Args:
        pieces (`tuple[tuple[str, bool], ...]`): the text in pieces, and of each whether it is an absent thing's name.
        missing (`tuple[str, ...]`): what is there and not named.
        repeated (`tuple[str, ...]`): what is there and named again.
    """

    pieces: tuple
    missing: tuple
    repeated: tuple

    @property
    def right(self):
        """Whether it names each thing that is there once, in any order, and nothing else."""
        return not (self.missing or self.repeated or any(absent for _, absent in self.pieces))


def mark_description(given, answer):
    """
    [`Marked`] of a description.

    Args:
        given (`str`): the description.
        answer (`str`): a right one, which names everything that is there.
    """
    there, named, pieces, repeated, end = named_kinds(answer), set(), [], [], 0
    for match in MENTION.finditer(given):
        kind = match[0].lower()
        if kind not in there:
            pieces += [(given[end : match.start()], False), (match[0], True)]
            end = match.end()
        elif kind in named:
            repeated.append(kind)
        named.add(kind)
    pieces.append((given[end:], False))
    return Marked(
        pieces=tuple(piece for piece in pieces if piece[0]),
        missing=tuple(kind for kind in there if kind not in named),
        repeated=tuple(dict.fromkeys(repeated)),
    )
