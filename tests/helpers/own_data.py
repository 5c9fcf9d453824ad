"""A folder as a user has one: pictures, conversations in LLaVA's format, and pairs of answers."""

import json

from llava_mod_hf.data.scene_rows import load

SYSTEM = {"from": "system", "value": "you look at drawings of shapes, and answer shortly."}


def write_own_data(folder, conversations=(), pairs=(), *, rows=24):
    """
    Writes `train.json`, `test.json`, `preferences.json` and `pictures/` into a folder.

    Args:
        folder (`Path`).
        conversations, pairs (`list[dict]`, *optional*): rows that come first, of pictures `1.png` and `2.png`.
        rows (`int`, *optional*, defaults to 24): conversations beside them. One in four has a system turn, one two
            pictures, one none, and one is of several turns.
    """
    (folder / "pictures").mkdir(parents=True)
    scenes = load("describe", "train", 0, {"rows": rows})
    for number, scene in enumerate(scenes):
        scene["images"][0].save(folder / "pictures" / f"{number}.png")
    said = [scene["completion"][0]["content"] for scene in scenes]
    made = [conversation(number, said) for number in range(rows)]
    _write(folder / "train.json", [*conversations, *made[:-6]])
    _write(folder / "test.json", made[-6:])
    more = [
        {"image": f"{number}.png", "question": "describe the picture.", "chosen": said[number], "rejected": said[other]}
        for number, other in ((number, (number + 1) % rows) for number in range(8))
        if said[number] != said[other]
    ]
    _write(folder / "preferences.json", [*pairs, *more])


def conversation(number, said):
    """A row of LLaVA's format, of the kind that its number says."""
    answer, picture = {"from": "gpt", "value": said[number]}, f"{number}.png"
    asks = {"from": "human", "value": "<image>\ndescribe the picture."}
    row = {"id": number if number % 2 else f"row-{number}", "image": picture, "conversations": [asks, answer]}
    if number % 4 == 0:
        row["conversations"] = [SYSTEM, asks, answer]
    elif number % 4 == 1:
        first = {"from": "human", "value": "<image>\n<image>\ndescribe the first picture."}
        row |= {"image": [picture, f"{number - 1}.png"], "conversations": [first, answer]}
    elif number % 4 == 2:
        del row["image"]
        row["conversations"] = [{"from": "human", "value": "which shape has three corners?"}, answer]
    else:
        more = [{"from": "human", "value": "is there a red circle?"}, {"from": "gpt", "value": "no"}]
        row["conversations"] = [asks, answer, *more]
    return row


def _write(path, rows):
    path.write_text(json.dumps(rows, indent=1))
