"""Do a few pieces of a pass-key prompt tell ropes apart as whole prompts do?

    $ python tests/experiments/pieces.py --model DIR --len 65536 --rope ntk yarn SET.json ... --out out/pieces.json

For every rope: pass keys found of --keys whole prompts, and the answer's NLL over other keys in pieces of the prompts,
for several numbers and sizes of pieces; of each the rank correlation, over the ropes, with the keys found.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import eval_passkey  # noqa: E402
from longrope import load_model, load_tokenizer, resolve_rope, write_json  # noqa: E402


def ranks(x):
    return np.array([np.mean([(y < a) + 0.5 * (y == a) for y in x]) for a in x])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True)
    p.add_argument("--len", type=int, required=True)
    p.add_argument("--rope", nargs="+", required=True)
    p.add_argument("--keys", type=int, default=30)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    every, asked = torch.arange(args.len), {}

    def prompts_of(seed, count, number=eval_passkey.PIECES):
        return [eval_passkey.prompt_in_pieces(tokenizer, trial, number)
                for trial in eval_passkey.make_trials(seed, [args.len], count, 1)]
    whole = [(tokens, every, every, key) for tokens, _, _, key in prompts_of("whole", args.keys)]
    for number, size, count in ((9, 128, 5), (9, 256, 5), (9, 512, 5), (5, 512, 5), (17, 512, 5),
                                (9, 512, 3), (9, 512, 10), (9, 512, 30)):
        eval_passkey.piece_size = lambda length, size=size: size
        prompts = prompts_of("pieces", count, number)
        asked[f"{count} prompts, {number} pieces of {size}"] = prompts
    rows = []
    for name in args.rope:
        rope = resolve_rope(name, model, args.len)
        nll, found = eval_passkey.ask_in_pieces(model, rope, whole)
        rows.append({"rope": name, "found": found, "answer_nll": nll} | {
            key: eval_passkey.ask_in_pieces(model, rope, some)[0] for key, some in asked.items()})
        print({key: round(x, 3) if isinstance(x, float) else x for key, x in rows[-1].items()}, flush=True)
    found = ranks([row["found"] for row in rows])
    correlations = {key: -float(np.corrcoef(found, ranks([row[key] for row in rows]))[0, 1])
                    for key in ("answer_nll", *asked)}
    write_json(args.out, {"model": args.model, "len": args.len, "keys": args.keys, "rows": rows,
                          "rank_correlation": correlations})
    print(*correlations.items(), sep="\n")


if __name__ == "__main__":
    main()
