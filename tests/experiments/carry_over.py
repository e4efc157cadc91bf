"""A search's factors on another model: of other rotary pairs, theta or window.

    $ python tests/experiments/carry_over.py --model TARGET --rope SOURCE/rope.json --out out/carried/rope.json

lambda is taken for a function of the wavelength that a pair was trained with, 2 pi over its frequency: log lambda is
interpolated linearly in log wavelength and held beyond the ends, then rounded to 0.01 and kept in order. Wavelengths
are in tokens, with --windows in windows of their models: there a pair keeps its number of turns within the window. s,
n_hat and attention factors stay; so do short sets, up to as many windows. Of the source nothing but its rope.json is
needed. On the model that the search was for factors come out as they were, where they are multiples of 0.01 in order.
"""
import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from longrope import inv_freq_of, load_model, load_rope, resolve_rope, rope_to_dict, run, write_json  # noqa: E402


def carried(factors, source, target, windows):
    """Factors of the Rope `source` for the model that the Rope `target` is of."""
    old, new = (np.log(2 * math.pi / inv_freq_of(rope.trained.rescale_factors, rope.rope_theta))
                - math.log(rope.original_max_position_embeddings if windows else 1) for rope in (source, target))
    lambdas = np.divide(factors.rescale_factors, source.trained.rescale_factors)
    lambdas = np.maximum.accumulate(np.exp(np.interp(new, old, np.log(lambdas))).round(2))
    return replace(factors, rescale_factors=tuple(lambdas.tolist())).on(target.trained)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="directory of the target; its config.json is enough")
    p.add_argument("--rope", type=Path, required=True, help="rope.json found on the source")
    p.add_argument("--windows", action="store_true", help="wavelengths in windows (default: in tokens)")
    p.add_argument("--out", type=Path, required=True, help="rope.json of the target")
    args = p.parse_args()
    model, source = load_model(args.model, "config", device="meta"), load_rope(args.rope)
    long, short = (f and carried(f, source, model.config.rope, args.windows) for f in (source.long, source.short))
    short_max_length = round(source.short_max_length / source.original_max_position_embeddings * model.window)
    rope = replace(model.config.rope, long=long, scale=source.scale, short=short, short_max_length=short_max_length)
    write_json(args.out, rope_to_dict(resolve_rope(rope, model)))
    print(f"{args.out}: {rope.scale:g} times {model.window} tokens, long factors", *long.rescale_factors)


if __name__ == "__main__":
    run(main)
