"""A LLaVA of ours, or a stock one, in lmms-eval: its own `huggingface` takes remote code for a model without a head."""

from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from datasets import Image as Picture
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image

from llava_mod_hf.evaluation.answers import generate_answers
from llava_mod_hf.loading import load_model_and_processor

AT_ONCE = 256  # requests whose pictures are in memory together

GREEDY = {"temperature": (0, None), "do_sample": (False, None), "num_beams": (1, None)}

TAKEN = ("until", "max_new_tokens", "top_p", *GREEDY)

PARTS = List({"type": Value("string"), "text": Value("string")})

ROWS = Features({"images": List(Picture()), "prompt": List({"role": Value("string"), "content": PARTS})})


class LlavaMod(lmms):
    """
    Greedy answers, as [`~llava_mod_hf.evaluation.answers.generate_answers`] gives them.

    Args:
        pretrained (`str`): a folder or Hub id, or `embedded:…`.
        dtype (`str`, *optional*, defaults to `"float32"`): of the model's weights in memory.
        device (`str`, *optional*): by default a GPU if there is one.
        batch_size (`int`, *optional*, defaults to 1): requests answered at a time.
        max_batch_size: lmms-eval's, for a batch size that it finds out; not taken.
        trust_remote_code (`bool`, *optional*, defaults to `False`).

    Raises:
        ValueError: if the batch size is no number, or there are several processes.
    """

    is_simple = False  # asks for messages, pictures and all

    def __init__(
        self, pretrained, dtype="float32", device=None, batch_size=1, max_batch_size=None, trust_remote_code=False
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` is `{batch_size}`: give how many requests are answered at a time.")
        if max_batch_size is not None:
            raise ValueError(f"`max_batch_size` is {max_batch_size}, and nothing is found out here: give `batch_size`.")
        if PartialState().num_processes > 1:
            raise ValueError(
                f"There are {PartialState().num_processes} processes, and this model answers in one: start one."
            )
        self.batch_size = int(batch_size)
        model, self.processor = load_model_and_processor(
            pretrained, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        self.model = model.to(PartialState().device) if device is None else model

    def generate_until(self, requests):
        """Answers (`list[str]`) to requests of chat tasks, in their order."""
        answers, groups = [None] * len(requests), {}
        for place, request in enumerate(requests):
            options = request.args[2]
            groups.setdefault(repr(sorted(options.items())), []).append(place)
        for places in groups.values():
            options = _checked(requests[places[0]].args[2])
            for start in range(0, len(places), AT_ONCE):
                some = places[start : start + AT_ONCE]
                rows = [self._row(requests[place]) for place in some]
                found = generate_answers(
                    self.model,
                    self.processor,
                    Dataset.from_list(rows, features=ROWS),
                    batch_size=self.batch_size,
                    max_new_tokens=options.get("max_new_tokens", 64),
                )
                for place, answer in zip(some, found, strict=True):
                    for end in filter(None, options.get("until") or ()):
                        answer = answer.split(end)[0]
                    answers[place] = answer
        return answers

    def _row(self, request):
        _, to_messages, _, number, task, split = request.args
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][number]))
        images, videos, sounds = messages.extract_media()
        if videos or sounds:
            raise ValueError(f"Row {number} of `{task}` has a video or a sound, and the model sees pictures alone.")
        prompt = [
            {
                "role": message.role,
                "content": [{"type": part.type, "text": getattr(part, "text", None)} for part in message.content],
            }
            for message in messages.messages
        ]
        # copies: one that remembers being a JPEG would be compressed again
        return {"images": [(Image.open(i) if isinstance(i, str) else i).copy() for i in images], "prompt": prompt}

    def loglikelihood(self, requests):
        raise NotImplementedError("This model gives answers, no likelihoods: take a task of `generate_until`.")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("This model answers once: take a task of `generate_until`.")


def _checked(options):
    """
    Raises:
        ValueError: if an option asks for something else than greedy answers.
    """
    for name, value in options.items():
        if name not in TAKEN or (name in GREEDY and value not in GREEDY[name]):
            raise ValueError(
                f"`generation_kwargs` have `{name}` {value!r}, and answers are greedy, as in `llava-mod evaluate`: "
                "give `max_new_tokens` and `until`."
            )
    return options
