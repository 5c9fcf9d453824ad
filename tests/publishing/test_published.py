"""A student on the Hub, as somebody uses it who has transformers and not this package."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from transformers import pipeline

from helpers.hub_faults import Faults
from helpers.models import sharpen
from llava_mod_hf.data.easy_vqa import image_paths
from llava_mod_hf.publishing.push import push_checkpoint

REPO = "me/student"

SCRIPT = """
import json, sys
sys.modules["llava_mod_hf"] = None  # any import of the package fails from here on
{example}
given = answer(text={messages!r}, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
ours = [name for name in sys.modules if name.startswith("llava_mod_hf.")]
print(json.dumps([given, type(answer.model).__module__, ours]))
"""


@pytest.fixture
def messages():
    content = [{"type": "image", "path": str(image_paths("test")[0])}, {"type": "text", "text": "what color is it?"}]
    return [{"role": "user", "content": content}]


@pytest.mark.slow
def test_a_pipeline_loads_it_without_the_package(hub, make_student, processor, tmp_path, messages):
    sharpen(student := make_student()).save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    push_checkpoint(tmp_path / "student", REPO, tag="v1", private=True)
    HfApi().upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=REPO)  # later than the tag
    (tmp_path / "here").mkdir()
    hub.faults = Faults(0, kinds=("half", "slow"), steps={"resolve"}, share=0.5, most=3)
    page = (Path(__file__).parents[2] / "docs" / "sharing.md").read_text()
    _, example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    script = SCRIPT.format(example=example.replace("you/student", REPO), messages=messages)
    process = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=tmp_path / "here",
        env={
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "HF_HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONWARNINGS": "ignore",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    given, module, imported = json.loads(process.stdout.splitlines()[-1])
    here = pipeline("image-text-to-text", model=student, processor=processor)
    assert given == here(text=messages, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
    assert len(given) > 2 and module.startswith("transformers_modules.") and imported == []
    assert {kind for _, kind in hub.faults.done} == {"half", "slow"}
