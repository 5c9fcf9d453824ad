"""An arm of a claim, and the commands that it is: one factor at a time from the centre that `claims.yaml` states."""

import dataclasses
from dataclasses import dataclass, field

from claims_graph import Node, read_recipe

from llava_mod_hf.data.scene_rows import SceneOptions

TEACHER, TOWER = "embedded:scenes-teacher", "embedded:scenes-vision-tower"

# teachers that need not be trained here: their recipes are what would be run
SHIPPED = {TEACHER: "scenes/0_teacher.yaml", "embedded:scenes-clean-teacher": "scenes/0_clean_teacher.yaml"}

VALIDATION_ROW = 50_000_000  # rows from here on are for validation


@dataclass(frozen=True)
class Arm:
    """
    How a student comes to be; `claims.yaml` has the defaults, under `centre`.

    Args:
        seed (`int`): of rows, weights and batches.
        rows, wrong_answers, wrong_kind: the training rows, as [`~llava_mod_hf.data.scene_rows.SceneOptions`].
        answered (`int`, *optional*): rows that have an answer, the first ones; by default all.
        loss (`str`): `kl`, `labels`, `both`, or `teacher_answers` (labels that the teacher wrote, greedily).
        divergence (`str`): of `kl` and `both`.
        teacher (`str`):
            `clean` of `teacher_rows` right rows, `ten_times` of ten times the student's rows, as often wrong, `equal`
            of as many, as often wrong; trained here, but for those that are embedded.
        teacher_rows (`int`): of `clean`.
        teacher_steps (`int`): of a teacher that is trained here.
        adapt_steps, dense_steps, sparse_steps (`int`): 0 leaves the stage out.
        learning_rate (`float`): of the dense and sparse stages.
        moe_layers (`list[str]`), num_experts, num_experts_per_tok: of the sparse stage.
        intermediate_size (`int`): of the student's language model, pretrained here if it is not the embedded one's.
        reference_compat (`list[str]`, *optional*): as the recipes'.
        cache_top_k (`int`, *optional*): train from a cache of so many tokens, the most likely.
        cache_num_samples (`int`, *optional*): train from a cache of so many tokens drawn.
        expert_rank (`int`, *optional*): of the sparse stage; by default experts are whole.
        after (`str`, *optional*): what is done to the finished student: `merged` back to a dense one, or `int8`.
        prefer (`dict`, *optional*): the preference stage: `pairs`, `prompts`, and options of the recipe.
    """

    seed: int
    rows: int
    wrong_answers: float
    wrong_kind: str
    loss: str
    divergence: str
    teacher: str
    teacher_rows: int
    teacher_steps: int
    adapt_steps: int
    dense_steps: int
    sparse_steps: int
    learning_rate: float
    moe_layers: tuple
    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    answered: int | None = None
    reference_compat: tuple | None = None
    cache_top_k: int | None = None
    cache_num_samples: int | None = None
    expert_rank: int | None = None
    after: str | None = None
    prefer: dict | None = field(default=None)

    def world(self, **changes):
        """Options of the rows."""
        options = {"rows": self.answered or self.rows, "wrong_answers": self.wrong_answers}
        return options | ({"wrong_kind": self.wrong_kind} if self.wrong_answers else {}) | changes

    # -- teachers

    def teacher_node(self):
        """Folder or name of the teacher."""
        world = {
            "clean": {"rows": self.teacher_rows},
            "ten_times": self.world(rows=10 * self.rows),
            "equal": self.world(rows=self.rows),
        }[self.teacher]
        steps = self.teacher_steps if self.teacher != "equal" else self.teacher_steps // 4
        for name, recipe in SHIPPED.items():
            made = read_recipe(recipe)
            if (SceneOptions(**made["world_options"]), made["max_steps"]) == (SceneOptions(**world), steps):
                return name
        language_model = Node("pretrain", "scenes/0_teacher_lm.yaml")
        options = {"vision_tower": TOWER, "language_model": language_model, "world_options": world}
        # rows of a seed that no student has
        return Node("pretrain", "scenes/0_teacher.yaml", options | {"max_steps": steps, "seed": 2000})

    # -- stages

    def adapted(self):
        language_model: str | Node = "embedded:scenes-student-lm"
        if self.intermediate_size != 128:
            config = {
                "model_type": "llama", "hidden_size": 64, "intermediate_size": self.intermediate_size,
                "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
                "max_position_embeddings": 512, "tie_word_embeddings": True, "initializer_range": 0.1,
            }  # fmt: skip
            language_model = Node("pretrain", "scenes/0_student_lm.yaml", {"text_config": config})
        options = {"dataset_options": self.world(), "seed": self.seed, "max_steps": self.adapt_steps}
        return Node("adapt", "scenes/1_adapt.yaml", options | {"language_model": language_model, "vision_tower": TOWER})

    def _data(self, loss):
        """Options that say which rows a stage reads."""
        if loss == "labels" or (loss != "teacher_answers" and self.answered is None):
            return {"dataset_options": self.world()}
        prompts = {"dataset_name": "embedded:scenes", "dataset_config": "prompts"}
        prompts |= {"dataset_options": {"rows": self.rows}, "max_new_tokens": 24, "batch_size": 256}
        answers = Node("generate-completions", None, prompts | {"model": self.teacher_node(), "seed": self.seed})
        return {"dataset_name": answers, "dataset_config": None, "dataset_options": {}}

    def _mimic(self, recipe, student, steps, loss, **more):
        weights = {"kl": (1, 0), "labels": (0, 1), "teacher_answers": (0, 1), "both": (1, 1)}[loss]
        options = {
            "student": student,
            "teacher": self.teacher_node() if weights[0] else TEACHER,
            "kl_weight": weights[0],
            "lm_weight": weights[1],
            "seed": self.seed,
            "max_steps": steps,
            "learning_rate": self.learning_rate,
            **self._data(loss),
            **more,
        }
        if weights[0] and self.divergence != "forward_kl":
            options["divergence"] = self.divergence
        if self.reference_compat:
            options["reference_compat"] = list(self.reference_compat)
        kept = {"top_k": self.cache_top_k} if self.cache_top_k else {"num_samples": self.cache_num_samples}
        if weights[0] and any(kept.values()):
            options["teacher_cache"] = Node("cache-teacher", recipe, options | kept)
        return Node("mimic", recipe, options)

    def dense(self):
        if not self.dense_steps:
            return self.adapted()
        return self._mimic("scenes/2_mimic_dense.yaml", self.adapted(), self.dense_steps, self.loss)

    def sparse(self):
        if not self.sparse_steps:
            return self.dense()
        experts = {"moe_layers": list(self.moe_layers)} if self.moe_layers else {}
        if experts:
            experts |= {"num_experts": self.num_experts, "num_experts_per_tok": self.num_experts_per_tok}
            experts |= {"expert_rank": self.expert_rank} if self.expert_rank else {}
        recipe = "scenes/3_mimic_sparse.yaml" if experts else "scenes/2_mimic_dense.yaml"
        return self._mimic(recipe, self.dense(), self.sparse_steps, self.loss, **experts)

    def model(self):
        """[`Node`] of the finished student."""
        finished = self._preferred() if self.prefer else self.sparse()
        return Node("export", None, {"model": finished, "form": "uniform"}) if self.after == "merged" else finished

    def _preferred(self):
        options = dict(self.prefer)
        pairs, prompts = options.pop("pairs"), options.pop("prompts", self.rows)
        before = self.sparse()
        # pictures of the training's skew that the student has not seen, and whose descriptions are right
        world = {"rows": prompts, "first_row": 1_000_000}
        if pairs in ("swapped", "added", "dropped"):
            data = {"dataset_name": "embedded:scenes", "dataset_config": "preferences"}
            data["dataset_options"] = world | {"rejected": pairs}
        else:
            who = before if pairs == "own" else self.teacher_node()
            sampling = {"temperature": 1.3, "num_answers": 4, "max_new_tokens": 24, "batch_size": 256}
            made = {"dataset_name": "embedded:scenes", "dataset_config": "describe", "dataset_options": world}
            scorer = {"scorer": "llava_mod_hf.data.scenes:score_by_truth"}
            node = Node("make-preferences", None, made | sampling | scorer | {"model": who, "seed": self.seed})
            data = {"dataset_name": node, "dataset_config": None, "dataset_options": {}}
        loss = options.pop("loss", "sigmoid")
        loss = "sft" if loss == "chosen" else loss  # supervised fine-tuning on the chosen side of the same pairs
        options["loss_type"] = loss if isinstance(loss, list) else [loss]
        options = {"loss_weights": [1.0], **options}
        shared = {"student": before, "seed": self.seed, **data}
        return Node("prefer", "scenes/4_prefer.yaml", {**shared, "teacher": self.teacher_node(), **options})

    def answers(self, **world):
        """[`Node`] of what the student says to test rows of its seed."""
        bits = {"bits": 8} if self.after == "int8" else {}
        return answers_of(self.model(), self.seed, **bits, **world)

    def validation(self, rows):
        """The same to rows of the training's kind that it has not seen, as often wrong; of preferences none is."""
        world = self.world(rows=rows, first_row=VALIDATION_ROW)
        if self.prefer:
            world["wrong_answers"] = 0.0
        return answers_of(self.model(), self.seed, split="train", **world)


def answers_of(model, seed, **world):
    """[`Node`] of what a model says to rows of the mixture."""
    return Node("answers", None, {"model": model, "seed": seed, **world})


def arm_of(centre, seed, **changes):
    """
    [`Arm`] that differs from the centre by `changes`.

    Raises:
        ValueError: if one of them is no factor.
    """
    known = {each.name for each in dataclasses.fields(Arm)}
    unknown = [name for name in {**centre, **changes} if name not in known]
    if unknown:
        raise ValueError(f"An arm has no `{unknown[0]}`: its factors are {', '.join(sorted(known))}.")
    return Arm(seed=seed, **{**centre, **changes})
