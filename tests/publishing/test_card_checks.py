"""What the Hub would refuse of a card is refused before anything is sent."""

import pytest

from llava_mod_hf.publishing.card_checks import check_card
from llava_mod_hf.publishing.checks import check_publishable

RESULT = """\
model-index:
- name: x
  results:
  - task: {type: image-text-to-text}
    dataset: {type: a/b, name: B}
    metrics:
    - {type: exact_match, value: %s}
"""


def write(metadata, body="# Student\n"):
    return f"---\n{metadata}---\n{body}"


@pytest.mark.parametrize(
    "text",
    [
        "# Without metadata\n",
        write("license: mit\nbase_model: [a/b, c]\nbase_model_relation: finetune\ndatasets: a/b\n"),
        write("license: [apache-2.0, openrail++]\n" + RESULT % "0.5"),
        write("license: mit\n", "```jinja\n{{ kept }}\n```\n![there](figures/losses.png) ![far](https://a.b/c.png)\n"),
    ],
)
def test_cards_that_the_hub_takes(folder, text):
    check_card(text, "README.md", folder=folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (write("license: [mit\n"), "are not valid YAML"),
        (write("- license\n"), "metadata of `README.md` cannot be read .*should be a dict"),
        (write("license: Apache 2.0\n"), "has the licence 'Apache 2.0': give the Hub's id"),
        (write("license: mit\nbase_model: runs/a/b\n"), "`base_model` 'runs/a/b', which is no id of the Hub"),
        (write("license: mit\ndatasets: [a/b, /home/me/rows]\n"), "`datasets` '/home/me/rows', which is no id"),
        (write("license: mit\nbase_model: a/b\nbase_model_relation: distilled\n"), "'distilled': give one of adapter"),
        (write("license: mit\n" + RESULT % ".nan"), "result `exact_match: nan`, which is no finite number"),
        (write("license: mit\n" + RESULT % "many"), "result `exact_match: many`, which is no finite number"),
        (write("license: mit\n", "# {{ name }}\n"), "has `{{ name }}`, a part of a template"),
        (write("license: mit\n", "![lost](figures/no.png)\n"), "shows `figures/no.png`, which is not there"),
    ],
)
def test_cards_that_it_would_not(folder, text, message):
    with pytest.raises(ValueError, match=message) as error:
        check_card(text, "README.md", folder=folder)
    assert "\n" not in str(error.value)


def test_a_folder_is_refused_for_its_card(folder):
    check_publishable(folder)
    (folder / "README.md").write_text(write("license: [mit\n"))
    with pytest.raises(ValueError, match="README.md` are not valid YAML"):
        check_publishable(folder)
    (folder / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no text in UTF-8"):
        check_publishable(folder)
