"""Ropes to compare a search's result with: formulas with its attention factor, and the result without its parts.

    $ python tests/experiments/variants.py --model DIR --rope out/search-65536/rope.json --out out/variants

Writes, each for the length that the search was for, {pi,ntk,yarn}-su.json: cos and sin multiplied by
sqrt(1 + ln s / ln L0) in place of the methods' own factor; lambda.json: n_hat 0 and no multiplier;
lambda-n_hat.json: no multiplier; long.json: the long set at every length. With --least NUMBER bounded.json alone: no
factor below NUMBER where a pair makes no full turn within the original window (LongRoPE2, arXiv 2502.20082, wants at
least s). With --times NUMBER ... NUMBER.json alone: the attention factors of both sets NUMBER times as large.
"""
import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from longrope import Rope, load_model, su_factor  # noqa: E402


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="the model that was searched for")
    p.add_argument("--rope", type=Path, required=True, help="rope.json of a search")
    p.add_argument("--least", type=float, help="of the factors of pairs that make no full turn within the window")
    p.add_argument("--times", type=float, nargs="+", help="of the attention factors")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    model = load_model(args.model, args.rope, device="meta")
    found = model.rope
    if args.least:
        turns = Rope.none(model.config.head_dim, found.rope_theta, model.window).turns(model.window)
        bounded = [max(factor, args.least) if times < 1 else factor
                   for factor, times in zip(found.rescale_factors, turns)]
        replace(found, rescale_factors=tuple(bounded)).save(args.out / "bounded.json")
        return
    if args.times:
        for times in args.times:
            short = found.short and replace(found.short, attention_factor=times * found.short.attention_factor)
            scaled = replace(found, attention_factor=times * found.attention_factor, short=short)
            scaled.save(args.out / f"{times}.json")
        return
    short = {"short": found.short, "short_max_length": found.short_max_length}
    for name in ("pi", "ntk", "yarn"):
        rope = getattr(Rope, name)(model.config.head_dim, found.rope_theta, model.window, found.scale)
        replace(rope, attention_factor=su_factor(found.scale, model.window), **short).save(args.out / f"{name}-su.json")
    replace(found, attention_factor=1.0).save(args.out / "lambda-n_hat.json")
    replace(found, attention_factor=1.0, n_hat=0).save(args.out / "lambda.json")
    replace(found, short=None).save(args.out / "long.json")


if __name__ == "__main__":
    main()
