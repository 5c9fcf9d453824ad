"""What the trainers ask of a teacher: loading it, refusing one that does not fit, reading the same responses."""

import dataclasses
import hashlib
import itertools
import json
import logging

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, ProcessorMixin
from transformers.quantizers.auto import AutoQuantizationConfig
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from llava_mod_hf.alignment import align_labels
from llava_mod_hf.embedded import resolve
from llava_mod_hf.losses import Head, ProjectedRows, shift_for_next_token

# Of the words of the sampled responses, the share that may lack a counterpart in the teacher's: a template that puts a
# space before the answer costs its first token, which is a small part of a sentence and all of a one-word answer.
MAX_UNALIGNED = 0.25
BITS = {
    "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "4bit": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
logger = logging.getLogger(__name__)


def load_model_and_processor(
    name, *, dtype="float32", attn_implementation=None, quantization=None, device=None, trust_remote_code=False
):
    """
    A LLaVA and its processor.

    Args:
        name (`str`): Hub name, folder or `embedded:…` name.
        dtype (`str`, *optional*, defaults to `"float32"`): of the weights in memory.
        attn_implementation (`str`, *optional*): as in transformers, such as `"sdpa"` or `"eager"`.
        quantization (`str`, *optional*): as for [`quantization_config`].
        device (`str`, *optional*): where the weights go, as transformers' `device_map`, such as `"cuda:1"` or `"auto"`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether code from that repository may run.

    Returns:
        `tuple[PreTrainedModel, ProcessorMixin]`.

    Raises:
        ValueError: if the folder has no processor, only a tokenizer, or the quantisation is unknown or not installed.
    """
    path = resolve(name)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantization_config=quantization_config(quantization),
            device_map=device,
            trust_remote_code=trust_remote_code,
        )
    except ImportError as error:
        if quantization is None:
            raise
        raise ValueError(f"Quantising `{name}` by `{quantization}` needs a library ({error}): install it.") from error
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except ImportError as error:  # of a processor with a part for videos
        raise ValueError(f"The processor of `{name}` needs a library ({' '.join(str(error).split())}).") from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"`{name}` comes with a {type(processor).__name__}, not with a processor of text and images: save the "
            "processor beside the model with `processor.save_pretrained`."
        )
    return model, processor


def quantization_config(quantization):
    """
    A quantisation of transformers out of one option of a recipe.

    Args:
        quantization (`str` or `None`):
            `"8bit"` or `"4bit"` (bitsandbytes, NF4), or the JSON of any other configuration of transformers, with its
            `quant_method`, such as `{"quant_method": "quanto", "weights": "int8"}`.

    Returns:
        [`~transformers.utils.quantization_config.QuantizationConfigMixin`] or `None`.

    Raises:
        ValueError: if it is neither.
    """
    if quantization is None:
        return None
    if quantization in BITS:
        return BITS[quantization]()
    try:
        return AutoQuantizationConfig.from_dict(json.loads(quantization))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The quantisation `{quantization}` is none of {', '.join(BITS)} and no configuration of transformers as "
            f"JSON ({error})."
        ) from error


def shared_vocab_size(student, teacher, processor, teacher_processor=None):
    """
    How many tokens the two models share: the rows of their heads that can be compared.

    Heads are often padded to a round number of rows; those beyond the tokenizers' own tokens mean nothing. Tokens that
    one tokenizer alone has, after all the others, such as an added `<image>`, are left out as well.

    Args:
        student, teacher (`PreTrainedModel`).
        processor (`ProcessorMixin`): the student's.
        teacher_processor (`ProcessorMixin`, *optional*): the teacher's; without it the sizes have to be equal.

    Returns:
        `int` or `None`: the first ids that are shared; `None` if all of both heads are.

    Raises:
        ValueError: if a token has another id, or an id another token, for the teacher.
    """
    size, teacher_size = (model.config.get_text_config().vocab_size for model in (student, teacher))
    if teacher_processor is None:
        if size != teacher_size:
            raise ValueError(
                f"The teacher's vocabulary has {teacher_size} entries and the student's {size}: distillation compares "
                "distributions over the same tokens, so give the teacher's processor too, which tells whether they "
                "differ in padding alone, or take a teacher and a language model of the same tokenizer."
            )
        return None
    ours, theirs = ({i: token for token, i in p.tokenizer.get_vocab().items()} for p in (processor, teacher_processor))
    shared = max(ours.keys() & theirs.keys(), default=-1) + 1
    for index in range(shared):
        if ours.get(index) != theirs.get(index):
            _refuse_token(ours.get(index) or theirs.get(index), index)
    names, their_names = set(ours.values()), set(theirs.values())
    for index, token in sorted([*ours.items(), *theirs.items()]):
        if index >= shared and token in names and token in their_names:
            _refuse_token(token, index)
    if shared > min(size, teacher_size):
        raise ValueError(
            f"The tokenizers share {shared} tokens, the student's head has {size} rows and the teacher's "
            f"{teacher_size}: a processor does not belong to its model."
        )
    return None if size == teacher_size and ours == theirs else shared


def _refuse_token(token, index):
    raise ValueError(
        f"The tokenizers of teacher and student differ, first at token {token!r} with id {index}: take a teacher and "
        "a language model of the same tokenizer."
    )


def check_teacher(student, teacher, processor, teacher_processor=None):
    """
    Refuses a teacher that cannot read the very tensors that the student reads.

    Args:
        student, teacher (`PreTrainedModel`): LLaVA-like models.
        processor (`ProcessorMixin`): the student's.
        teacher_processor (`ProcessorMixin`, *optional*): the teacher's; without it only the models are compared.

    Raises:
        ValueError: if vocabulary, image token or the number of image tokens differ.
    """
    shared_vocab_size(student, teacher, processor, teacher_processor)
    if teacher_processor is not None:
        vocabulary, other = processor.tokenizer.get_vocab(), teacher_processor.tokenizer.get_vocab()
        for token, index in sorted(vocabulary.items() ^ other.items(), key=lambda entry: (entry[1], entry[0])):
            _refuse_token(token, index)
    for name in ("image_token_id", "image_seq_length"):
        ours, theirs = getattr(student.config, name, None), getattr(teacher.config, name, None)
        if ours != theirs:
            raise ValueError(
                f"The teacher has `{name}` {theirs} and the student {ours}: both read the same token ids, so they must "
                "write the same placeholders for an image; or give the teacher's own processor."
            )


def content_hash(value):
    """Sixteen hexadecimal digits that say whether a value, of what JSON can write, is the same."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def processor_parts(processor):
    """
    What decides which tensors a processor makes of a conversation, as a hash for each part.

    Returns:
        `dict[str, str]`: `tokenizer`, `chat_template`, `image_processor` and `image_tokens` → hash.
    """
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    # not properties of the tokenizer: each call sets them anew
    tokenizer = {key: value for key, value in tokenizer.items() if key not in ("truncation", "padding")}
    images = processor.image_processor.to_dict()
    # its class is another without torchvision
    images = {key: value for key, value in images.items() if key not in ("image_processor_type", "processor_class")}
    names = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "image_token")
    return {
        "tokenizer": content_hash(tokenizer),
        "chat_template": content_hash(processor.chat_template),
        "image_processor": content_hash(images),
        "image_tokens": content_hash([type(processor).__name__, *(getattr(processor, n, None) for n in names)]),
    }


@torch.no_grad()
def head_of(model):
    """
    How a model makes logits of its last hidden states, found out by a forward pass of one token.

        logits = softcap · tanh(scale · (W h + b) / softcap)

    Which of a family's options a class applies is not in its config: stock LLaVA over Gemma2 has a
    `final_logit_softcapping` and does not use it. So the head is made to answer known numbers, and the candidate that
    explains what the model makes of them is taken.

    Args:
        model (`PreTrainedModel`): with all its weights in this process.

    Returns:
        [`~llava_mod_hf.losses.Head`], with the model's own parameters.

    Raises:
        ValueError: if the head is quantised, or no candidate explains the logits.
    """
    layer, config, name = model.get_output_embeddings(), model.config.get_text_config(), type(model).__name__
    if layer is None or not getattr(layer, "weight", None) is not None or not layer.weight.is_floating_point():
        raise ValueError(f"{name} has no output head with floating-point weights: leave `lm_head` unquantised.")
    values = [getattr(config, key, None) for key in ("logit_scale", "lm_head_multiplier", "output_multiplier")]
    scaling = getattr(config, "logits_scaling", None)  # Granite divides by it, HyperCLOVA X multiplies
    scales = [1.0, *(value for value in values if value), *((1 / scaling, scaling) if scaling else ())]
    softcaps = [None, *(v for v in [getattr(config, "final_logit_softcapping", None)] if v)]
    known = torch.linspace(-60, 60, layer.weight.shape[0], device=layer.weight.device)
    heads = []
    handle = layer.register_forward_hook(lambda module, args, output: known.to(output).expand_as(output))
    try:
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device)).logits[0, -1]
    finally:
        handle.remove()
    for scale, softcap in itertools.product(scales, softcaps):
        expected = known * scale if softcap is None else softcap * torch.tanh(known * scale / softcap)
        heads.append(((expected.to(logits) - logits).abs().max().item(), scale, softcap))
    error, scale, softcap = min(heads, key=lambda found: found[0])
    if error > 0.5:  # bfloat16 keeps 60 to within 0.25
        raise ValueError(f"{name} makes of its head's output what is no scale and no softcap: it cannot be a teacher.")
    return Head(layer.weight, getattr(layer, "bias", None), softcap, scale)


class LiveTeacher:
    """
    A teacher that answers at every step, with its own processor where that differs from the student's.

    Args:
        model (`PreTrainedModel`): any vision-language model of the student's tokenizer.
        student (`PreTrainedModel`): whom it teaches.
        processor (`ProcessorMixin`): the student's.
        teacher_processor (`ProcessorMixin`, *optional*): the teacher's own; by default it reads the student's tensors.
        collator: the student's collator, a dataclass of TRL with a `processor`; needed where the processors differ.
        weight (`float`, *optional*, defaults to 1.0): of its divergence, among several teachers.

    Attributes:
        shared_vocab_size (`int` or `None`): as [`shared_vocab_size`] finds it.

    Raises:
        ValueError: if it does not fit the student.
    """

    def __init__(self, model, *, student, processor, teacher_processor=None, collator=None, weight=1.0):
        self.model, self.weight = model.eval().requires_grad_(False), weight
        self.shared_vocab_size = shared_vocab_size(student, model, processor, teacher_processor)
        self.tokenizer = processor.tokenizer
        self.collator = None
        if teacher_processor is None or processor_parts(teacher_processor) == processor_parts(processor):
            check_teacher(student, model, processor, teacher_processor)
        else:
            self.collator = self._collator_like(collator, teacher_processor)
        self._head = head_of(model)

    @property
    def head(self):
        """[`~llava_mod_hf.losses.Head`] of the shared tokens; from the parameter itself, which moves with the model."""
        rows, bias = slice(self.shared_vocab_size), self._head.bias
        return self._head._replace(weight=self._head.weight[rows], bias=None if bias is None else bias[rows])

    @staticmethod
    def _collator_like(collator, processor):
        if not dataclasses.is_dataclass(collator) or not hasattr(collator, "processor"):
            raise ValueError(
                "The teacher has a processor of its own, which has to read the rows as they are, and the student's "
                f"come through a {type(collator).__name__}: give rows with a column `images`, empty lists for text."
            )
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        options = {"processor": processor, "max_length": None}
        if getattr(collator, "assistant_only_loss", False):
            marked = has_generation_markers(processor.chat_template)
            options["chat_template"] = None if marked else get_training_chat_template(processor)
        return dataclasses.replace(collator, **options)

    def collate(self, examples, batch):
        """
        The teacher's own tensors of the same rows, and which of the student's tokens it speaks about.

        Args:
            examples (`list[dict]`): rows as the data set yields them; not changed.
            batch (`dict`): what the student's collator made of them.

        Returns:
            `dict[str, torch.Tensor]`: `{}` if teacher and student read the same tensors; else the inputs of its model,
            `keep` `(batch, teacher sequence)`, the positions whose hidden states are asked for, and `aligned`
            `(batch, sequence)`, the student's positions that they answer to. Both are boolean.
        """
        if self.collator is None:
            return {}
        own = dict(self.collator([dict(example) for example in examples]))
        aligned, keep = align_labels(batch["labels"], own.pop("labels"), self.tokenizer)
        return {**own, "keep": keep, "aligned": aligned}

    def check_alignment(self, examples, batch):
        """
        Refuses a teacher whose responses are not the student's, on a sample of rows.

        Args:
            examples (`list[dict]`), batch (`dict`): as for [`collate`].

        Returns:
            `float`: share of the response tokens, ends of turns included, that have no counterpart.

        Raises:
            ValueError: if more than `MAX_UNALIGNED` of the words, special tokens apart, have none.
        """
        keep, targets = shift_for_next_token(batch["labels"])
        own = self.collate(examples, batch)
        if not own or not len(targets):
            return 0.0
        missing = ~own["aligned"][keep]
        words = ~torch.isin(targets, torch.tensor(self.tokenizer.all_special_ids))
        share = missing[words].float().mean().item() if words.any() else 0.0
        if share > MAX_UNALIGNED:
            row = (keep & ~own["aligned"]).any(1).nonzero()[0].item()
            labels, theirs = batch["labels"][row], self.collator([dict(examples[row])])["labels"][0]
            ours, theirs = (self.tokenizer.decode(ids[ids != -100]) for ids in (labels, theirs))
            raise ValueError(
                f"{share:.0%} of the words of the responses have no counterpart in the teacher's, and at most "
                f"{MAX_UNALIGNED:.0%} may: the first differing response is {ours!r} for the student and {theirs!r} for "
                "the teacher, so make the chat templates write the answers alike."
            )
        share = missing.float().mean().item()
        logger.info("The teacher says nothing about %.1f %% of the response tokens.", 100 * share)
        return share

    def rows(self, student_inputs, own_inputs, labels):
        """
        The teacher's hidden states where it predicts the student's response tokens.

        Runs under the caller's autocast, if any.

        Args:
            student_inputs (`dict`): the student's model inputs, without labels.
            own_inputs (`dict`): what [`collate`] returned.
            labels (`torch.LongTensor` of shape `(batch, sequence)`): the student's, unshifted.

        Returns:
            [`~llava_mod_hf.losses.ProjectedRows`].

        Raises:
            ValueError: if a hidden state is not finite.
        """
        keep, _ = shift_for_next_token(labels)
        aligned, inputs = None, student_inputs
        if own_inputs:
            inputs = {name: value for name, value in own_inputs.items() if name not in ("keep", "aligned")}
            aligned, keep = own_inputs["aligned"][keep], own_inputs["keep"]
        device, head = self.model.device, self.head
        inputs = {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}
        with torch.inference_mode():
            hidden = self.model.base_model(**{**inputs, "use_cache": False}).last_hidden_state
            hidden = hidden[keep.to(hidden.device)].to(head.weight.device)
        if not torch.isfinite(hidden).all():
            raise ValueError(
                f"The teacher's hidden states are not finite at {(~torch.isfinite(hidden)).any(-1).sum()} of "
                f"{len(hidden)} positions: its weights are broken, or `teacher_dtype` cannot hold its activations."
            )
        return ProjectedRows(
            hidden.clone(), head, aligned
        )  # a copy: inference tensors cannot be saved for a backward pass
