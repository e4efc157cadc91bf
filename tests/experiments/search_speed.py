"""How many document evaluations does a search need? Against Algorithm 1 as it is printed.

    $ python tests/experiments/search_speed.py --jobs 12 --out out/speed            # an H100, 8 minutes
    $ python tests/experiments/search_speed.py --seeds 0 --methods racing --out out/one --max-evals 300

Every method is one run of search.py for each seed, with the same bounds, documents, genes and first population (but the
published operators make their own, and n_hat is no gene of theirs); flags that are not known here go to search.py.
"algorithm 1" is --no-racing --screening 1. A method has caught up when its best perplexity on the search's documents is
at most the final one of algorithm 1 with the same seed: after how many evaluations of a document, as a share of all
that algorithm 1 makes, and of those after which it was there itself. Runs that are whole are not run again. In --out: a
directory for each run, speed.json, speed.png.
"""
import argparse
import contextlib
import io
import json
import math
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import search  # noqa: E402


def published_mutate(rng, parent, prob, space):
    """The released code's: genes are drawn anew again and again until the order holds; lambda alone, no n_hat."""
    factors = [1.0, *parent.factors, space.largest]
    while True:
        for i in range(1, len(factors) - 1):
            low, high = factors[i - 1], factors[i + 1]
            if rng.random() < prob and low <= high:
                factors[i] = search.draw(rng, low, high)
        if search.is_monotone(factors[1:-1]):
            return search.Individual(tuple(factors[1:-1]), parent.n_hat, parent.attention_factor, "mutation")


def published_crossover(rng, a, b):
    """The released code's: a child is done as soon as one gene differs and the order holds; else a mutant of `a`."""
    for _ in range(20):
        for i in range(len(a.factors)):
            if rng.random() < 0.3 and rng.random() < 0.5:
                factors = (*a.factors[:i], b.factors[i], *a.factors[i + 1:])
                if factors != a.factors and search.is_monotone(factors):
                    return search.Individual(factors, a.n_hat, a.attention_factor, "crossover")
    return published_mutate(rng, a, 0.3, search.Space((), max(a.factors), (), ()))


PRINTED = ["--no-racing", "--screening", "1"]  # as in the paper
METHODS = {  # name: (flags of search.py, what stands in for its functions)
    "algorithm 1": (PRINTED, {}),
    "published operators": (PRINTED, {"mutate": published_mutate, "crossover": published_crossover}),
    "racing": (["--screening", "1"], {}),
    "screening": (["--no-racing"], {}),
    "racing and screening": ([], {}),
    "the same, 8 parents": (["--num-parents", "8", "--num-mutations", "5", "--num-crossovers", "3",
                             "--iterations", "160"], {}),
}


def directory(out, method, seed):
    return out / f"{method.replace(' ', '-')}-{seed}"


def run(task):
    """One search, unless it was made before."""
    out, method, seed, flags = task
    where = directory(out, method, seed)
    whole = where / "whole"
    if whole.exists():
        if json.loads(whole.read_text()) != flags:
            raise SystemExit(f"{where} is of a search with other flags: take another --out")
        return
    more, patches = METHODS[method]
    with contextlib.ExitStack() as stack:
        for name, function in patches.items():
            stack.enter_context(mock.patch.object(search, name, function))
        where.mkdir(parents=True, exist_ok=True)
        log = stack.enter_context(open(where / "log.txt", "w"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        search.main(["--seed", str(seed), "--out", str(where), *more, *flags])
    whole.write_text(json.dumps(flags))


def progress(where):
    """(document evaluations so far, best perplexity so far), (N,) each, after every individual of a run."""
    lines = [json.loads(line) for line in (where / "history.jsonl").read_text().splitlines()[1:]]
    evaluations = np.cumsum([len(line["nll"]) for line in lines])
    return evaluations, np.fmin.accumulate([line["ppl"] or math.inf for line in lines])


def report(out, methods, seeds, flags):
    """speed.json's rows: a method's median over the seeds, and every seed."""
    rows = []
    for method in methods:
        runs = []
        for seed in seeds:
            evaluations, best = progress(directory(out, method, seed))
            unseen = json.loads((directory(out, method, seed) / "rope.json").read_text())["search"]["comparison"]
            goal_at, goal = progress(directory(out, "algorithm 1", seed))
            reached = np.flatnonzero(best <= goal[-1] * (1 + 1e-12))
            first = int(goal_at[np.flatnonzero(goal <= goal[-1] * (1 + 1e-12))[0]])
            runs.append({"seed": seed, "document_evaluations": int(evaluations[-1]), "perplexity": float(best[-1]),
                         "unseen_perplexity": unseen["rows"][-1]["unseen"],
                         "caught_up_after": int(evaluations[reached[0]]) if len(reached) else None,
                         "algorithm_1_was_there_after": first})
        caught = [r["caught_up_after"] or math.inf for r in runs]
        total = statistics.median(int(progress(directory(out, "algorithm 1", s))[0][-1]) for s in seeds)
        there = statistics.median(r["algorithm_1_was_there_after"] for r in runs)
        median = {key: statistics.median(r[key] for r in runs) for key in ("document_evaluations", "perplexity",
                                                                           "unseen_perplexity")}
        caught_up = statistics.median(caught)
        rows.append({"method": method, **median, "caught_up_after": caught_up if caught_up < math.inf else None,
                     "share_of_all": caught_up / total if caught_up < math.inf else None,
                     "share_of_there": caught_up / there if caught_up < math.inf else None, "runs": runs})
    record = json.loads((directory(out, methods[0], seeds[0]) / "rope.json").read_text())["search"]
    (out / "speed.json").write_text(json.dumps({
        "flags": flags, "seeds": seeds, "documents": record["data"], "target_length": record["target_length"],
        "model": record["model"], "versions": record["versions"], "rows": rows}, indent=1) + "\n")
    return rows


def plot(out, methods, seeds):
    """The median over the seeds of the best perplexity so far, against document evaluations."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for method, color in zip(methods, ("black", "#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7")):
        curves = [progress(directory(out, method, seed)) for seed in seeds]
        x = np.unique(np.geomspace(50, max(c[0][-1] for c in curves), 400).astype(int))
        best = [np.interp(x, at, b, left=np.nan) for at, b in ((c[0], c[1]) for c in curves)]
        ax.plot(x, np.median(best, axis=0), label=method, color=color, lw=2)
    ax.set(xscale="log", xlabel="document evaluations", ylabel=f"best perplexity, median of {len(seeds)} seeds")
    ax.legend()
    fig.savefig(out / "speed.png", dpi=120)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="default: all")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    p.add_argument("--jobs", type=int, default=1, help="searches at a time on one device (default: 1)")
    p.add_argument("--out", type=Path, default=Path("out/speed"))
    args, flags = p.parse_known_args(argv)
    methods = ["algorithm 1", *(m for m in args.methods if m != "algorithm 1")]
    tasks = [(args.out, method, seed, flags) for method in methods for seed in args.seeds]
    if args.jobs == 1:
        for task in tasks:
            run(task)
    else:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(run, tasks))
    rows = report(args.out, methods, args.seeds, flags)
    plot(args.out, methods, args.seeds)
    print(f"{'method':20} {'documents':>9} {'search ppl':>10} {'unseen ppl':>10} {'caught up':>9} {'of all':>7} "
          f"{'of those':>8}")
    for row in rows:
        caught, share, there = (row[k] for k in ("caught_up_after", "share_of_all", "share_of_there"))
        print(f"{row['method']:20} {row['document_evaluations']:9.0f} {row['perplexity']:10.3f} "
              f"{row['unseen_perplexity']:10.3f} {f'{caught:.0f}' if caught else 'never':>9} "
              f"{f'{share:.1%}' if caught else '-':>7} {f'{there:.1%}' if caught else '-':>8}")


if __name__ == "__main__":
    main()
