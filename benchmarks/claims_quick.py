"""
Tests three claims of `claims.yaml` on one seed, in minutes, and writes `claims.json`: differences on the same test
questions, with 95 % intervals by a paired bootstrap over them. Goes on where it was cut off.

    python benchmarks/claims_quick.py --seed 7 --out runs/claims-quick
    python benchmarks/claims_quick.py --seed 7 --out /tmp/short --share 0.02     # whether it runs; shows nothing
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

from claims import read_claims
from claims_arms import answers_of, arm_of
from claims_graph import run_all
from claims_statistics import read_answers

from llava_mod_hf.evaluation.intervals import figures, intervals

PREFERRED = "own samples, DPO + fine-tuning, teacher"

CHOSEN = "own samples, fine-tuning on the chosen"


def shortened(arm, share):
    """An arm with a share of the steps, at least one of each stage that there is, and of the prompts for pairs."""
    if share == 1:
        return arm
    stages = [name for name in ("adapt_steps", "dense_steps", "sparse_steps") if getattr(arm, name)]
    changes = {name: max(1, round(share * getattr(arm, name))) for name in stages}
    if arm.prefer:
        steps, prompts = max(1, round(share * arm.prefer["max_steps"])), max(64, round(share * arm.rows))
        changes["prefer"] = arm.prefer | {"max_steps": steps, "prompts": prompts}
    return dataclasses.replace(arm, **changes)


def planned(plan, seed, share=1.0):
    """`{name: Arm}`: what is compared, as `claims.yaml` has it; learning rates are those of `quick`."""
    quick, claims = plan["quick"], plan["claims"]
    (stages,) = claims["preference"]["vary"].values()
    factors = {
        "supervised": claims["noise"]["arms"]["supervised"],
        "distilled": {"teacher": "ten_times"},
        "distilled, clean teacher": {"teacher": "clean"},
        "before": stages,
        "preferred": {**stages, **claims["preference"]["arms"][PREFERRED]},
        "chosen": {**stages, **claims["preference"]["arms"][CHOSEN]},
    }
    found = {}
    for name, changes in factors.items():
        rate = quick["learning_rates"].get(name)
        if "prefer" in changes:
            changes = {**changes, "prefer": {**changes["prefer"], "learning_rate": rate}}
        elif rate:
            changes = {**changes, "learning_rate": rate}
        found[name] = shortened(arm_of(plan["centre"], seed, **changes), share)
    return found


def difference(claim, answers, measure, arm, against, recall=False):
    """One entry of `claims.json`; with `recall`, that of things found beside it, which may not fall."""
    differences = intervals(answers[arm], answers[against])
    found, low, high = differences[measure]
    entry = {
        "claim": claim, "measure": measure, "arm": arm, "against": against, "difference": found, "low": low,
        "high": high, "value": figures(answers[arm])[measure], "against_value": figures(answers[against])[measure],
    }  # fmt: skip
    entry["holds"] = low > 0
    if recall:
        found, low, high = differences["object_recall"]
        entry |= {"recall_difference": found, "recall_low": low, "recall_high": high}
        entry["holds"] = entry["high"] < 0 and low > -0.01
    return entry


def entries(answers):
    """What `claims.json` holds, of the answers of each model."""
    return [
        difference("distilled_over_supervised", answers, "exact_match", "distilled", "supervised"),
        difference(
            "distilled_over_supervised_clean_teacher", answers, "exact_match", "distilled, clean teacher", "supervised"
        ),
        difference("preference_lowers_hallucination", answers, "chair_s", "preferred", "before", recall=True),
        difference("preference_below_teacher", answers, "chair_s", "preferred", "teacher", recall=True),
        difference("preference_over_sft_on_chosen", answers, "chair_s", "preferred", "chosen", recall=True),
        difference("sft_on_chosen_lowers_hallucination", answers, "chair_s", "chosen", "before", recall=True),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="gets claims.json, and runs/ with checkpoints")
    parser.add_argument("--share", type=float, default=1.0, help="of the plan's steps and test rows")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread")
    args = parser.parse_args()
    plan, start = read_claims(), time.monotonic()
    arms = planned(plan, args.seed, args.share)
    rows = max(20, round(args.share * plan["quick"]["test_rows"]))
    nodes = {name: arm.answers(rows=rows) for name, arm in arms.items()}
    nodes["teacher"] = answers_of(arms["preferred"].teacher_node(), args.seed, rows=rows)
    root = args.out / "runs"
    failed = run_all(list(nodes.values()), root, jobs=args.jobs)
    if failed:
        raise SystemExit(f"{len(failed)} commands failed: see the logs beside their folders in `{root}`.")
    found = entries({name: read_answers(root / node.key) for name, node in nodes.items()})
    about = {"seed": args.seed, "share": args.share, "test_rows": rows}
    (args.out / "claims.json").write_text(json.dumps([entry | about for entry in found], indent=1), encoding="utf-8")
    for entry in found:
        recall = f"  things found {100 * entry['recall_difference']:+.1f}" if "recall_difference" in entry else ""
        sys.stdout.write(
            f"{entry['claim']:40}{entry['measure']:12}{100 * entry['difference']:+6.1f} "
            f"[{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]{recall}  {'holds' if entry['holds'] else 'no'}\n"
        )
    sys.stdout.write(f"{(time.monotonic() - start) / 60:.1f} minutes, {args.out / 'claims.json'}\n")


if __name__ == "__main__":
    main()
