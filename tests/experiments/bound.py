"""Pass keys and perplexity of several factors side by side: by this was chosen how the slow pairs are bounded.

    $ python tests/experiments/variants.py --model DIR --rope out/search-65536/rope.json --least 9.5 --out out/least-9.5
    $ python tests/experiments/bound.py --model DIR --rope out/search-65536/rope.json out/least-9.5/bounded.json \\
          --len 65536 --data books/search --samples 6

A line for each: pass keys found (X) at 10 depths from start to end, perplexity of one window of each text, and that of
the window's quarters. Its lines for SmolLM2 are results/smollm2/bound.txt.
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from eval_passkey import ask, make_trials  # noqa: E402
from longrope import (  # noqa: E402
    add_arguments,
    begin,
    load_tokenizer,
    read_documents,
    resolve_rope,
    run,
    window_nll,
    windows,
)


@torch.inference_mode()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(p)  # --model, --data, --seed, which is that of the keys, and more
    p.add_argument("--rope", nargs="+", required=True, help="rope.json files, or names as in eval_ppl.py")
    p.add_argument("--len", type=int, required=True, help="tokens of a prompt and of a window")
    p.add_argument("--samples", type=int, default=6, help="texts (default: 6)")
    args = p.parse_args()
    model, tokenizer = begin(args), load_tokenizer(args.model)
    texts = windows(read_documents(args.data, 5 * args.len), tokenizer, args.len, args.samples)
    trials = make_trials(args.seed, [args.len], 10, 1)
    wide = max(map(len, args.rope))
    for name in args.rope:
        model.rope = resolve_rope(name, model, args.len)
        hits = "".join(".X"[ask(model, tokenizer, trial, by_generating=False)["hit"]] for trial in trials)
        nll = torch.stack([window_nll(model, w.tokens) for w in texts])  # (N, T-1)
        quarters = " ".join(f"{quarter.mean().exp():.1f}" for quarter in nll.chunk(4, 1))
        print(f"{name:{wide}} hits {hits} ppl {nll.mean().exp():.2f} quarters {quarters}", flush=True)


if __name__ == "__main__":
    run(main)
