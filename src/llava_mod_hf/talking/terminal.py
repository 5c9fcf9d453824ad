"""A conversation in the terminal, or through a pipe: a question a line, and commands that begin with a slash."""

import sys

from llava_mod_hf.talking.answers import Answer
from llava_mod_hf.talking.conversation import read_picture

PROMPT = "> "

HELP = "A line is a question; `/image PATH` shows a picture, `/reset` begins anew, `/quit` ends."


class Terminal:
    """
    Takes lines, and writes answers as they come.

    Args:
        conversation ([`~llava_mod_hf.talking.conversation.Conversation`]).
        sampling ([`~llava_mod_hf.talking.sampling.Sampling`]).
        out (file object, *optional*): by default standard output.
    """

    def __init__(self, conversation, sampling, *, out=None):
        self.conversation, self.sampling = conversation, sampling
        self.out = sys.stdout if out is None else out
        self.commands = {"/image": self._show, "/reset": self._reset, "/quit": None}

    def _write(self, text):
        self.out.write(text)
        self.out.flush()  # or a pipe would get an answer when it is all there

    def _show(self, path):
        if not path:
            raise ValueError("`/image` stands without a picture: give its path, `/image PATH`.")
        self.conversation.show(read_picture(path))

    def _reset(self, rest):
        if rest:
            raise ValueError(f"`/reset` stands with `{rest}`, and takes nothing.")
        self.conversation.reset()

    def take(self, line):
        """
        Does what a line says.

        Args:
            line (`str`): a question, a command, or nothing.

        Returns:
            `bool`: whether the conversation goes on.

        Raises:
            ValueError: if there is no such command or picture, or the question cannot be asked; all is as before.
        """
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self._ask(line)
            return True
        command, _, rest = line.partition(" ")
        if command not in self.commands:
            raise ValueError(f"There is no command `{command}`: {HELP}")
        if command == "/quit":
            return False
        self.commands[command](rest.strip().strip("\"'"))
        return True

    def _ask(self, question):
        answer = Answer(self.conversation, question, self.sampling)
        for piece in answer:
            self._write(piece)
        self._write("\n" if answer.ended else " […]\n")
        self.conversation.answered(question, answer.text)

    def pipe(self, lines):
        """
        Takes lines to their end, or to `/quit`.

        Args:
            lines (`Iterable[str]`): such as standard input.

        Raises:
            ValueError: as [`take`]; later lines might need what was refused.
        """
        for line in lines:
            if not self.take(line):
                return

    def interact(self, read=input):
        """
        Asks for lines until `/quit` or the end of the input. What is refused is told, and the conversation goes on;
        Ctrl-C ends an answer, which is then left out of it with its question.

        Args:
            read (`Callable[[str], str]`, *optional*): like `input`.
        """
        self._write(HELP + "\n")
        while True:
            try:
                line = read(PROMPT)
            except (EOFError, KeyboardInterrupt):
                self._write("\n")
                return
            try:
                if not self.take(line):
                    return
            except ValueError as error:
                self._write(f"{error}\n")
            except KeyboardInterrupt:
                self._write("\nStopped: the question and what was said are left out.\n")
