"""Perplexity of a model under several ropes at several lengths, on the same documents.

    $ python eval_ppl.py --rope none pi ntk yarn out/search-8192/rope.json --len 1024 2048 4096 8192
    $ torchrun --nproc-per-node 8 eval_ppl.py --model DIR --data books/ --len 32768 --stride 256

In --out: ppl.jsonl, a row for each rope and length, written as they are measured (the same command goes on where it was
stopped, also with more ropes and lengths); ppl.png, perplexity over length; ppl_position.png, perplexity over the
position in the window.
"""
import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from longrope import (ROPES, Journal, UserError, add_arguments, begin, data_hash, describe, forward_flops,
                      load_tokenizer, natural, perplexity, rank, read_documents, recorded, resolve_ropes, rope_to_dict,
                      run, say, sha256_of, share_sequences, spread, utilisation, warm_up, whole, window_nll, windows)

# ---------------------------------------------------------------------------------------------------------------------
# A window of T tokens is read at once; which of its tokens count is up to how windows are laid over a document.

BINS = 16  # of the window, for perplexity by position


def spans(tokens, length, stride):
    """The windows of a document: [(start, first)], of the window from `start` the tokens first .. length-1 are scored.

    Stride 0: the first window alone. Otherwise each window ends `stride` tokens after the one before, the last with
    the document, and scores what is new: every token once, save those that nothing predicts, a document's first and,
    where the stride is the length, each window's.
    """
    ends = [*range(length, tokens, stride), tokens] if stride else [length]
    return [(0, 1)] + [(end - length, max(1, length - (end - before))) for before, end in zip(ends, ends[1:])]


def anywhere(tokens, length, count, seed, bos=None):
    """`count` windows of a document, (length,) each: one from a random place in each of `count` equal parts of it, so
    that not only beginnings are measured, and each with BOS first, as the model was trained."""
    rng, text = random.Random(f"{seed} {length}"), length - (bos is not None)
    last = len(tokens) - text  # a window begins there at the latest
    starts = [int((i + rng.random()) * (last + 1) / count) for i in range(count)]
    front = tokens[:0] if bos is None else torch.tensor([bos])
    return [torch.cat((front, tokens[start:start + text])) for start in starts]


def nll_by_position(model, window, first):
    """Summed -log p and number of the tokens first .. T-1 of a window, by position in it: two (BINS,)."""
    nll, position = window_nll(model, window, first).numpy(), np.arange(first, len(window)) * BINS // len(window)
    return np.bincount(position, nll, minlength=BINS), np.bincount(position, minlength=BINS)


def measure(model, scored, args, advance):
    """A row's measurements: perplexity = exp(total NLL / total tokens) over windows [(tokens (T,), first), ...], dealt
    to torchrun's processes."""
    cuda = model.unembedding.is_cuda

    def one(task):
        found = *nll_by_position(model, *task), torch.cuda.max_memory_allocated() / 2**30 if cuda else 0
        advance()
        return found
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    results = spread(one, scored, args.context_parallel)
    seconds = time.perf_counter() - begun
    sums, counts = sum(r[0] for r in results), sum(r[1] for r in results)  # in the order of the documents
    length = len(scored[0][0])
    return {"tokens": int(counts.sum()), "nll": float(sums.sum()), "ppl": perplexity(sums, counts.sum()),
            "ppl_by_position": [perplexity([s], n) for s, n in zip(sums, counts)],
            "tokens_by_position": counts.tolist(), "seconds": round(seconds, 3),
            "tokens_per_s": round(len(scored) * length / seconds),
            "mfu": utilisation(forward_flops(model, length) * len(scored), seconds, model.unembedding.device),
            "peak_gib": round(max(r[2] for r in results), 2) or None}


# =====================================================================================================================
# Here the lesson ends. What follows is plumbing: documents, plots, arguments, the table.


def read_windows(args, lengths, model):
    """{length: (documents, stride, [(tokens, first), ...])}: what each row scores, the same for all ropes."""
    tokenizer = load_tokenizer(args.model)
    documents = read_documents(args.data, 5 * lengths[-1])
    if args.windows:  # of whole documents
        bos = model.config.hf.get("bos_token_id")
        bos, found = (bos[0] if isinstance(bos, list) else bos), []
        for _, text in documents:
            tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.long)
            if len(tokens) >= lengths[-1]:
                found.append(tokens)
            if len(found) == args.samples:
                break
        if not found:
            raise UserError(f"no document of {lengths[-1]} tokens; give longer documents (--data) or a shorter --len")
        return {n: (len(found), 0, [(w, 1) for d in found for w in anywhere(d, n, args.windows, args.seed, bos)])
                for n in lengths}
    total = args.doc_tokens or lengths[-1] + 10 * args.stride
    found = [tokens for _, tokens in windows(documents, tokenizer, total, args.samples)]
    strides = {n: args.stride or (n if args.doc_tokens else 0) for n in lengths}
    return {n: (len(found), stride, [(d[start:start + n], first) for d in found for start, first in
                                     spans(total, n, stride)]) for n, stride in strides.items()}


def plot(rows, path):
    """ppl.png, perplexity over length, and ppl_position.png, over the position with a panel for each length."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ropes, lengths = list(dict.fromkeys(r["rope"] for r in rows)), sorted({r["length"] for r in rows})
    colors = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00")  # colour-blind safe
    style = {rope: {"label": rope.removesuffix("/rope.json"), "color": colors[i % 7], "marker": "osD^vPX"[i % 7],
                    "ms": 4} for i, rope in enumerate(ropes)}
    over_length, ax = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for rope in ropes:
        mine = sorted((r for r in rows if r["rope"] == rope), key=lambda r: r["length"])
        ax.plot([r["length"] for r in mine], [r["ppl"] for r in mine], **style[rope])
    ax.set(xscale="log", yscale="log", xlabel="window (tokens)", ylabel="perplexity")
    ax.set_xticks(lengths, [f"{n}" for n in lengths])
    ax.minorticks_off()
    ax.legend()
    over_length.savefig(path / "ppl.png", dpi=120)

    over_position, panels = plt.subplots(1, len(lengths), figsize=(2 + 3.2 * len(lengths), 3.8), sharey=True,
                                         squeeze=False, layout="constrained")
    for ax, length in zip(panels[0], lengths):
        for row in (r for r in rows if r["length"] == length):
            middle = (np.arange(BINS) + 0.5) * length / BINS
            ax.plot(middle, [np.nan if p is None else p for p in row["ppl_by_position"]], **style[row["rope"]])
        ax.set(yscale="log", xlabel="position in the window (tokens)", title=f"window of {length}")
    panels[0][0].set_ylabel("perplexity")
    panels[0][0].legend()
    over_position.savefig(path / "ppl_position.png", dpi=120)
    plt.close("all")


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(p)
    p.add_argument("--rope", nargs="+", help=ROPES)
    p.add_argument("--len", type=natural, nargs="+", help="windows in tokens (default: 8 times the model's window)")
    p.add_argument("--samples", type=natural, default=10, help="documents (default: 10)")
    p.add_argument("--stride", type=whole, default=0,
                   help="tokens a sliding window moves by, 256 in the paper (default: 0, one window a document)")
    p.add_argument("--doc-tokens", type=natural,
                   help="tokens to read of each document, cut into windows one after another, or overlapping with "
                   "--stride (default: one window of --len; with --stride the longest --len and 10 strides)")
    p.add_argument("--windows", type=natural, metavar="N", help="instead N windows of each document from anywhere in "
                   "it, by the seed, with the model's BOS first if it has one")
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
    scored = read_windows(args, lengths, model)
    about = {n: {"documents": count, "windows": len(some), "stride": stride, "data_sha256": data_hash(
        t for window, first in some for t in (window, torch.tensor([first])))}
        for n, (count, stride, some) in scored.items()}

    journal = Journal(out / "ppl.jsonl", describe(model, load_tokenizer(args.model)), recorded(args))
    rows = []
    warm_up(model, lengths[-1])
    say(f"perplexity; s of pi, ntk and yarn is length / {model.window}, the model's window (yarn:16 fixes it); "
        "attention factor 1 for pi and ntk, 0.1 ln s + 1 for yarn")
    wide = max(len(name) for name, _ in ropes)
    say(f"{'rope':{wide}} {'length':>8} {'s':>6} {'documents':>9} {'tokens':>9} {'perplexity':>10} {'seconds':>9} "
        f"{'tokens/s':>9} {'MFU':>6} {'peak GiB':>8}")
    columns = {key: {"rope_sha256": sha256_of(rope_to_dict(rope)), "length": key[1], **about[key[1]]}
               for key, rope in ropes.items()}
    known = {key: next((r for r in journal.rows if c.items() <= r.items()), None) for key, c in columns.items()}
    left = sum(n * len(scored[n][2]) for (_, n), row in known.items() if not row)
    bar = tqdm(total=left, unit="token", unit_scale=True, disable=rank() > 0 or not left)
    for (name, length), rope in ropes.items():
        model.rope = rope
        if not (row := known[name, length]):
            row = {"rope": name, "scale": rope.scale} | columns[name, length] | measure(
                model, scored[length][2], args, lambda n=length: bar.update(n))
            journal.write(row)
        rows.append(row | {"rope": name})
        say(f"{name:{wide}} {length:8} {row['scale']:6.4g} {row['documents']:9} {row['tokens']:9} {row['ppl']:10.3f} "
            f"{row['seconds']:9.1f} {row['tokens_per_s']:9} {100 * (row['mfu'] or 0):5.1f}% "
            f"{row['peak_gib'] or '-':>8}")
    bar.close()
    if rank() == 0:
        plot(rows, out)
    say(f"wrote {out / 'ppl.jsonl'}, ppl.png and ppl_position.png")


if __name__ == "__main__":
    run(main)
