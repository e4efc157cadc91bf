"""How many document evaluations does a search need? Against Algorithm 1 as it is printed.

    $ python tests/experiments/search_speed.py --jobs 12 --out out/speed            # an H100, 8 minutes

Every method is a run of search.py for each seed, with the same bounds, documents and first population (the published
operators make their own); other flags go to search.py. A method has caught up when its best perplexity is at most the
final one of algorithm 1 with the same seed. In --out: a directory for each run, speed.json, speed.png.
"""
import argparse
import contextlib
import json
import math
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np

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


METHODS = {  # name: (flags of search.py, what stands in for its functions)
    "algorithm 1": (["--screening", "1"], {}),
    "published operators": (["--screening", "1"], {"mutate": published_mutate, "crossover": published_crossover}),
    "screening": ([], {}),
    "8 parents": (["--num-parents", "8", "--num-mutations", "5", "--num-crossovers", "3", "--iterations", "160"], {})}


def run(task):
    """One search -> after every candidate document evaluations so far and the best perplexity, (N,) each; the record"""
    out, method, seed, flags = task
    where, (more, replaced) = out / f"{method.replace(' ', '-')}-{seed}", METHODS[method]
    where.mkdir(parents=True, exist_ok=True)
    with (mock.patch.multiple(search, **{"mutate": search.mutate} | replaced), open(where / "log.txt", "w") as log,
          contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)):
        search.main(["--seed", str(seed), "--out", str(where), *more, *flags])
    rows = [row for row in map(json.loads, (where / "history.jsonl").read_text().splitlines()) if "genes" in row]
    return (np.cumsum([len(row["nll"]) for row in rows]), np.fmin.accumulate([row["ppl"] for row in rows]),
            json.loads((where / "rope.json").read_text())["search"])


def report(method, runs, reference):
    """A row of speed.json: a method's medians over the seeds, and every seed."""
    seeds = [{"seed": record["seed"], "document_evaluations": int(read[-1]), "perplexity": float(best[-1]),
              "unseen_perplexity": record["comparison"][-1]["unseen"],
              "caught_up_after": next((int(n) for n, ppl in zip(read, best) if ppl <= goal[-1] * (1 + 1e-12)), None)}
             for (read, best, record), (_, goal, _) in zip(runs, reference)]
    caught = statistics.median(seed["caught_up_after"] or math.inf for seed in seeds)
    share = caught / statistics.median(int(read[-1]) for read, _, _ in reference)
    medians = {key: statistics.median(seed[key] for seed in seeds) for key in list(seeds[0])[1:4]}
    return {"method": method, **medians, "runs": seeds} | (
        {"caught_up_after": caught, "share_of_all": share} if caught < math.inf else {})


def plot(found, path):
    """The median over the seeds of the best perplexity so far, against document evaluations."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for (method, runs), color in zip(found.items(), ("black", "#999999", "#D55E00", "#CC79A7")):
        x = np.unique(np.geomspace(50, max(read[-1] for read, _, _ in runs), 400).astype(int))
        best = np.median([np.interp(x, read, best, left=np.nan) for read, best, _ in runs], axis=0)
        ax.plot(x, best, label=method, color=color, lw=2)
    ax.set(xscale="log", xlabel="document evaluations", ylabel="best perplexity, median of the seeds")
    ax.legend()
    fig.savefig(path, dpi=120)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    p.add_argument("--jobs", type=int, default=1, help="searches at a time on one device (default: 1)")
    p.add_argument("--out", type=Path, default=Path("out/speed"))
    args, flags = p.parse_known_args()
    tasks = [(args.out, method, seed, flags) for method in METHODS for seed in args.seeds]
    found = {}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        for task, result in zip(tasks, pool.map(run, tasks)):
            found.setdefault(task[1], []).append(result)
    rows, record = [report(*item, found["algorithm 1"]) for item in found.items()], found["algorithm 1"][0][2]
    write_json(args.out / "speed.json", {"flags": flags, "seeds": args.seeds, "documents": record["data"], **{
        key: record[key] for key in ("target_length", "model", "python", "torch", "device")}, "rows": rows})
    plot(found, args.out / "speed.png")
    print(*({key: value for key, value in row.items() if key != "runs"} for row in rows), sep="\n")


if __name__ == "__main__":
    main()
