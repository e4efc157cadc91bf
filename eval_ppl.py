"""Perplexity of a model under several ropes at several lengths, on the same documents.

    $ python eval_ppl.py --rope none pi ntk yarn out/search-8192/rope.json --len 1024 2048 4096 8192
    $ torchrun --nproc-per-node 8 eval_ppl.py --model DIR --data books/test --len 32768 --stride 256

In --out: ppl.jsonl, a row for each rope and length (the same command goes on where it was stopped, also with more of
them); ppl.png, perplexity over length; ppl_position.png, over the position in the window.
"""
import random
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from longrope import (COLORS, ROPES, Journal, Parser, UserError, begin, data_hash, describe, few, forward_flops,
                      in_vocabulary, load_tokenizer, measured, natural, panels_of, perplexity, rank,
                      read_documents, recorded, resolve_ropes, run, say, share_sequences, spread, titles_of,
                      token_id, utilisation, warm_up, whole, window_nll, windows, world_size)

BINS = 16  # of the window, for perplexity by position


def spans(tokens, length, stride):
    """The windows of a document: [(start, first)], of the window from `start` the tokens first .. length-1 are scored.

    Stride 0: the first window alone. Otherwise each ends `stride` tokens after the one before, the last with the
    document, and scores what is new, save what nothing predicts: a document's first token and, where the stride is the
    length, each window's.
    """
    ends = [*range(length, tokens, stride), tokens] if stride else [length]
    return [(0, 1)] + [(end - length, max(1, length - (end - before))) for before, end in zip(ends, ends[1:])]


def anywhere(tokens, length, count, seed, bos=None):
    """`count` windows of a document, (length,) each, one from a random place in each of `count` equal parts of it, with
    BOS first, as the model was trained."""
    rng, text = random.Random(f"{seed} {length}"), length - (bos is not None)
    last = len(tokens) - text  # place for a window to begin
    starts = [int((i + rng.random()) * (last + 1) / count) for i in range(count)]
    front = tokens[:0] if bos is None else torch.tensor([bos])
    return [torch.cat((front, tokens[start:start + text])) for start in starts]


def nll_by_position(model, window, first):
    """Summed -log p and number of the tokens first .. T-1 of a window, by position in it: two (BINS,)."""
    nll, position = window_nll(model, window, first).numpy(), np.arange(first, len(window)) * BINS // len(window)
    return np.bincount(position, nll, minlength=BINS), np.bincount(position, minlength=BINS)


def measure(model, scored, together):
    """A row's measurements: perplexity = exp(total NLL / total tokens) over windows [(tokens (T,), first), ...]."""
    cuda = model.unembedding.is_cuda

    def one(window):
        found = *nll_by_position(model, *window), torch.cuda.max_memory_allocated() / 2**30 if cuda else 0
        bar.update()
        return found
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun, share = time.perf_counter(), scored[::world_size() // together]  # of the first process
    with tqdm(total=len(share), unit="window", leave=False, disable=rank() > 0) as bar:
        sums, counts, peaks = zip(*spread(one, scored, together))  # in the order of the documents
    seconds = time.perf_counter() - begun
    sums, counts, length = sum(sums), sum(counts), len(scored[0][0])
    return {"tokens": int(counts.sum()), "nll": float(sums.sum()), "ppl": perplexity(sums, counts.sum()),
            "ppl_by_position": [perplexity([s], n) for s, n in zip(sums, counts)],
            "tokens_by_position": counts.tolist(), "seconds": round(seconds, 3),
            "tokens_per_s": round(len(scored) * length / seconds),
            "mfu": utilisation(forward_flops(model, length) * len(scored), seconds, model.unembedding.device),
            "peak_gib": round(max(peaks), 2) or None}


# =====================================================================================================================
# Here the lesson ends. What follows is plumbing: documents, plots, arguments, the table.


def read_windows(args, lengths, model, tokenizer):
    """{length: (what a row says of its data, [(tokens, first), ...])}, the same for all ropes."""
    found, total = {}, args.doc_tokens or lengths[-1] + 10 * args.stride
    bos = token_id(model, "bos_token_id") if args.windows else None  # in front of each window
    documents = windows(read_documents(args.data, 5 * total), tokenizer, total - (bos is not None), args.samples,
                        cut=not args.windows)
    texts = [in_vocabulary(model, tokens) for _, tokens in documents]
    for n in lengths:
        stride = args.stride or (n if args.doc_tokens else 0)
        if args.windows:
            scored = [(window, 1) for text in texts for window in anywhere(text, n, args.windows, args.seed, bos)]
        else:
            scored = [(text[at:at + n], first) for text in texts for at, first in spans(total, n, stride)]
        sha256 = data_hash(t for window, first in scored for t in (window, torch.tensor([first])))
        found[n] = {"documents": len(texts), "windows": len(scored), "stride": stride, "data_sha256": sha256}, scored
    return found


def plot(rows, path):
    """Over length, and over the position, with a panel for each length."""
    from matplotlib.ticker import LogFormatter
    ropes, lengths = list(dict.fromkeys(r["rope"] for r in rows)), sorted({r["length"] for r in rows})
    over_length, (ax,) = panels_of(1, 4.7, 3.8)
    over_position, panels = panels_of(len(lengths), 3.2, 3.4, sharey=True)
    for i, (rope, title) in enumerate(titles_of(ropes).items()):
        style = {"label": title, "color": COLORS[i % 7], "marker": "osD^vPX"[(i + i // 7) % 7], "ms": 4}
        mine = sorted((r for r in rows if r["rope"] == rope), key=lambda r: r["length"])
        ax.plot([r["length"] for r in mine], [r["ppl"] for r in mine], **style)
        for panel, row in zip(panels, mine):
            ppl = [np.nan if p is None else p for p in row["ppl_by_position"]]
            panel.plot((np.arange(BINS) + 0.5) * row["length"] / BINS, ppl, **style)
    ax.set(xscale="log", yscale="log", xlabel="window (tokens)", ylabel="perplexity")
    ax.set_xticks(lengths, lengths, rotation=45)
    ax.set_xticks([], minor=True)
    ax.legend()
    for panel, length in zip(panels, lengths):
        panel.set(yscale="log", xlabel="position in the window (tokens)", title=f"window of {length}")
    for each in (ax, *panels):
        each.yaxis.set_major_formatter(LogFormatter())
        each.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 1)))
    over_position.supylabel("perplexity")
    panels[0].legend()
    over_length.savefig(path / "ppl.png", dpi=120)
    over_position.savefig(path / "ppl_position.png", dpi=120)


def parser():
    p = Parser(__doc__)
    p.add_argument("--rope", nargs="+", help=ROPES)
    p.add_argument("--len", type=natural, nargs="+", help="tokens in a window (default: 8 times the model's)")
    p.add_argument("--samples", type=natural, default=10, help="documents (default: 10)")
    p.add_argument("--stride", type=whole, default=0,
                   help="tokens a window moves by, 256 in the paper (default: no overlap; without "
                   "--doc-tokens the first window alone)")
    p.add_argument("--doc-tokens", type=natural, help="of each document, all scored at every length but the first "
                   "(without --stride of each window), in windows one after another or --stride apart (default: each "
                   "length's first window alone; with --stride the longest --len and 10 strides more)")
    p.add_argument("--windows", type=few, metavar="N",
                   help="N windows from anywhere in each document, BOS first, in place of its first tokens")
    p.add_argument("--out", type=Path, help="directory of the result (default: out/ppl-LEN, LEN the longest)")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    model = begin(args)
    lengths = sorted(set(args.len or [8 * model.window]))
    out = args.out or Path(f"out/ppl-{lengths[-1]}")
    share_sequences(model, args.context_parallel, lengths)
    ropes = resolve_ropes(args.rope, lengths, model)
    if lengths[0] < 2 or args.stride >= lengths[0] or args.doc_tokens and args.doc_tokens < lengths[-1]:
        raise UserError("--len must be at least 2, --stride below the shortest, --doc-tokens at least the longest")
    if args.windows and (args.stride or args.doc_tokens):
        raise UserError("--windows goes without --stride and --doc-tokens")
    tokenizer = load_tokenizer(model.path)
    data = read_windows(args, lengths, model, tokenizer)
    journal, rows = Journal(out / "ppl.jsonl", describe(model, tokenizer), recorded(args)), []
    warm_up(model, lengths[-1])
    say(f"s of the formulas: length / {model.window}, the model's window (yarn:16 fixes it)")
    wide = max(len(name) for name, _ in ropes)
    say(f"{'rope':{wide}}   length      s documents    tokens perplexity   seconds  tokens/s    MFU peak GiB")
    tasks = [{"length": n} | about for n, (about, _) in data.items()]

    def row_of(task):  # all processes share its windows
        return measure(model, data[task["length"]][1], args.context_parallel)
    for name, length, (row,) in measured(journal, model, ropes, tasks, row_of, world_size()):
        rows.append(row)
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        say(f"{name:{wide}} {length:8} {row['scale']:6.4g} {row['documents']:9} {row['tokens']:9} {row['ppl']:10.3f} "
            f"{row['seconds']:9.1f} {row['tokens_per_s']:9} {mfu:>6} {row['peak_gib'] or '-':>8}")
    if rank() == 0:
        plot(rows, out)
    say(f"wrote {out}")


if __name__ == "__main__":
    run(main)
