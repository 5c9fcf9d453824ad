"""Which rows a command reads: its options alone, so that `--help` need not import what reads them."""

import json
from dataclasses import dataclass, field

CHOICES = {"multi_turn": ["whole", "expand"], "check_images": ["all", "header"], "bad_rows": ["error", "drop"]}


@dataclass
class DataArguments:
    """
    Which rows.

    Args:
        dataset_name (`str`):
            `embedded:scenes`, `embedded:easy-vqa`, a local `.json`, `.jsonl` or `.parquet` file, a folder of Parquet
            files, or a data set of the Hub. Its format is told by its columns: TRL's (`images` with `prompt` and
            `completion`, with `messages`, or with `prompt`, `chosen` and `rejected`), LLaVA's (`conversations`) or
            RLAIF-V's (`question`, `chosen`, `rejected`).
        dataset_config (`str`, *optional*): configuration of the data set, such as `questions` of the embedded one.
        dataset_options (`dict`, *optional*):
            Of `embedded:scenes`, as [`~llava_mod_hf.data.scene_rows.SceneOptions`]: how many rows, how skewed a world,
            what share of wrong answers; on the command line as JSON.
        dataset_train_split (`str`, *optional*, defaults to `"train"`).
        dataset_test_split (`str`, *optional*, defaults to `"test"`): what `evaluate` reads.
        image_folder (`str`, *optional*):
            Where relative image paths of a local file or folder start, by default there; none may leave it.
        max_samples (`int`, *optional*): take the first rows only.
        multi_turn (`str`, *optional*, defaults to `"whole"`):
            What becomes of a conversation. `"whole"`: one row and one pass, of which every answer is supervised,
            whatever the chat template; where the template writes earlier turns otherwise once others follow, a row for
            every answer all the same. `"expand"`: a row for every answer, with all that came before as its prompt,
            which is computed again for each; one that does not fit the context costs the later turns only.
        check_images (`str`, *optional*, defaults to `"all"`):
            `"all"` reads every image of a local file to its end; `"header"` its size and format only, and does not
            notice a truncated one. Either refuses decompression bombs and files that are missing or no images.
        bad_rows (`str`, *optional*, defaults to `"error"`):
            `"error"` stops at the first row that cannot be used; `"drop"` leaves such rows out and says which.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows when they are needed, in the file's order; training then needs `max_steps`.
    """

    dataset_name: str = field(
        metadata={"help": "embedded:scenes, embedded:easy-vqa, a local file or folder, or a data set of the Hub"}
    )
    dataset_config: str | None = None
    dataset_options: dict | str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    image_folder: str | None = None
    max_samples: int | None = None
    multi_turn: str = field(default="whole", metadata={"choices": CHOICES["multi_turn"]})
    check_images: str = field(default="all", metadata={"choices": CHOICES["check_images"]})
    bad_rows: str = field(default="error", metadata={"choices": CHOICES["bad_rows"]})
    streaming: bool = False

    def __post_init__(self):
        if isinstance(self.dataset_options, str):
            try:
                self.dataset_options = json.loads(self.dataset_options)
            except ValueError as error:
                raise ValueError(
                    f"`dataset_options` is `{self.dataset_options}`, which is no JSON ({error})."
                ) from error
        if self.dataset_options is not None and not isinstance(self.dataset_options, dict):
            raise ValueError(f"`dataset_options` is {self.dataset_options!r}: give options and their values.")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}: give one of {', '.join(known)}.")


@dataclass
class PromptArguments(DataArguments):
    """[`DataArguments`] of a command that answers prompts, of which each answer of a conversation has its own."""

    multi_turn: str = field(default="expand", metadata={"choices": ["expand"]})
