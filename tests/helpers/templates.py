"""Chat templates as published models have them, over the tests' tokenizer, and conversations to read by them."""

import copy

from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from helpers.tiny import make_processor

MESSAGES = [{"role": Value("string"), "content": Value("string")}]

PARTS = [{"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string")}]}]

TEXT = (
    "{% macro text(m) %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endmacro %}"
)

TURNS = "{% for m in messages %}TURN{% endfor %}{% if add_generation_prompt %}OPEN{% endif %}"


def _turns(turn, opening):
    return TEXT + TURNS.replace("TURN", turn).replace("OPEN", opening)


CHATML = "{{ '<|im_start|>' + m['role'] + '\n' }}%s{{ text(m) }}%s{{ '<|im_end|>' }}%s{{ '\n' }}"

CHATML_OPEN = "{{ '<|im_start|>assistant\n' }}"

MARKED = "{% if m['role'] == 'assistant' %}{% generation %}{{ text(m) }}{{ '<|im_end|>' }}{% endgeneration %}{% else %}"

FIRST = "{% if loop.first and m['role'] == 'system' %}{{ text(m) + '\n\n' }}{% else %}"

# with a system turn of its own, which models without one write before the first question; that is left to the templates
TEMPLATES = {
    "chatml": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        + _turns(CHATML % ("", "", ""), CHATML_OPEN)
    ),
    "llama-3": "{{ '<|begin|>' }}"
    + _turns(
        "{{ '<|head|>' + m['role'] + '<|tail|>\n\n' + text(m) | trim + '<|eot|>' }}",
        "{{ '<|head|>assistant<|tail|>\n\n' }}",
    ),
    "mistral": "{{ '<s>' }}"
    + _turns(
        "{% if m['role'] == 'assistant' %}{{ ' ' + text(m) | trim + '</s>' }}"
        "{% elif m['role'] == 'system' %}{{ text(m) + '\n\n' }}"
        "{% else %}{{ '[INST] ' + text(m) + ' [/INST]' }}{% endif %}",
        "",
    ),
    "gemma": "{{ '<bos>' }}"
    + _turns(
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + text(m) | trim"
        " + '<end_of_turn>\n' }}",
        "{{ '<start_of_turn>model\n' }}",
    ),
    "marked": _turns(
        "{{ '<|im_start|>' + m['role'] + '\n' }}" + MARKED + "{{ text(m) }}{{ '<|im_end|>' }}{% endif %}{{ '\n' }}",
        CHATML_OPEN,
    ),
}

# as models that think have it: what they thought is left out of earlier turns
REWRITING = _turns(
    "{% set said = text(m) %}{% if m['role'] == 'assistant' and not loop.last %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}",
    CHATML_OPEN,
)

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|tail|>", "<|eot|>", "<s>", "</s>", "[INST]"]

SPECIAL += ["[/INST]", "<bos>", "<start_of_turn>", "<end_of_turn>"]


def templated(tokenizer, template=None):
    """A processor with one of these templates, by name or as written; the embedded one without."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL}, replace_extra_special_tokens=False)
    return make_processor(tokenizer, chat_template=TEMPLATES.get(template, template))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def picture(color="red"):
    return Image.new("RGB", (20, 10), color)


SYSTEM = {"role": "system", "content": "be brief."}

TALK = [
    user("what?"),
    assistant("a red square"),
    user("and where?"),
    assistant("left"),
    user("sure?"),
    assistant("yes"),
]

# one picture and three answers, two pictures and a system turn, text alone, one answer
CONVERSATIONS = [
    {"images": [picture()], "messages": TALK},
    {"images": [picture("blue"), picture("green")], "messages": [SYSTEM, *TALK[2:]]},
    {"images": [], "messages": [user("hello?"), assistant("hi there"), user("who is it?"), assistant("it is me")]},
    {"images": [picture()], "messages": TALK[:2]},
]


def parts(*texts):
    """A content of parts, `None` for a picture."""
    return [{"type": "text", "text": text} if text else {"type": "image", "text": None} for text in texts]


# pictures in later turns: with and without one in the first, two at once, between words
LATER = [
    {
        "images": [picture("red"), picture("blue")],
        "messages": [
            user(parts(None, "what?")),
            assistant(parts("a red square")),
            user(parts("and", None, "this?")),
            assistant(parts("a blue one")),
            user(parts("sure?")),
            assistant(parts("yes")),
        ],
    },
    {
        "images": [picture("green"), picture("black"), picture("white")],
        "messages": [
            user(parts("hello?")),
            assistant(parts("hi there")),
            user(parts(None, None, "which?")),
            assistant(parts("left")),
            user(parts(None, "where?")),
            assistant(parts("right")),
        ],
    },
    {
        "images": [],
        "messages": [user(parts("who?")), assistant(parts("me")), user(parts("why?")), assistant(parts("so"))],
    },
]


def as_row(row):
    """A row of `messages` as it comes from a file with `multi_turn: whole`."""
    messages = row["messages"]
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return {"images": row["images"], "prompt": messages[:first], "completion": messages[first:]}


def expanded(row):
    """A row of `messages` as it comes with `multi_turn: expand`."""
    messages = row["messages"]
    return [
        {"images": shown(messages[:i], row["images"]), "prompt": messages[:i], "completion": [message]}
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def shown(messages, images):
    """The pictures of the first turns: all of them where these are texts."""
    if isinstance(messages[0]["content"], str):
        return images
    return images[: sum(part["type"] == "image" for message in messages for part in message["content"])]


def rows_of(rows, messages=MESSAGES):
    """A `datasets.Dataset` of rows with `images` and columns of messages."""
    features = {name: messages for name in rows[0] if name != "images"}
    return Dataset.from_list(rows, features=Features({"images": List(ImageFeature()), **features}))
