"""A conversation about pictures: its turns, as a model reads them, and what it refuses to read."""

from pathlib import Path

from PIL import Image, ImageOps

from llava_mod_hf.data.image_files import check_image
from llava_mod_hf.data.marks import find_mark, marks_of, without_marks
from llava_mod_hf.evaluation.generating import inputs_for, read_prompts


def read_picture(path, name=None):
    """
    A picture that a model is shown, upright, as training and `evaluate` read it.

    Args:
        path (`str` or `Path`): of its file.
        name (`str`, *optional*): what it is called in messages; by default its path.

    Returns:
        `PIL.Image.Image`: RGB.

    Raises:
        ValueError: if there is no such file, or it is no whole picture of 8 bits a value.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no picture `{name or path}`: give the path of a file.")
    check_image(path, f"`{name or path}`", otherwise="")
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


class Conversation:
    """
    The turns of a conversation with a model, and their pictures.

    A picture belongs to the question that is asked next, and stands before it. An answer is read again without the
    marks that it may spell out.

    Args:
        model (`PreTrainedModel`): a student or a stock LLaVA.
        processor (`ProcessorMixin`): its processor, with a chat template.
    """

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.messages: list[dict] = []
        self.pictures: list = []  # of the next question
        # of a config that says nothing of it there is no limit to hold to
        self.limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if not processor.chat_template:
            raise ValueError("The model's processor has no chat template, which questions are written with: add one.")

    def show(self, picture):
        """Puts a picture (`PIL.Image.Image`) before the next question."""
        self.pictures.append(picture)

    def reset(self):
        """Forgets turns and pictures."""
        self.messages, self.pictures = [], []

    def with_question(self, question):
        """`list[dict]`: the turns so far and a question, with the pictures that were shown since the last one."""
        content = [*({"type": "image", "image": each} for each in self.pictures), {"type": "text", "text": question}]
        return [*self.messages, {"role": "user", "content": content}]

    def read(self, question):
        """
        The tensors that the model answers to; the conversation stays as it is.

        Args:
            question (`str`).

        Returns:
            `dict[str, torch.Tensor]`: on its device, `input_ids` of shape `(1, tokens)`.

        Raises:
            ValueError: if the question spells out a mark, or leaves no room for an answer in the model's context.
        """
        messages = self.with_question(question)
        mark = find_mark(question, marks_of(self.processor))
        if mark is not None:
            raise ValueError(
                f"The question holds `{mark}`, which the tokenizer reads as a mark of its own: write it otherwise."
            )
        inputs = inputs_for(self.model, read_prompts(self.processor, [messages]))
        if self.room(inputs) < 1:
            raise ValueError(
                f"With this question the conversation has {inputs['input_ids'].shape[1]} tokens, pictures included, "
                f"and the model reads {self.limit}: begin anew, or ask with fewer words and pictures."
            )
        return inputs

    def room(self, inputs):
        """`int` or `float`: tokens that an answer to such tensors may have in the model's context."""
        return float("inf") if self.limit is None else self.limit - inputs["input_ids"].shape[1]

    def answered(self, question, answer):
        """Takes in a question and the text that answered it."""
        content = [{"type": "text", "text": without_marks(answer, marks_of(self.processor))}]
        self.messages = [*self.with_question(question), {"role": "assistant", "content": content}]
        self.pictures = []
