"""
`llava-mod pretrain`: regenerates the embedded weights from the embedded data, each by one recipe.

The rest of the package starts from pretrained models, as the paper does; this is how the tiny ones came to be.
"""

import random
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipImageProcessorPil,
    Trainer,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from llava_mod_hf.data import easy_vqa, scene_rows, scenes
from llava_mod_hf.students.build import build_student
from llava_mod_hf.students.generation import prepare_generation

OPTIONS = ("commands.pretrain:PretrainConfig",)

CHOICES = {"part": ["vision_tower", "language_model", "teacher"], "world": ["easy-vqa", "scenes"]}

SPECIAL_TOKENS = {"pad_token": "<|pad|>", "eos_token": "<|end|>"}

ROLE_TOKENS = ["<image>", "<|system|>", "<|user|>", "<|assistant|>"]

# One line: Jinja eats the newline after a block tag, and a template that looks like its output is easier to check.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|end|>' }}{% endgeneration %}"
    "{% elif message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass
class PretrainConfig(SFTConfig):
    """
    [`~trl.SFTConfig`] with what is built.

    Args:
        part (`str`): `"vision_tower"`, `"language_model"` or `"teacher"`.
        vision_config, text_config (`dict`): sizes of the vision encoder and of the language model, with `model_type`.
        vocab_size (`int`): size of the tokenizer that is trained on the training text.
        vision_tower, language_model (`str`): what the teacher starts from.
        world (`str`, *optional*, defaults to `"easy-vqa"`): or `"scenes"`; what it is trained on.
        world_options (`dict`, *optional*): of the scenes, as [`~llava_mod_hf.data.scene_rows.SceneOptions`].
        train_vision_tower (`bool`, *optional*, defaults to `True`): whether the teacher's encoder is trained with it.

    Raises:
        ValueError: if there is no such `part` or `world`, or `world_options` are of another world.
    """

    part: str = field(default="teacher", metadata={"choices": CHOICES["part"]})
    vision_config: dict | str | None = None
    text_config: dict | str | None = None
    vocab_size: int = 384
    vision_tower: str | None = None
    language_model: str | None = None
    world: str = field(default="easy-vqa", metadata={"choices": CHOICES["world"]})
    world_options: dict | str | None = None
    train_vision_tower: bool = True

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "vision_config", "text_config", "world_options"]

    def __post_init__(self):
        super().__post_init__()
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: give one of {', '.join(known)}.")
        if self.world_options and self.world != "scenes":
            raise ValueError(f"`world_options` are of `scenes`, and `world` is `{self.world}`: leave them out.")


def _texts(world):
    if world == "scenes":
        return scenes.words()
    rows = easy_vqa.questions("train") + easy_vqa.caption_rows("train")
    return [row[part] for row in rows for part in ("question", "answer")]


def train_tokenizer(vocab_size, world="easy-vqa"):
    """Byte-level BPE over the training questions, answers and captions, with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS.values(), *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(world), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        extra_special_tokens=ROLE_TOKENS,
        **SPECIAL_TOKENS,
    )


def image_processor(image_size):
    return SiglipImageProcessorPil(size={"height": image_size, "width": image_size})


def _config(values, **extra):
    values = dict(values)
    return CONFIG_MAPPING[values.pop("model_type")](**values, **extra)


def labelled_pictures(args):
    """Rows of `images` and `label`, and how many labels there are; of scenes a row has several, by its caption."""
    if args.world == "scenes":
        rows = scene_rows.load("describe", "train", args.seed, args.world_options)
        named = [scenes.named_kinds(answer) for answer in rows["answer"]]
        labels = [[float(kind in found) for kind in scenes.KINDS] for found in named]
        return rows.select_columns("images").add_column("label", labels), len(scenes.KINDS)
    captions = sorted({row["answer"] for row in easy_vqa.caption_rows("train")})
    rows = easy_vqa.load("captions", "train", args.seed)
    labels = [captions.index(answer) for answer in rows["answer"]]
    return rows.select_columns("images").add_column("label", labels), len(captions)


def pretrain_vision_tower(args):
    """
    Trains a vision encoder to tell what the captions of the training images name.

    Images of easy-VQA are mirrored and transposed at random: neither changes the caption.
    """
    dataset, num_labels = labelled_pictures(args)
    config = SiglipConfig(
        vision_config=dict(args.vision_config),
        num_labels=num_labels,
        problem_type="multi_label_classification" if args.world == "scenes" else None,
    )
    process = image_processor(config.vision_config.image_size)
    rng = random.Random(args.seed)

    def collate(examples):
        pixels = process([example["images"][0] for example in examples], return_tensors="pt").pixel_values
        if args.world == "easy-vqa":
            for dims in ([-1], [-2]):
                if rng.random() < 0.5:
                    pixels = pixels.flip(dims)
            if rng.random() < 0.5:
                pixels = pixels.transpose(-1, -2)
        return {"pixel_values": pixels, "labels": torch.tensor([example["label"] for example in examples])}

    set_seed(args.seed)
    model = SiglipForImageClassification(config)
    args.remove_unused_columns = False
    trainer = Trainer(model, args, data_collator=collate, train_dataset=dataset)
    trainer.train()
    model.vision_model.save_pretrained(args.output_dir)
    process.save_pretrained(args.output_dir)


def pretrain_language_model(args):
    """
    Trains a language model on the training text alone: it never sees an image.

    A caption stands where the image will be, so that the model learns to answer from what it was told.
    """
    tokenizer = train_tokenizer(args.vocab_size, args.world)
    set_seed(args.seed)
    model = AutoModelForCausalLM.from_config(_text_config(args.text_config, tokenizer))
    if args.world == "scenes":
        rows = scene_rows.load_text("train", args.seed, args.world_options)
    else:
        rows = easy_vqa.load_text("train", args.seed)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    model.config.use_cache = model.generation_config.use_cache = True  # which the trainer turned off
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


def _text_config(values, tokenizer):
    return _config(
        values, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )


def pretrain_teacher(args):
    """Trains a dense LLaVA, its vision encoder included or not, on questions and captions."""
    model, processor = build_student(args.vision_tower, args.language_model, seed=args.seed)
    model.model.vision_tower.requires_grad_(args.train_vision_tower)
    if args.world == "scenes":
        rows = scene_rows.load("mixture", "train", args.seed, args.world_options)
    else:
        rows = easy_vqa.load("mixture", "train", args.seed)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=processor)
    trainer.train()
    prepare_generation(model, processor)
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)


PARTS = {
    "vision_tower": pretrain_vision_tower,
    "language_model": pretrain_language_model,
    "teacher": pretrain_teacher,
}


def run(args):
    """Builds `args.part` into `args.output_dir`."""
    PARTS[args.part](args)
