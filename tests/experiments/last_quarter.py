"""Does a model read far back? Perplexity of the last quarter of long windows, with all of the window before it or less.

    $ python tests/experiments/last_quarter.py --model DIR --rope model none --data books/test --len 131072

The same tokens are scored throughout: the last quarter of every whole window of --len tokens in the first --doc-tokens
of each document. Less context means windows of --context tokens that move by an eighth of it, so each token has at
least 7/8 of --context before it.
"""
import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from eval_ppl import resolve_ropes, spans  # noqa: E402
from longrope import (  # noqa: E402
    UserError,
    add_arguments,
    begin,
    describe,
    load_tokenizer,
    read_documents,
    run,
    window_nll,
    windows,
    write_json,
)


def last_quarter(model, tokens, context):
    """Summed -log p of the last quarter of `tokens`, each with about `context` tokens before it."""
    length, first = len(tokens), len(tokens) * 3 // 4
    if context == length:
        return window_nll(model, tokens, first).sum().item()
    part = tokens[first - context * 7 // 8:]  # so that a window ends every eighth of it from `first` on
    total, count = 0.0, 0
    for start, scored in spans(len(part), context, context // 8):
        nll = window_nll(model, part[start:start + context], max(scored, context * 7 // 8 - start))
        total, count = total + nll.sum().item(), count + len(nll)
    assert count == length - first
    return total


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(p)
    p.add_argument("--rope", nargs="+", default=["model"], help="as eval_ppl.py's (default: model)")
    p.add_argument("--len", type=int, default=131072)
    p.add_argument("--context", type=int, nargs="+", default=[8192, 32768])
    p.add_argument("--doc-tokens", type=int, default=524288)
    p.add_argument("--samples", type=int, default=10)
    p.add_argument("--out", type=Path, default=Path("out/last-quarter.json"))
    args = p.parse_args()
    if args.len > args.doc_tokens or not all(8 <= n <= args.len * 3 // 4 or n == args.len for n in args.context):
        raise UserError("--context must be from 8 to 3/4 of --len, and --len at most --doc-tokens")
    model = begin(args)
    documents = windows(read_documents(args.data, 5 * args.doc_tokens), load_tokenizer(args.model), args.doc_tokens,
                        args.samples)
    found = [w for d in documents for w in d.tokens.split(args.len) if len(w) == args.len]
    tokens, rows = len(found) * (args.len - args.len * 3 // 4), []
    print(f"perplexity of {tokens} tokens, the last quarter of {len(found)} windows of {args.len}")
    for (name, context), rope in resolve_ropes(args.rope, {*args.context, args.len}, model).items():
        model.rope = rope
        nll = sum(last_quarter(model, w, context) for w in found)
        rows.append({"rope": name, "context": context, "windows": len(found), "tokens": tokens, "nll": nll,
                     "ppl": math.exp(nll / tokens)})
        print(f"{name:40} context {context:7} {rows[-1]['ppl']:9.3f}", flush=True)
        write_json(args.out, {"setup": describe(model, args), "documents": [d.document for d in documents],
                              "length": args.len, "rows": rows})


if __name__ == "__main__":
    run(main)
