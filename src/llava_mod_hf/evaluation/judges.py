"""Chat models that judge answers: of a folder or the Hub, or behind a server's address."""

import os
from pathlib import Path

from accelerate import PartialState
from huggingface_hub import InferenceClient, snapshot_download
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llava_mod_hf.evaluation.generating import evaluating
from llava_mod_hf.fingerprints import config_hash, content_hash, weights_hash
from llava_mod_hf.hub_reading import told_when_the_hub_fails
from llava_mod_hf.loading import load_whole

KEY = "JUDGE_API_KEY"  # in the environment, for a server that asks for one

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


class LocalJudge:
    """
    A chat model by transformers, answering greedily; its weights are loaded when the first verdict is asked for.

    Args:
        name (`str`): a folder, or a name of the Hub.
        revision (`str`, *optional*): of the Hub's.
        max_new_tokens (`int`): where a verdict without an end is cut.
        batch_size (`int`): prompts answered at a time.
        device (`str`, *optional*): where it goes; by default a GPU if there is one.

    Raises:
        ValueError: if it has no safetensors or no chat template, or a name of the Hub has no revision.
    """

    def __init__(self, name, *, revision=None, max_new_tokens, batch_size, device=None):
        self.folder = Path(name)
        if not self.folder.is_dir():
            if revision is None:
                raise ValueError(
                    f"`judge` is `{name}`, no folder here, and on the Hub a name alone is whatever it is today: give "
                    "`judge_revision`, a commit."
                )
            with told_when_the_hub_fails(name):
                self.folder = Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
        elif revision is not None:
            raise ValueError(f"`judge_revision` is `{revision}`, and `{name}` is a folder: leave it out.")
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, padding_side="left")
        if self.tokenizer.chat_template is None:
            raise ValueError(f"`judge` is `{name}`, which has no chat template: give a model that was trained to chat.")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.max_new_tokens, self.batch_size, self.device, self.model = max_new_tokens, batch_size, device, None
        self.told = {"name": name, "judge_revision": revision}
        self.identity = {
            "judge": content_hash([weights_hash(self.folder), config_hash(AutoConfig.from_pretrained(self.folder))]),
            "tokenizer": content_hash([self.tokenizer.get_vocab(), self.tokenizer.chat_template]),
            "max_new_tokens": max_new_tokens,
        }

    def verdicts(self, prompts):
        """Yields a verdict (`str`) for each prompt, batch by batch."""
        if self.model is None:
            placed = {} if self.device is None else {"device_map": self.device}
            model = load_whole(AutoModelForCausalLM, self.folder, dtype="auto", **placed)
            self.model = model.to(PartialState().device) if self.device is None else model
        with evaluating(self.model):
            for start in range(0, len(prompts), self.batch_size):
                inputs = self.tokenizer.apply_chat_template(
                    [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + self.batch_size]],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    padding=True,
                ).to(self.model.device)
                tokens = self.model.generate(
                    **inputs,
                    do_sample=False,
                    num_beams=1,
                    repetition_penalty=1.0,
                    max_new_tokens=self.max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id,
                )
                yield from self.tokenizer.batch_decode(
                    tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
                )


class ServerJudge:
    """
    A chat model behind an address that speaks OpenAI's protocol, as vLLM and llama.cpp do; asked for the likeliest
    answer. Nobody can tell from here what it is: `name` and `revision` say it.

    Args:
        name (`str`): by which the server knows the model.
        url (`str`): such as `http://localhost:8000/v1`.
        revision (`str`, *optional*): what is told of the model besides.
        max_new_tokens (`int`): where a verdict without an end is cut.
    """

    def __init__(self, name, *, url, revision=None, max_new_tokens):
        self.name, self.url, self.max_new_tokens = name, url, max_new_tokens
        self.told = {"name": name, "url": url}
        self.identity = {"judge": name, "revision": revision, "max_new_tokens": max_new_tokens}
        # without a key the client would send the Hub's token to whoever is there
        self.client = InferenceClient(base_url=url, api_key=os.environ.get(KEY) or "none", timeout=600)

    def verdicts(self, prompts):
        """
        Yields a verdict (`str`) for each prompt.

        Raises:
            ConnectionError: if the server does not answer, or with something else than a verdict.
        """
        for prompt in prompts:
            try:
                answer = self.client.chat_completion(
                    [{"role": "user", "content": prompt}],
                    model=self.name,
                    max_tokens=self.max_new_tokens,
                    temperature=0.0,
                )
                verdict = answer.choices[0].message.content or ""
            except Exception as error:  # the client's, its library's, and of an answer in another form
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise ConnectionError(
                    f"The judge at `{self.url}` gave no verdict ({reason}): the verdicts so far are kept; start again "
                    "when it answers."
                ) from error
            yield verdict


def shown(verdicts, count):
    """Verdicts as they come, with a bar on a terminal."""
    return tqdm(verdicts, total=count, desc="Judging answers", leave=None, disable=None)
