"""
Draws `scene.png`, a test picture of the embedded scenes, enlarged, and writes what a model says of it in a terminal.

    python docs/talk.py [--model embedded:scenes-teacher] [--output docs/scene.png]

The terminal is a real one, a pseudo-terminal, in which `llava-mod chat` is typed to.
"""

import argparse
import os
import pty
import sys
from pathlib import Path

from PIL import Image

from llava_mod_hf.data import scene_rows

NUMBER, SIZE = 3, 192

LINES = (
    "describe the picture.",
    "how big is the red circle?",
    "where is the red square?",
    "/reset",
    "/image docs/scene.jpg",
    "/image docs/scene.png",
    "how many shapes are there?",
    "/quit",
)


def picture():
    """The picture that the session is about."""
    drawn = scene_rows.picture(NUMBER, "conversation", "test", 0)
    return drawn.resize((SIZE, SIZE), Image.Resampling.NEAREST)


def session(command, lines, prompt=b"> "):
    """
    What a terminal shows of a program that is typed to.

    Args:
        command (`list[str]`): the program.
        lines (`Iterable[str]`): each is typed when the prompt is there.
        prompt (`bytes`, *optional*).

    Returns:
        `str`.
    """
    lines, shown, typed = list(lines), b"", 0
    process, terminal = pty.fork()
    if process == 0:  # in the program itself
        # or the prompt would come with sequences for the terminal, and bars of the loading before it
        os.environ |= {"TERM": "dumb", "TQDM_DISABLE": "1"}
        os.execv(command[0], command)
    while True:
        try:
            shown += os.read(terminal, 1024)
        except OSError:  # the program has ended
            break
        if typed < len(lines) and (b"\n" + shown).endswith(b"\n" + prompt):
            os.write(terminal, lines[typed].encode() + b"\n")
            typed += 1
    os.waitpid(process, 0)
    return shown.decode().replace("\r\n", "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:scenes-teacher")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("scene.png"))
    args = parser.parse_args(argv)
    picture().save(args.output)
    chat = ["-m", "llava_mod_cli", "chat", args.model, "--image", str(args.output)]
    sys.stdout.write(session([sys.executable, *chat], LINES))


if __name__ == "__main__":
    main()
