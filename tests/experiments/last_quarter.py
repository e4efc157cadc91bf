"""Does a model read far back? Perplexity of the last quarter of long windows, with all of the window before it or less.

    $ python tests/experiments/last_quarter.py --model DIR --rope model none --data books/test --len 131072

The same tokens are scored throughout: the last quarter of every whole window of --len tokens in the first --doc-tokens
of each document. Less context means windows of --context tokens that move by an eighth of it, so each token has at
least 7/8 of --context before it.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import longrope  # noqa: E402
from eval_ppl import spans  # noqa: E402
from longrope import load_tokenizer, perplexity, window_nll  # noqa: E402


def last_quarter(model, tokens, context):
    """-log p of the last quarter of `tokens`, each with about `context` tokens before it."""
    length, first = len(tokens), len(tokens) * 3 // 4
    if context == length:
        return window_nll(model, tokens, first).tolist()
    part = tokens[first - context * 7 // 8:]  # so that a window ends every eighth of it from `first` on
    found = [x for start, scored in spans(len(part), context, context // 8) for x in window_nll(
        model, part[start:start + context], max(scored, context * 7 // 8 - start)).tolist()]
    assert len(found) == length - first
    return found


def main():
    p = longrope.Parser(__doc__)
    p.add_argument("--rope", nargs="+", default=["model"], help="as eval_ppl.py's (default: model)")
    p.add_argument("--len", type=int, default=131072)
    p.add_argument("--doc-tokens", type=int, default=524288)
    p.add_argument("--context", type=int, nargs="+", default=[8192, 32768], help="each at most 3/4 of --len")
    p.add_argument("--samples", type=int, default=10)
    p.add_argument("--out", type=Path, default=Path("out/last-quarter.json"))
    args = p.parse_args()
    model, tokenizer, rows = longrope.begin(args), load_tokenizer(args.model), []
    texts = longrope.read_documents(args.data, 5 * args.doc_tokens)
    documents = longrope.windows(texts, tokenizer, args.doc_tokens, args.samples)
    found = [part for _, tokens in documents for part in tokens.split(args.len) if len(part) == args.len]
    print(f"perplexity of the last quarter of {len(found)} windows of {args.len}")
    for (name, context), rope in longrope.resolve_ropes(args.rope, {*args.context, args.len}, model).items():
        model.rope = rope
        nll = [x for tokens in found for x in last_quarter(model, tokens, context)]
        ppl, counts = perplexity(nll, len(nll)), {"windows": len(found), "tokens": len(nll)}
        rows.append({"rope": name, "context": context, **counts, "nll": sum(nll), "ppl": ppl})
        print(f"{name:40} context {context:7} {ppl:9.3f}", flush=True)
        longrope.write_json(args.out, {"setup": longrope.describe(model, tokenizer) | longrope.recorded(args),
                                       "documents": [name for name, _ in documents], "length": args.len, "rows": rows})


if __name__ == "__main__":
    longrope.run(main)
