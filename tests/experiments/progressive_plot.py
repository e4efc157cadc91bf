"""The picture and, on stdout, the table of the progressive run, from what progressive.sh left.

    $ python tests/experiments/progressive_plot.py results/progressive assets/progressive.png
"""
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

STAGES = (  # label, directory, rope, colour, line
    ("as trained", "0", "none", "#999999", "-"),
    ("searched for 32x", "0", "search-32x/rope.json", "#56B4E9", "--"),
    ("searched for 64x", "0", "search-64x/rope.json", "#E69F00", "--"),
    ("fine-tuned at 32x", "32x", "model", "#0072B2", "-"),
    ("fine-tuned at 64x", "64x", "model", "#D55E00", "-"),
    ("second stage, 512x", "64x", "search-512x/rope.json", "#009E73", "-"),
)


def rows(path, rope):
    """Those of a ppl.json or passkey.json whose rope's name ends so."""
    return [r for r in json.loads(path.read_text())["rows"] if r["rope"].endswith(rope)]


def keys_found(path, rope):
    """Two dictionaries from a passkey.json: hits and trials at each length, over all depths."""
    hits, trials = {}, {}
    for r in rows(path, rope):
        hits[r["length"]] = hits.get(r["length"], 0) + r["hits"]
        trials[r["length"]] = trials.get(r["length"], 0) + r["trials"]
    return hits, trials


def main(results, picture):
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(3, 2))
    for label, where, rope, color, line in STAGES:
        style = {"label": label, "color": color, "ls": line, "marker": "o", "ms": 4}
        ppl = {r["length"]: r["ppl"] for r in rows(results / f"ppl-{where}" / "ppl.json", rope)}
        # one window of 1024 tokens a book is little: many were measured apart, and up to there no long set is in use
        file, plain = {"0": ("short-books-0", "none"), "32x": ("short-books-32x", "model"),
                       "64x": ("short-books", "model")}[where]
        ppl[1024] = rows(results / file / "ppl.json", plain)[0]["ppl"]
        left.plot(list(ppl), list(ppl.values()), **style)
        hits, trials = keys_found(results / f"passkey-{where}" / "passkey.json", rope)
        right.plot(list(hits), [hits[n] / trials[n] for n in hits], **style)
        cells = [f"{ppl[n]:.1f}{f' ({hits[n]} of {trials[n]})' if n in hits else ''}" for n in sorted(ppl)]
        print("| " + " | ".join([label, *cells]) + " |")
    left.set(xscale="log", yscale="log", xlabel="window (tokens)", ylabel="perplexity")
    left.set_yticks([25, 50, 100, 200], ["25", "50", "100", "200"])
    left.legend(fontsize=8, loc="center", bbox_to_anchor=(0.42, 0.58))
    right.set(xscale="log", ylim=(-0.05, 1.05), xlabel="prompt (tokens)", ylabel="pass keys found")
    for ax in (left, right):
        ax.set_xticks([1024, 8192, 32768, 65536, 524288], ["1024", "8192", "32768", "", "524288"], fontsize=8)
        ax.minorticks_off()
    fig.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
