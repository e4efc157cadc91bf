"""What does a search cost, and what does it find? Against Algorithm 1 as it is printed, on the same genes and bounds.

    $ python tests/experiments/search_speed.py --jobs 12 --data BOOKS --no-compile --out out/speed  # 2 H100, 5 minutes

Every method is a run of search.py for each seed, with a budget fixed beforehand; the first population of the small
generations is the beginning of Algorithm 1's (the published operators make their own). BOOKS: ten documents, of which
five are searched on. Other flags go to search.py. In --out: a directory for each run, speed.json, speed.png.
"""
import argparse
import contextlib
import itertools
import json
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import search  # noqa: E402
from longrope import write_json  # noqa: E402


def published_mutate(rng, parent, space):
    """The released code's: genes are drawn anew again and again until the order holds; lambda alone, no n_hat."""
    factors = [1.0, *parent.rescale_factors, space.largest]
    while True:
        for i in range(1, len(factors) - 1):
            if rng.random() < 0.3 and factors[i - 1] <= factors[i + 1]:
                factors[i] = search.draw(rng, factors[i - 1], factors[i + 1])
        if factors == sorted(factors):
            return replace(parent, rescale_factors=tuple(factors[1:-1]))


def published_crossover(rng, a, b):
    """The released code's: a child is done as soon as one gene differs and the order holds; else a mutant of `a`."""
    mine, others = a.rescale_factors, b.rescale_factors
    for i in 20 * [*range(len(mine))]:
        child = (*mine[:i], others[i], *mine[i + 1:])
        if rng.random() < 0.3 and rng.random() < 0.5 and child != mine and list(child) == sorted(child):
            return replace(a, rescale_factors=child)
    return published_mutate(rng, a, search.Space((), max(mine), (), ()))


promising = search.promising  # which the next one stands in for


def as_on_one_document(fitness, turns, *more):
    return promising(fitness, 1, *more)


PPL = ["--fitness", "ppl", "--attention-factor", "su"]  # and the genes of Algorithm 1
PAPER = [*PPL, "--screening", "1", "--samples", "5", "--population-size", "64", "--num-mutations", "16",
         "--num-crossovers", "16", "--num-parents", "32", "--iterations", "40"]
METHODS = {  # name: (flags of search.py, what stands in for its functions and numbers)
    "algorithm 1": (PAPER, {}),
    "published operators": (PAPER, {"mutate": published_mutate, "crossover": published_crossover}),
    "small generations, no screening": ([*PPL, "--screening", "1"], {}),
    "no doubt": (PPL, {"DOUBT": 0}),
    "documents not told apart": (PPL, {"promising": as_on_one_document}),
    "--fitness ppl": (PPL, {}),
    "--fitness ppl --slow-least 1.19": ([*PPL, "--slow-least", "1.19"], {}),
    "default": ([], {})}


def run(task):
    """One search -> the tokens that went through the model before the table at the end; rope.json's record."""
    out, method, seed, flags = task
    where, (more, replaced) = out / f"{method.replace(' ', '-')}-{seed}", METHODS[method]
    where.mkdir(parents=True, exist_ok=True)
    spent, measure, compare = {"now": 0}, search.measure, search.Evaluator.compare
    if not (where / "spent.json").exists():  # else it is done
        def counted(model, rope, item):
            spent["now"] += sum(len(kept) for _, kept, _ in item) if isinstance(item, list) else len(item)
            return measure(model, rope, item)

        def before_the_table(self, ropes, which, documents):
            spent.setdefault(which, spent["now"])
            return compare(self, ropes, which, documents)
        with (mock.patch.multiple(search, measure=counted, **replaced), open(where / "log.txt", "w") as log,
              mock.patch.object(search.Evaluator, "compare", before_the_table),
              contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)):
            search.main(["--seed", str(seed), "--out", str(where), *more, *flags])
        write_json(where / "spent.json", spent["table"])
    return json.loads((where / "spent.json").read_text()), json.loads((where / "rope.json").read_text())["search"]


def report(method, runs, reference):
    """A row of speed.json: a method's medians over the seeds, and every seed."""
    seeds = [{"seed": record["seed"], "tokens": tokens, "share_of_algorithm_1": tokens / goal[0],
              **{key: record["comparison"][-1][key] for key in ("search", "unseen", "keys")},
              "algorithm_1": goal[1]["comparison"][-1]["search"]} for (tokens, record), goal in zip(runs, reference)]
    return {"method": method, **{key: statistics.median(s[key] for s in seeds) for key in list(seeds[0])[1:]},
            "no_worse_in": sum(s["search"] <= s["algorithm_1"] for s in seeds), "runs": seeds}


def plot(rows, path):
    """A line for each method: the perplexity of the set that each seed found."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(8, 3.6), layout="constrained")
    ax = fig.subplots()
    for y, row in enumerate(rows):
        ax.plot([seed["search"] for seed in row["runs"]], [y] * len(row["runs"]), "o", alpha=0.6)
        ax.plot(row["search"], y, "|", color="black", ms=18)
    names = [f"{row['method']}\n{row['share_of_algorithm_1']:.1%} of the tokens" for row in rows]
    ax.set_yticks(range(len(rows)), names, size=8)
    ax.set(xlabel="perplexity on the documents searched on, each seed and the median", ylim=(len(rows) - 0.5, -0.5))
    fig.savefig(path, dpi=120)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--jobs", type=int, default=1, help="searches at a time on one device (default: 1)")
    p.add_argument("--out", type=Path, default=Path("out/speed"))
    args, flags = p.parse_known_args()
    gpus = [["--device", f"cuda:{i}"] for i in range(torch.cuda.device_count())] or [[]]
    methods = dict.fromkeys(["algorithm 1", *args.methods])  # it is what all are compared with
    tasks = [(args.out, method, seed, flags + gpus[i % len(gpus)])
             for i, (method, seed) in enumerate(itertools.product(methods, args.seeds))]
    found = {}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for task, result in zip(tasks, pool.map(run, tasks)):
            found.setdefault(task[1], []).append(result)
    rows, record = [report(*item, found["algorithm 1"]) for item in found.items()], found["algorithm 1"][0][1]
    write_json(args.out / "speed.json", {"flags": flags, "seeds": args.seeds, "documents": record["data"], **{
        key: record[key] for key in ("target_length", "model", "python", "torch", "device")}, "rows": rows})
    plot(rows, args.out / "speed.png")
    print(*({key: value for key, value in row.items() if key != "runs"} for row in rows), sep="\n")


if __name__ == "__main__":
    main()
