"""Facts of a student to publish, and what a folder holds."""

from llava_mod_hf.publishing.card import CardFacts

REPO = "me/tiny"
RESULTS = {
    "exact_match": 0.931,
    "exact_match_by_kind": {"yes/no": 0.902, "color": 0.993, "shape": 0.954},
    "hallucination_rate": 0.104,
    "miss_rate": 0.056,
    "balanced_accuracy": 0.92,
    "kl_to_teacher": 0.127,
    "params_total": 312345,
    "params_active": 212345,
}
FACTS = CardFacts(
    repo_id=REPO,
    stage="mimic_sparse",
    license="mit",
    base_models={"language model": "embedded:language-model"},
    teachers=["someone/teacher"],
    datasets=["easy-VQA"],
    eval_dataset="easy-VQA",
    results=RESULTS,
    teacher_results={"exact_match": 0.978, "exact_match_by_kind": {"color": 0.999}, "kl_to_teacher": None},
    blind_results={"exact_match": 0.333, "hallucination_rate": None},
    recipe_text="learning_rate: 1.0e-3\nnum_experts: 4\n",
)


def tree(folder):
    """`{path: bytes}` of the files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
