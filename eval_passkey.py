"""Pass-key retrieval: a five-digit key hidden in filler text, asked for at the end (protocol of the LongRoPE paper).

    $ python eval_passkey.py --rope none pi ntk yarn out/search-8192/rope.json --len 1024 2048 4096 8192
    $ torchrun --nproc-per-node 8 eval_passkey.py --model DIR --rope yarn --len 131072 --trials 10 --generate

Teacher-forced, the default, takes one forward pass: a hit if every token of the key is the argmax given all before it,
as when greedy decoding begins with them. --generate is the paper's: greedy decoding, the first number in the answer
counts. In --out: passkey.jsonl (the same command goes on, also with more) and passkey.png, a heat map for each rope.
"""
import math
import random
import re
import time
from functools import partial
from itertools import repeat
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
import torch.nn.functional as F

from longrope import (ROPES, Journal, Parser, UserError, attention, begin, describe, few, generate, in_vocabulary,
                      load_tokenizer, measured, natural, over_window, panels_of, rank, recorded, resolve_ropes, rotate,
                      run, say, share_sequences, titles_of, token_nll, warm_up)

TASK = ("There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
        "I will quiz you about the important information there.\n")
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
ANSWER_TOKENS = 10  # decoded with --generate, as in the paper's code, or as many as the key has


def tokens_of(tokenizer, text, before="\n"):
    """Token ids as in the middle of a text: at its start some tokenizers add a space."""
    start, whole = (tokenizer.encode(t, add_special_tokens=False).ids for t in (before, before + text))
    return whole[len(start):]


def make_prompt(tokenizer, length, depth, key):
    """Token ids of a prompt with its answer, exactly `length` of them, how many of the last are the key's, and where
    the middle of the key line is.

    depth 0 puts the key line at the start of the filler, 1 at its end. The filler is cut to the token, and begins anew
    behind the key line.
    """
    encode = partial(tokens_of, tokenizer)
    needle, question, answer = encode(NEEDLE.format(key=key)), encode(QUESTION), encode(f"{QUESTION} {key}")
    if answer[:len(question)] != question:
        raise UserError("this tokenizer joins the question's end with the key")
    newline, sentences, task = encode("\n", "a"), encode(FILLER), tokenizer.encode(TASK)
    task = task.ids[:len(task) - task.special_tokens_mask[::-1].index(0)]  # BOS if it has one, no EOS
    room = length - len(task) - len(needle) - len(answer) - 2 * len(newline)
    if room < 0:
        raise UserError(f"a pass-key prompt takes at least {length - room} tokens, not {length}: raise --len")
    before = round(depth * room)
    filler = sentences * (room // len(sentences) + 1)
    tokens = task + filler[:before] + newline + needle + filler[:room - before] + newline + answer
    return tokens, len(answer) - len(question), len(task) + before + len(newline) + len(needle) // 2


def make_trials(seed, lengths, depths, count):
    """The trials of each rope. Keys come from the seed and the trial's place, so that all ropes get the same."""
    return [{"length": length, "depth": round(depth, 4), "trial": i,
             "key": str(random.Random(f"{seed} {length} {depth:.4f} {i}").randint(10_000, 99_999))}
            for length in lengths for depth in np.linspace(0, 1, depths).tolist() for i in range(count)]


def ask(model, tokenizer, trial, by_generating):
    """What is measured of a trial. `exact`: greedy decoding begins with the key's own tokens; `hit` is what counts."""
    tokens, count, _ = make_prompt(tokenizer, trial["length"], trial["depth"], trial["key"])
    cuda = model.unembedding.is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    if by_generating:  # tokens beyond --len do not change the set of factors
        eos = model.config.hf.get("eos_token_id")
        answer = generate(model, torch.tensor(tokens[:-count]), max(count, ANSWER_TOKENS), trial["length"],
                          stop=eos if isinstance(eos, list) else [eos])
    else:  # the argmax at the places of the key's tokens, each given all the true ones before
        answer = over_window(model, torch.tensor(tokens), len(tokens) - count,
                             lambda hidden, unembedding, _: F.linear(hidden, unembedding).argmax(-1)).long().tolist()
    seconds = time.perf_counter() - begun
    text, exact = tokenizer.decode(answer), answer[:count] == tokens[-count:]
    number = re.search(r"\d+", text)
    hit = bool(number and number[0] == trial["key"]) if by_generating else exact
    return {"answer": text, "hit": hit, "exact": exact, "seconds": round(seconds, 4),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None}


# ---------------------------------------------------------------------------------------------------------------------
# For search.py, which asks some 1500 times: by pieces of a prompt, of which 14% is read at 8192 tokens, 2% at 262144,
# and by -log p, which says more than hit or miss. As filler repeats itself, what lies between is known from pieces.

PIECES = 9  # of a prompt


def piece_size(length):
    return min(max(length // 64, 128), 512)


def pieces(length, middle, period, count=PIECES):
    """The places (n,) of a prompt's tokens (T,) that are read, `count` pieces, some adjoining: one around the key line,
    whose middle is given, half of the others evenly from the start to the question, half ever closer to the start,
    where a token has little filler before it. On both sides of the key line, itself at most a period long and 8 tokens,
    is a whole `period` of filler."""
    size = min(max(piece_size(length), 3 * period + 8), length)
    even = np.linspace(0, length - size, count // 2)
    closer = np.geomspace(size, max(length - size, 1), (count + 1) // 2)[:-1]
    starts = np.concatenate([even, closer, [middle - size // 2]]).round().astype(int)
    return np.unique(np.clip(np.add.outer(starts, np.arange(size)), 0, length - 1))


def sources(kept, length, period):
    """For each place (T,) an index into `kept` (n,): whose key and value it has. Its own if it is read, else those of
    the filler's same token, a multiple of `period` tokens away, at the edge of the nearest piece."""
    place = np.arange(length)
    after = kept.searchsorted(place)
    behind, ahead = place - kept[np.maximum(after - 1, 0)], kept[after] - place
    periods = np.where(behind <= ahead, -behind // period, -(-ahead // period)) * (ahead > 0)
    return kept.searchsorted(place + period * periods)


def spreading(table, kept, source):
    """`attention` for what is read of a prompt, over all its T places: each has its source's value, and key, turned by
    the angle between the two places. So the pass key competes with as much filler as in the whole prompt."""
    table = torch.complex(*table)  # attention factor * e^(i angle), (T, D/2)
    turn = table / table[kept[source]]
    ends = [*((kept.diff() > 1).nonzero().flatten() + 1).tolist(), len(kept)]  # of the pieces
    seen = (kept[[end - 1 for end in ends]] + 1).tolist()

    def attend(q, k, v):
        k, v, parts = rotate(k[:, source], turn.real, turn.imag), v[:, source], q.tensor_split(ends[:-1], dim=1)
        return torch.cat([attention(part, k[:, :n], v[:, :n]) for part, n in zip(parts, seen)], 1)
    return attend


def prompt_in_pieces(tokenizer, trial, count=PIECES):
    """(tokens (T,), places that are read (n,), their sources (T,), tokens of the key)"""
    tokens, answer, middle = make_prompt(tokenizer, trial["length"], trial["depth"], trial["key"])
    period = len(tokens_of(tokenizer, FILLER))
    kept = pieces(len(tokens), middle, period, count)
    source = sources(kept, len(tokens), period)
    return torch.tensor(tokens), torch.from_numpy(kept), torch.from_numpy(source), answer


@torch.inference_mode()
def ask_in_pieces(model, rope, prompts):
    """(-log p of the keys, a mean over prompts; how many are the argmax all through)"""
    device, nll, found = model.unembedding.device, 0.0, 0
    table = cos, sin = rope.table(len(prompts[0][0]), device)
    for tokens, kept, source, count in prompts:
        tokens, kept = tokens[kept].to(device), kept.to(device)
        attend = spreading(table, kept, source.to(device))
        # so little that each process of a context reads it alone
        hidden = model.hidden(tokens[None], (cos[kept], sin[kept]), repeat(attend), len(source))[0, -1 - count:-1]
        nll += token_nll(hidden, model.unembedding, tokens[-count:]).sum().item() / len(prompts)
        found += bool((F.linear(hidden, model.unembedding).argmax(-1) == tokens[-count:]).all())
    if not math.isfinite(nll):
        raise UserError("the loss is not finite: weights or factors are broken")
    return nll, found


# =====================================================================================================================
# Here the lesson ends. What follows is plumbing: the plot, arguments, the table.


def plot(trials, scoring, path):
    """A panel for each rope: length across, depth down, accuracy as colour and number."""
    ropes, lengths, depths = (list(dict.fromkeys(t[key] for t in trials)) for key in ("rope", "length", "depth"))
    fig, panels = panels_of(len(ropes), 0.9 + 0.55 * len(lengths), 3.8)
    for ax, (rope, title) in zip(panels, titles_of(ropes).items()):
        hits = [[[t["hit"] for t in trials if (t["rope"], t["length"], t["depth"]) == (rope, length, depth)]
                 for length in lengths] for depth in depths]
        accuracy = np.mean(hits, axis=-1)
        image = ax.imshow(accuracy, vmin=0, vmax=1, cmap="cividis", aspect="auto")  # cividis: safe for the colour-blind
        for (y, x), a in np.ndenumerate(accuracy):
            ax.text(x, y, f"{a:.0%}", ha="center", va="center", size=7, color="black" if a > 0.5 else "white")
        ax.set_title(fill(f"{title}, {accuracy.mean():.0%}", 10 + 6 * len(lengths)), size=10)
        ax.set_xticks(range(len(lengths)), lengths, rotation=90, size=8)
        ax.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], size=8)
    fig.supylabel("depth of the key", size=10)
    fig.supxlabel("prompt length (tokens)", size=10)
    fig.colorbar(image, ax=panels, label=f"accuracy, {scoring}")
    fig.savefig(path, dpi=120)


def parser():
    p = Parser(__doc__, data=False)
    p.add_argument("--rope", nargs="+", help=ROPES)
    p.add_argument("--len", type=natural, nargs="+", help="tokens of prompt and key (default: 8 times the window)")
    p.add_argument("--depths", type=few, default=10, help="places of the key, from start to end (default: 10)")
    p.add_argument("--trials", type=few, default=1, help="keys for each length and depth (default: 1)")
    p.add_argument("--generate", action="store_true", help="the paper's scoring (default: teacher-forced)")
    p.add_argument("--out", type=Path, help="directory of the result (default: out/passkey-LEN, LEN the longest)")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    model = begin(args)
    tokenizer = load_tokenizer(model.path)
    lengths = sorted(set(args.len or [8 * model.window]))
    out = args.out or Path(f"out/passkey-{lengths[-1]}")
    share_sequences(model, args.context_parallel, lengths)
    ropes = resolve_ropes(args.rope, lengths, model)
    trials = make_trials(args.seed, lengths, args.depths, args.trials)
    key = max((trial["key"] for trial in trials), key=lambda key: len(tokens_of(tokenizer, f" {key}")))
    in_vocabulary(model, torch.tensor(make_prompt(tokenizer, lengths[0], 0, key)[0]))  # too short a --len shows now
    scoring = "first number of greedy decoding" if args.generate else "teacher-forced"
    journal = Journal(out / "passkey.jsonl", describe(model, tokenizer) | {
        "scoring": scoring, "depths": args.depths, "seed": args.seed}, recorded(args))
    warm_up(model, lengths[-1])
    say(f"{scoring}; s of the formulas: length / {model.window}, the model's window (yarn:16 fixes it)")
    wide = max(len(name) for name, _ in ropes)
    say(f"{'rope':{wide}}   length      s trials  hits accuracy exact   seconds  tokens/s peak GiB")
    rows = []
    for name, length, mine in measured(journal, model, ropes, trials, lambda t: ask(model, tokenizer, t, args.generate),
                                       args.context_parallel):
        rows += mine
        hits, exact, seconds = (sum(t[key] for t in mine) for key in ("hit", "exact", "seconds"))
        say(f"{name:{wide}} {length:8} {model.rope.scale:6.4g} {len(mine):6} {hits:5} {hits / len(mine):8.1%} "
            f"{exact:5} {seconds:9.1f} {length * len(mine) / max(seconds, 1e-4):9.0f} "
            f"{max(t['peak_gib'] or 0 for t in mine) or '-':>8}")
    if rank() == 0:
        plot(rows, scoring, out / "passkey.png")
    say(f"wrote {out}")


if __name__ == "__main__":
    run(main)
