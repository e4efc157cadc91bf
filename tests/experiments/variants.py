"""Ropes to compare a search's result with: formulas with its attention factor, and the result in part.

    $ python tests/experiments/variants.py --model DIR --rope out/search-65536/rope.json --out out/variants

Writes {pi,ntk,yarn}-su.json, for the length that the search was for and with sqrt(1 + ln s / ln L) in place of the
methods' own attention factor, and long.json, the long set at every length. With --least NUMBER bounded.json alone: no
factor below NUMBER where a pair makes no full turn within the window (LongRoPE2, arXiv 2502.20082, wants at least s).
With --second LEN {pi,ntk,yarn,yarn-su}.json alone: the formulas on top of a fine-tuned model's factors, as in the table
of search.py --init.
"""
import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from longrope import inv_freq_of, load_model, resolve_rope, rope_to_dict, run, su_factor, write_json  # noqa: E402
from search import formulas, second_stage  # noqa: E402


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="the model that was searched for")
    p.add_argument("--rope", type=Path, required=True, help="rope.json of a search")
    p.add_argument("--least", type=float, help="of the factors of pairs that make no full turn within the window")
    p.add_argument("--second", type=int, metavar="LEN", help="tokens that the formulas are for, on top of --rope")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    model = load_model(args.model, args.rope, device="meta")
    found, lambdas = model.rope, np.array(model.rope.long.rescale_factors)
    if args.second:
        problem = second_stage(found, args.second)
        made = {name: problem.put(factors, args.second) for name, factors in formulas(problem, args.second).items()}
    elif args.least:
        turns = model.window / (2 * math.pi) * inv_freq_of(np.ones(len(lambdas)), found.rope_theta)
        lambdas = np.where(turns < 1, np.maximum(lambdas, args.least), lambdas)
        made = {"bounded": replace(found, long=replace(found.long, rescale_factors=tuple(lambdas.tolist())))}
    else:
        made = {f"{name}-su": replace(found, long=replace(
            resolve_rope(f"{name}:{found.scale}", model).long, attention_factor=su_factor(found.scale, model.window)))
            for name in ("pi", "ntk", "yarn")} | {"long": replace(found, short=None, short_max_length=0)}
    for name, rope in made.items():
        write_json(args.out / f"{name}.json", rope_to_dict(rope))


if __name__ == "__main__":
    run(main)
