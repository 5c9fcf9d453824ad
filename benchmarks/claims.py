"""
Tests the claims of `claims.yaml` in the world of scenes, and writes what came out.

    python benchmarks/claims.py                                # all; goes on where it was cut off
    python benchmarks/claims.py --only noise --seeds 0 1 --jobs 2
    python benchmarks/claims.py --device cuda --jobs 14 --runs /tmp/claims --minutes 9
    python benchmarks/claims.py --page docs/claims.md             # the page, from the results that are there

Checkpoints and answers are under `--runs`; `--results` gets a JSON file per claim, with the figures of each seed.
"""

import argparse
import json
import sys
from pathlib import Path

import yaml
from claims_arms import answers_of, arm_of
from claims_graph import run_all, with_inputs
from claims_page import write_page
from claims_statistics import figures_of

HERE = Path(__file__).resolve().parent

VALIDATION_ROWS = 1000


def read_claims(path=HERE / "claims.yaml"):
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def test_rows(plan, name):
    """How many test rows a claim is judged on."""
    return plan["claims"][name].get("test_rows", plan["test_rows"])


def arms_of(plan, name):
    """`[(point, arm name, factors)]` of a claim: every arm at every point of `vary`."""
    claim = plan["claims"][name]
    return [
        (point, arm, {**factors, **changes})
        for point, factors in claim["vary"].items()
        for arm, changes in claim["arms"].items()
    ]


def with_rate(factors, rate):
    """Factors of an arm with another learning rate: of its preference stage, if it has one."""
    if "prefer" in factors:
        return {**factors, "prefer": {**factors["prefer"], "learning_rate": rate}}
    return {**factors, "learning_rate": rate}


def picks_rate(claim, factors):
    """Whether an arm's learning rate is picked; where preferences are claimed, that of their stage alone."""
    preferring = any("prefer" in changes for changes in claim["arms"].values())
    return "learning_rates" in claim and ("prefer" in factors) == preferring


def validation_arms(plan, name):
    """`{arm: {learning rate: Arm}}` of a claim that picks them, at the first point of `vary`."""
    claim = plan["claims"][name]
    point = next(iter(claim["vary"]))
    return {
        arm: {
            rate: arm_of(plan["centre"], plan["validation_seed"], **with_rate(factors, rate))
            for rate in claim["learning_rates"]
        }
        for at, arm, factors in arms_of(plan, name)
        if at == point and picks_rate(claim, factors)
    }


def kept_results(results, name):
    """What is known of a claim from before: also from another machine, whose checkpoints are not here."""
    path = Path(results) / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"picked": [], "runs": []}


def picked_rates(plan, name, root, results):
    """`{arm: …}`: learning rate of the best validation score; nothing of arms that have not run."""
    found, measure = {}, plan["claims"][name].get("picked_by", "exact_match")
    before = {each["arm"]: each for each in kept_results(results, name)["picked"]}
    for arm, tried in validation_arms(plan, name).items():
        nodes = {rate: each.validation(VALIDATION_ROWS) for rate, each in tried.items()}
        keys = [node.key for node in nodes.values()]
        if before.get(arm, {}).get("keys") == keys:
            found[arm] = before[arm]
        elif all(node.is_done(root) for node in nodes.values()):
            scores = {rate: figures_of(root / node.key)[measure] for rate, node in nodes.items()}
            found[arm] = {"arm": arm, "learning_rate": max(scores, key=scores.get), "validation": scores, "keys": keys}
    return found


def final_nodes(plan, name, seeds, root, results):
    """
    `{(point, arm, seed): (Node, Arm, Node or None)}` of what is measured, as far as learning rates are picked: the
    student's answers, how it comes to be, and its teacher's answers to the same rows.
    """
    picked, found = picked_rates(plan, name, root, results), {}
    rows = {"rows": test_rows(plan, name)}
    for seed in seeds:
        for point, arm, factors in arms_of(plan, name):
            picks = picks_rate(plan["claims"][name], factors)
            if not picks or arm in picked:
                chosen = with_rate(factors, picked[arm]["learning_rate"]) if picks else factors
                built = arm_of(plan["centre"], seed, **chosen)
                teacher = None if built.loss == "labels" else answers_of(built.teacher_node(), seed, **rows)
                found[point, arm, seed] = (built.answers(**rows), built, teacher)
    return found


def nodes_left(plan, names, seeds, root, results, points=None, arms=None):
    """What can be run now: validation of rates that are not picked, and what has no result; teachers first."""
    known_arms = [arm for name in names for arm in plan["claims"][name]["arms"]]
    known_points = [point for name in names for point in plan["claims"][name]["vary"]]
    for given, known in ((points, known_points), (arms, known_arms)):
        if unknown := [each for each in given or () if each not in known]:
            raise ValueError(f"There is no `{unknown[0]}` in the plan: give some of {'; '.join(dict.fromkeys(known))}.")
    teachers, others = [], []
    for name in names:
        picked, kept = picked_rates(plan, name, root, results), kept_results(results, name)["runs"]
        for arm, tried in validation_arms(plan, name).items():
            if arm not in picked and (not arms or arm in arms):
                others += [each.validation(VALIDATION_ROWS) for each in tried.values()]
        known = {each["key"]: "teacher" in each for each in kept}
        for (point, arm, _), (node, _, teacher) in final_nodes(plan, name, seeds, root, results).items():
            if (points and point not in points) or (arms and arm not in arms):
                continue
            others += [] if node.key in known else [node]
            teachers += [] if teacher is None or known.get(node.key) else [teacher]
    return [*dict.fromkeys(teachers), *others]


def write_results(plan, names, seeds, root, results):
    """A JSON file per claim: every arm and seed that is there, and its teacher."""
    for name in names:
        entries = []
        for (point, arm, seed), (node, built, teacher) in final_nodes(plan, name, seeds, root, results).items():
            if not node.is_done(root):
                continue
            said = json.loads((root / built.model().key / "done.json").read_text())
            rate = (built.prefer or {}).get("learning_rate", built.learning_rate)
            entry = {"point": point, "arm": arm, "seed": seed, "key": node.key, "learning_rate": rate}
            entry |= {"figures": figures_of(root / node.key)}
            if teacher is not None and teacher.is_done(root):
                entry["teacher"] = figures_of(root / teacher.key)
            entries.append(entry | {name: said[name] for name in ("seconds", "device", "threads")})
        picked = list(picked_rates(plan, name, root, results).values())
        if entries or picked:
            results.mkdir(parents=True, exist_ok=True)
            found = {"claim": name, "test_rows": test_rows(plan, name), "picked": picked, "runs": entries}
            # of other seeds, or from another machine, as far as they were made by this plan
            planned = {node.key for node, *_ in final_nodes(plan, name, plan["seeds"], root, results).values()}
            kept = planned - {entry["key"] for entry in entries}
            found["runs"] += [each for each in kept_results(results, name)["runs"] if each["key"] in kept]
            (results / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE / "claims.yaml")
    parser.add_argument("--only", nargs="+", metavar="CLAIM", help="by default all")
    parser.add_argument("--points", nargs="+", metavar="POINT", help="of the claims' `vary`, by default all")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="by default all")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default the plan's")
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"), help="checkpoints and answers")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "claims", help="a JSON file per claim")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--minutes", type=float, help="after these nothing is begun any more")
    parser.add_argument("--page", type=Path, help="write the page from the results that are there, and run nothing")
    parser.add_argument("--count", action="store_true", help="say how many commands are left to run, and run nothing")
    args = parser.parse_args()
    plan = read_claims(args.plan)
    names = args.only or list(plan["claims"])
    unknown = [name for name in names if name not in plan["claims"]]
    if unknown:
        raise SystemExit(f"There is no claim `{unknown[0]}`: give some of {', '.join(plan['claims'])}.")
    if args.page:
        write_page(plan, names, args.results, args.page)
        return
    seeds = args.seeds or plan["seeds"]
    options = {"device": args.device, "jobs": args.jobs, "threads": args.threads}

    def nodes():
        return nodes_left(plan, names, seeds, args.runs, args.results, args.points, args.arms)

    if args.count:
        left = [node for node in with_inputs(nodes()) if not node.is_done(args.runs)]
        sys.stdout.write(f"{len(left)} commands are left to run.\n")
        return

    def keep(node):
        if node.command == "answers":  # what is known so far, should the run be cut off
            write_results(plan, names, seeds, args.runs, args.results)

    failed = run_all(nodes, args.runs, minutes=args.minutes, on_done=keep, **options)
    write_results(plan, names, seeds, args.runs, args.results)
    if failed:
        raise SystemExit(f"{len(failed)} commands failed: see the logs beside their folders in `{args.runs}`.")


if __name__ == "__main__":
    main()
