"""Pass-key retrieval: a five-digit key hidden in filler text, asked for at the end (protocol of the LongRoPE paper).

    $ python eval_passkey.py --rope none pi ntk yarn out/search-8192/rope.json --len 1024 2048 4096 8192
    $ torchrun --nproc-per-node 8 eval_passkey.py --model DIR --rope yarn --len 131072 --trials 10 --generate

Two ways to score. Teacher-forced, the default, takes one forward pass: a hit if every token of the key is the argmax
given all before it, which is when greedy decoding begins with the key's tokens. --generate is the paper's: greedy
decoding, and the first number in the answer counts. In --out: passkey.json with every trial, written as they are made
(the same command goes on where it was stopped), and passkey.png, a heat map for each rope.
"""
import argparse
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from eval_ppl import ROPES, SCALES, earlier, resolve_ropes, rope_columns, unchanged
from longrope import (
    UserError,
    add_arguments,
    begin,
    describe,
    generate,
    load_tokenizer,
    rank,
    run,
    say,
    spread,
    warm_up,
    world_size,
    write_json,
)

TASK = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.\n")
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
ANSWER_TOKENS = 10  # decoded with --generate, as in the paper's code; more if the key itself has more


def make_prompt(tokenizer, length, depth, key, filler=None):
    """Token ids of a prompt with its answer, exactly `length` of them, and how many of the last are the key's.

    depth 0 puts the key line at the start of the filler, 1 at its end. The prompt is built by token count: the filler
    (token ids, by default the paper's sentences over and over) is cut in the middle of a sentence where it must be.
    Behind the key line the paper's sentences begin anew, a filler of one's own goes on.
    """
    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids
    first = tokenizer.encode("").ids  # what the tokenizer adds by itself, a BOS or nothing
    task, needle, question = first + encode(TASK), encode(NEEDLE.format(key=key)), encode(QUESTION)
    answer = encode(f"{QUESTION} {key}")
    if answer[:len(question)] != question:
        raise UserError("this tokenizer joins the question's end with the key, so no prompt ends before the key")
    newline = encode("\n")
    room = length - len(task) - len(needle) - len(answer) - 2 * len(newline)
    if room < 0:
        raise UserError(f"a pass-key prompt takes at least {length - room} tokens, not {length}: raise --len")
    before = round(depth * room)
    if filler:
        front, back = filler[:before], filler[before:room]
    else:
        sentences = encode(FILLER)
        sentences *= room // len(sentences) + 1
        front, back = sentences[:before], sentences[:room - before]
    tokens = task + front + newline + needle + back + newline + answer
    return tokens, len(answer) - len(question)


def make_trials(seed, lengths, depths, count):
    """Every trial of one rope. Keys come from the seed and the trial's place, so all ropes are asked for the same."""
    return [{"length": length, "depth": round(depth, 4), "trial": i,
             "key": str(random.Random(f"{seed} {length} {depth:.4f} {i}").randint(10_000, 99_999))}
            for length in lengths for depth in np.linspace(0, 1, depths).tolist() for i in range(count)]


@torch.inference_mode()
def teacher_forced(model, tokens, count):
    """The argmax at the places of the last `count` tokens, each given all the true ones before; their logits only."""
    hidden = model.hidden(torch.tensor(tokens, device=model.unembedding.device)[None])[0, -count - 1:-1]  # (count, C)
    return F.linear(hidden, model.unembedding).argmax(-1).tolist()


def ask(model, tokenizer, trial, by_generating):
    """The trial with its answer. `exact`: greedy decoding begins with the key's own tokens; `hit` is what counts."""
    tokens, count = make_prompt(tokenizer, trial["length"], trial["depth"], trial["key"])
    cuda = model.unembedding.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    if by_generating:  # the key's tokens end at --len; those after it do not change the set of factors
        eos = model.config.hf.get("eos_token_id")
        answer = generate(model, torch.tensor(tokens[:-count]), max(count, ANSWER_TOKENS), trial["length"],
                          stop=eos if isinstance(eos, list) else [eos])
    else:
        answer = teacher_forced(model, tokens, count)
    seconds = time.perf_counter() - begun
    text, exact = tokenizer.decode(answer), answer[:count] == tokens[-count:]
    number = re.search(r"\d+", text)
    hit = bool(number and number[0] == trial["key"]) if by_generating else exact
    return trial | {"answer": text, "hit": hit, "exact": exact, "seconds": round(seconds, 4),
                    "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None}


def summary(trials):
    """A row for trials of one rope and length (and depth)."""
    seconds = sum(t["seconds"] for t in trials)
    return {"trials": len(trials), "hits": sum(t["hit"] for t in trials), "exact": sum(t["exact"] for t in trials),
            "seconds": round(seconds, 3), "tokens_per_s": round(sum(t["length"] for t in trials) / max(seconds, 1e-4)),
            "peak_gib": max(t["peak_gib"] or 0 for t in trials) or None}


def rows_of(trials):
    """Rows of passkey.json: one for each rope, length and depth."""
    columns = ("rope", "length", "scale", "rope_sha256", "depth")
    cells = {}
    for t in trials:
        cells.setdefault(tuple(t[c] for c in columns), []).append(t)
    return [dict(zip(columns, cell)) | summary(mine) for cell, mine in cells.items()]


def plot(rows, scoring, path):
    """A panel for each rope: length across, depth down, accuracy as colour and number."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    ropes = list(dict.fromkeys(r["rope"] for r in rows))
    lengths, depths = sorted({r["length"] for r in rows}), sorted({r["depth"] for r in rows})
    fig, panels = plt.subplots(1, len(ropes), figsize=(1.6 + len(ropes) * (0.9 + 0.55 * len(lengths)), 4.2),
                               sharey=True, squeeze=False, layout="constrained")
    for ax, rope in zip(panels[0], ropes):
        accuracy = np.full((len(depths), len(lengths)), np.nan)
        for r in (r for r in rows if r["rope"] == rope):
            accuracy[depths.index(r["depth"]), lengths.index(r["length"])] = r["hits"] / r["trials"]
        image = ax.imshow(accuracy, vmin=0, vmax=1, cmap="cividis", aspect="auto")  # cividis: safe for the colour-blind
        for (y, x), a in np.ndenumerate(accuracy):
            if np.isfinite(a):
                ax.text(x, y, f"{a:.0%}", ha="center", va="center", size=7, color="black" if a > 0.5 else "white")
        ax.set_title(f"{rope.removesuffix('/rope.json')}\n{np.nanmean(accuracy):.0%}", size=10)
        ax.set_xticks(range(len(lengths)), lengths, rotation=90, size=8)
        ax.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], size=8)
    panels[0][0].set_ylabel("depth of the key")
    fig.supxlabel("prompt length (tokens)", size=10)
    fig.colorbar(image, ax=panels, label=f"accuracy, {scoring}")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(p, data=False)
    p.add_argument("--rope", nargs="+", help=ROPES)
    p.add_argument("--len", type=int, nargs="+", help="tokens of prompt and key (default: 8 times the model's window)")
    p.add_argument("--depths", type=int, default=10, help="places of the key, evenly from start to end (default: 10)")
    p.add_argument("--trials", type=int, default=1, help="keys for each length and depth (default: 1)")
    p.add_argument("--generate", action="store_true", help="the paper's scoring (default: teacher-forced)")
    p.add_argument("--out", type=Path, help="directory of the result (default: out/passkey-LEN, LEN the longest)")
    return p


def main(argv=None):
    begun, args = time.perf_counter(), parser().parse_args(argv)
    model = begin(args)
    tokenizer = load_tokenizer(args.model)
    lengths = sorted(set(args.len or [8 * model.window]))
    out = args.out or Path(f"out/passkey-{lengths[-1]}")
    ropes = resolve_ropes(args.rope, lengths, model)
    if min(args.depths, args.trials) < 1:
        raise UserError("--depths and --trials must be at least 1")
    trials = make_trials(args.seed, lengths, args.depths, args.trials)
    for t in trials[:args.depths * args.trials]:
        make_prompt(tokenizer, t["length"], t["depth"], t["key"])  # --len too short for its parts shows now
    if args.generate:
        model.check_length(lengths[-1] + ANSWER_TOKENS)
    scoring = "first number of greedy decoding" if args.generate else "teacher-forced"
    setup = describe(model, args) | {"scoring": scoring, "depths": args.depths, "seed": args.seed}
    todo = {(name, length): [rope_columns(name, length, rope) | t for t in trials if t["length"] == length]
            for (name, length), rope in ropes.items()}
    done = unchanged(earlier(out / "passkey.json", setup, "trials"), ropes)
    todo = {key: [t for t in mine if not any(t.items() <= d.items() for d in done)] for key, mine in todo.items()}

    def save():
        if rank() == 0:
            write_json(out / "passkey.json", {"setup": setup, "arguments": vars(args) | {"out": str(out)},
                                              "rows": rows_of(done), "trials": done})
    warm_up(model, lengths[-1], begun)
    say(f"pass key, {scoring}, {args.depths} depths, {args.trials} keys each; " + SCALES.format(window=model.window))
    wide = max(len(name) for name, _ in ropes)
    say(f"{'rope':{wide}} {'length':>8} {'s':>6} {'trials':>6} {'hits':>5} {'accuracy':>8} {'exact':>5} {'seconds':>9} "
        f"{'tokens/s':>9} {'peak GiB':>8}")
    left, saved = sum(t["length"] for mine in todo.values() for t in mine), time.perf_counter()
    bar = tqdm(total=left, unit="token", unit_scale=True, disable=rank() > 0 or not left)
    for (name, length), rope in ropes.items():
        model.rope, mine = rope, todo[name, length]
        for i in range(0, len(mine), world_size()):
            done += spread(lambda t: ask(model, tokenizer, t, args.generate), mine[i:i + world_size()])
            bar.update(sum(t["length"] for t in mine[i:i + world_size()]))
            if time.perf_counter() - saved > 1:  # rather than after every trial, where these are quick
                save()
                saved = time.perf_counter()
        row = summary([t for t in done if (t["rope"], t["length"]) == (name, length)])
        say(f"{name:{wide}} {length:8} {rope.scale:6.4g} {row['trials']:6} {row['hits']:5} "
            f"{row['hits'] / row['trials']:8.1%} {row['exact']:5} {row['seconds']:9.1f} {row['tokens_per_s']:9} "
            f"{row['peak_gib'] or '-':>8}")
        save()
    bar.close()
    if rank() == 0:
        plot(rows_of(done), scoring, out / "passkey.png")
    say(f"wrote {out / 'passkey.json'} and passkey.png")


if __name__ == "__main__":
    run(main)
