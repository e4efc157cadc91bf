"""Perplexity of a model under several ropes at several lengths, on the same documents.

    $ python eval_ppl.py --rope none pi ntk yarn out/search-8192/rope.json --len 1024 2048 4096 8192
    $ torchrun --nproc-per-node 8 eval_ppl.py --model DIR --data books/ --len 32768 --stride 256

In --out: ppl.json, a row for each rope and length, written as they are measured (the same command goes on where it was
stopped); ppl.png, perplexity over length; ppl_position.png, perplexity over the position in the window.
"""
import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from longrope import (
    NAMED,
    UserError,
    add_arguments,
    begin,
    data_hash,
    describe,
    forward_flops,
    is_named,
    load_tokenizer,
    rank,
    read_documents,
    read_json,
    resolve_rope,
    run,
    say,
    set_aside,
    spread,
    utilisation,
    warm_up,
    window_nll,
    windows,
    write_json,
)

ROPES = ("none, pi, ntk, yarn, yarn:16 (s fixed), model (its directory's rope.json, or else its config.json), config "
         "(config.json alone) or a rope.json (default: none pi ntk yarn, and model if it has a rope.json)")
BINS = 16  # of the window, for perplexity by position
SCALES = ("s of pi, ntk and yarn is length / {window}, the model's window (yarn:16 fixes it); "
          "attention factor 1 for pi and ntk, 0.1 ln s + 1 for yarn")
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00")  # colour-blind safe
MARKERS = "osD^vPX"


def spans(tokens, length, stride):
    """The windows of a document: [(start, first)], of the window from `start` the tokens first .. length-1 are scored.

    Stride 0: the first window alone. Otherwise each window ends `stride` tokens after the one before, the last with
    the document, and scores what is new: every token once, save those that nothing predicts, a document's first and,
    where the stride is the length, each window's.
    """
    ends = [*range(length, tokens, stride), tokens] if stride else [length]
    return [(0, 1)] + [(end - length, max(1, length - (end - before))) for before, end in zip(ends, ends[1:])]


def document_nll(model, tokens, length, stride, advance=lambda tokens: None):
    """Summed -log p and number of the tokens scored, by position in the window: two (BINS,)."""
    sums, counts = np.zeros(BINS), np.zeros(BINS, dtype=np.int64)
    for start, first in spans(len(tokens), length, stride):
        nll = window_nll(model, tokens[start:start + length], first).numpy()  # (length - first,)
        position = np.arange(first, length) * BINS // length
        sums += np.bincount(position, nll, minlength=BINS)
        counts += np.bincount(position, minlength=BINS)
        advance(length)
    return sums, counts


def measure(model, documents, length, stride, advance):
    """A row's measurements, the documents dealt to torchrun's processes."""
    device = model.unembedding.device
    cuda = device.type == "cuda"

    def one(tokens):
        sums, counts = document_nll(model, tokens, length, stride, advance)
        return sums, counts, torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    begun = time.perf_counter()
    results = spread(one, [d.tokens for d in documents])
    seconds = time.perf_counter() - begun
    read = work(documents, length, stride)
    sums, counts = sum(r[0] for r in results), sum(r[1] for r in results)  # in the order of the documents
    nll, tokens = float(sums.sum()), int(counts.sum())
    return {"documents": len(documents), "tokens": tokens, "stride": stride, "nll": nll, "ppl": perplexity(nll, tokens),
            "ppl_by_position": list(map(perplexity, sums.tolist(), counts.tolist())),
            "tokens_by_position": counts.tolist(), "seconds": round(seconds, 3),
            "tokens_per_s": round(read / seconds),
            "mfu": utilisation(forward_flops(model, length) * read / length, seconds, device),
            "peak_gib": round(max(r[2] for r in results), 2) or None}


def perplexity(nll, tokens):
    """exp(total NLL / total tokens), None of nothing."""
    return float(np.exp(nll / tokens)) if tokens else None


def percent(share):
    return f"{share:.1%}" if share else "-"


def work(documents, length, stride):
    """Tokens that go through the model for a row. A sliding window reads most of them many times."""
    return length * sum(len(spans(len(d.tokens), length, stride)) for d in documents)


# ---------------------------------------------------------------------------------------------------------------------
# What eval_passkey.py shares: ropes, the record of a measurement, rows kept over runs.


def resolve_ropes(names, lengths, model):
    """{(name, length): Rope}, all at once: a mistake in any shows before the first is measured."""
    own = ["model"] if (model.path / "rope.json").exists() else []
    return {(name, length): resolve_rope(None if name == "model" else name, model, length)
            for length in lengths for name in dict.fromkeys(names or [*NAMED, *own])}


def rope_columns(name, length, rope):
    """What a row is for; the hash tells what a rope.json now holds from what it held in an earlier run."""
    sha256 = hashlib.sha256(json.dumps(rope.to_dict()).encode()).hexdigest()[:16]
    return {"rope": name, "length": length, "scale": rope.scale, "rope_sha256": sha256}


def unchanged(rows, ropes):
    """Those of earlier rows that stand: without the rows, at any length, of a rope.json that has changed since."""
    now = {}
    for (name, length), rope in ropes.items():
        now.setdefault(name, set()).add(rope_columns(name, length, rope)["rope_sha256"])
    return [r for r in rows if is_named(r["rope"]) or r["rope_sha256"] in now.get(r["rope"], {r["rope_sha256"]})]


def earlier(path, setup, key):
    """The list `key` of what an earlier run wrote to `path` if its setup agrees, else none and the file moved aside."""
    def read(_):
        old = read_json(path) if path.exists() else {"setup": setup, key: []}
        if not (differs := [k for k in setup if old.get("setup", {}).get(k) != setup[k]]):
            return old[key]
        say(f"starting afresh, with another {', '.join(differs)}: {set_aside([path])}")
        return []
    return spread(read, [path])[0]  # the first process reads, all of them know


# ---------------------------------------------------------------------------------------------------------------------


def plot(rows, path):
    """ppl.png, perplexity over length, and ppl_position.png, over the position with a panel for each length."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ropes, lengths = list(dict.fromkeys(r["rope"] for r in rows)), sorted({r["length"] for r in rows})
    style = {rope: {"label": rope.removesuffix("/rope.json"), "color": COLORS[i % 7], "marker": MARKERS[i % 7], "ms": 4}
             for i, rope in enumerate(ropes)}
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
    p.add_argument("--len", type=int, nargs="+", help="windows in tokens (default: 8 times the model's window)")
    p.add_argument("--samples", type=int, default=10, help="documents (default: 10)")
    p.add_argument("--stride", type=int, default=0,
                   help="tokens a sliding window moves by, 256 in the paper (default: 0, one window a document)")
    p.add_argument("--doc-tokens", type=int,
                   help="tokens to read of each document, cut into windows one after another, or overlapping with "
                   "--stride (default: one window of --len; with --stride the longest --len and 10 strides)")
    p.add_argument("--bos", action="store_true", help="put the model's BOS first, if the tokenizer does not by itself")
    p.add_argument("--out", type=Path, help="directory of the result (default: out/ppl-LEN, LEN the longest)")
    return p


def main(argv=None):
    begun, args = time.perf_counter(), parser().parse_args(argv)
    model = begin(args)
    lengths = sorted(set(args.len or [8 * model.window]))
    out = args.out or Path(f"out/ppl-{lengths[-1]}")
    ropes = resolve_ropes(args.rope, lengths, model)
    total = lengths[-1] + 10 * args.stride if args.doc_tokens is None else args.doc_tokens
    if args.samples < 1 or lengths[0] < 2 or not 0 <= args.stride < lengths[0]:
        raise UserError("--samples must be at least 1, --len 2, --stride 0 or more and below the shortest --len")
    if total < lengths[-1]:
        raise UserError("--doc-tokens must be at least the longest --len")
    strides = {length: args.stride or (length if args.doc_tokens else 0) for length in lengths}
    bos = model.config.hf.get("bos_token_id") if args.bos else None
    if args.bos and not isinstance(bos, int):
        raise UserError(f"--bos: {args.model}: config.json names no bos_token_id")
    tokenizer = load_tokenizer(args.model)
    documents = windows(read_documents(args.data, 5 * total), tokenizer, total, args.samples, bos)

    setup = describe(model, args) | {"data": [d.document for d in documents], "data_sha256": data_hash(documents),
                                     "document_tokens": total, "stride": args.stride, "bos": args.bos}
    rows = unchanged(earlier(out / "ppl.json", setup, "rows"), ropes)
    wanted = {key: rope_columns(*key, rope) | {"stride": strides[key[1]]} for key, rope in ropes.items()}
    same = {key: next((r for r in rows if columns.items() <= r.items()), None) for key, columns in wanted.items()}

    warm_up(model, lengths[-1], begun)
    say("perplexity, " + (f"windows moving by {args.stride or 'their length'} over {total} tokens of each document"
                          if any(strides.values()) else "one window a document") + "; " +
        SCALES.format(window=model.window))
    wide = max(len(name) for name, _ in ropes)
    say(f"{'rope':{wide}} {'length':>8} {'s':>6} {'documents':>9} {'tokens':>9} {'perplexity':>10} {'seconds':>9} "
        f"{'tokens/s':>9} {'MFU':>6} {'peak GiB':>8}")
    left = sum(work(documents, length, strides[length]) for (_, length), row in same.items() if not row)
    bar, done = tqdm(total=left, unit="token", unit_scale=True, disable=rank() > 0 or not left), 0
    for (name, length), rope in ropes.items():
        row = same[name, length]
        if not row:
            model.rope = rope
            row = rope_columns(name, length, rope) | measure(model, documents, length, strides[length], bar.update)
            rows = [r for r in rows if (r["rope"], r["length"]) != (name, length)] + [row]
            done += work(documents, length, strides[length])
            bar.update(done - bar.n)  # what other processes did
            if rank() == 0:
                arguments = vars(args) | {"out": str(out)}
                write_json(out / "ppl.json", {"setup": setup, "arguments": arguments, "rows": rows})
        say(f"{name:{wide}} {length:8} {row['scale']:6.4g} {row['documents']:9} {row['tokens']:9} {row['ppl']:10.3f} "
            f"{row['seconds']:9.1f} {row['tokens_per_s']:9} {percent(row['mfu']):>6} {row['peak_gib'] or '-':>8}")
    bar.close()
    if rank() == 0:
        plot(rows, out)
    say(f"wrote {out / 'ppl.json'}, ppl.png and ppl_position.png")


if __name__ == "__main__":
    run(main)
