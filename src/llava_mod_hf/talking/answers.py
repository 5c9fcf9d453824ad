"""A model's answer, as it comes."""

import contextlib
import threading
import time

import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from llava_mod_hf.evaluation.generating import generation_options
from llava_mod_hf.talking.expert_choices import watching_routers


class _Stopped(StoppingCriteria):
    """Ends an answer that nobody waits for any more."""

    def __init__(self, event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Answer:
    """
    The answer to a question: an iterator over pieces of its text, and what is known of it when they are through.

    The model works in a thread of its own, which ends with the iteration, also with one that is left in the middle.

    Args:
        conversation ([`~llava_mod_hf.talking.conversation.Conversation`]): it is not changed.
        question (`str`).
        sampling ([`~llava_mod_hf.talking.sampling.Sampling`]).
        watch_experts (`bool`, *optional*, defaults to `False`): whether `experts` are noted.

    Attributes:
        text (`str`): all of it, without special tokens: what `generate` answers.
        prompt, tokens (`list[int]`): what was read, and what was said, its end included.
        ended (`bool`): whether it has an end, and was not cut at `max_new_tokens` or at the end of the context.
        seconds (`float`): from the question to the end of the answer, pictures included.
        experts (`dict[int, torch.LongTensor]`): as [`~llava_mod_hf.talking.expert_choices.watching_routers`] notes
            them: of all tokens of the prompt, and of those of the answer but the last, which nobody read again.

    Raises:
        ValueError: at once, as [`~llava_mod_hf.talking.conversation.Conversation.read`].
    """

    def __init__(self, conversation, question, sampling, *, watch_experts=False):
        self.model, self.processor, self.sampling = conversation.model, conversation.processor, sampling
        self.watch_experts, self.experts = watch_experts, {}
        self._inputs = conversation.read(question)
        self._length = min(sampling.max_new_tokens, conversation.room(self._inputs))
        self.prompt = self._inputs["input_ids"][0].tolist()
        self.text, self.tokens, self.ended, self.seconds = "", [], False, 0.0

    def __iter__(self):
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failed = threading.Event(), []

        def work():
            try:
                self._generate(streamer, _Stopped(stop))
            except BaseException as error:
                failed.append(error)
                streamer.on_finalized_text("", stream_end=True)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.set()
            worker.join()
        if failed:
            raise failed[0]

    def _generate(self, streamer, stopped):
        options = generation_options(
            self.model,
            self.processor,
            max_new_tokens=self._length,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
            repetition_penalty=self.sampling.repetition_penalty,
        )
        start = time.perf_counter()
        watching = watching_routers(self.model) if self.watch_experts else contextlib.nullcontext({})
        with watching as self.experts, torch.random.fork_rng(enabled=options["do_sample"]):
            if options["do_sample"]:
                torch.manual_seed(self.sampling.seed)
            generated = self.model.generate(**self._inputs, **options, streamer=streamer, stopping_criteria=[stopped])
        self.seconds = time.perf_counter() - start
        self.tokens = generated[0, len(self.prompt) :].tolist()
        ends = options["eos_token_id"]
        self.ended = bool(self.tokens) and self.tokens[-1] in (ends if isinstance(ends, list) else [ends])
        self.text = self.processor.decode(self.tokens, skip_special_tokens=True)
