"""Six tasks of RULER (arXiv 2404.06654), those that need no download: retrieval, variable tracking, counting words.

    $ python tests/experiments/ruler.py --rope none yarn out/search-8192/rope.json --len 4096 8192
    $ torchrun --nproc-per-node 8 tests/experiments/ruler.py --model DIR --chat --rope yarn --len 131072

Prompts, scores (the share of the expected strings that are in the answer) and tokens to generate are RULER's, but words
are the bundled books', not wonderwords'; a prompt has as many sentences, needles or words as fit into --len, not a
multiple of 5 or more; none ends with a space. In --out: ruler.jsonl (the same command goes on, also with more).
"""
import functools
import random
import string
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from longrope import (ROPES, Journal, Parser, UserError, begin, describe, few, generate, load_tokenizer,  # noqa: E402
                      measured, natural, read_documents, recorded, resolve_ropes, run, say, warm_up)

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {}s for {} is: {}."
NEW = {"word": lambda rng: "-".join(rng.sample(all_words(), 2)), "number": lambda rng: str(rng.randrange(10**6, 10**7)),
       "uuid": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4))}


@functools.cache
def all_words():
    books = " ".join(text for _, text in read_documents([], books=slice(None)))
    return sorted({w for w in books.split() if w.isascii() and w.isalpha() and w.islower() and 4 <= len(w) <= 10})


# These make, with n sentences, needles or words: a prompt, the beginning of its answer, the strings to be found.
def niah(rng, n, length, key_kind, kind, noise=None):
    """Find a needle's value by its key, in noise or else among n needles with other keys."""
    key, value, depth = NEW[key_kind](rng), NEW[kind](rng), rng.random()
    lines = [noise or NEEDLE.format(kind, NEW[key_kind](rng), NEW[kind](rng)) for _ in range(n)]
    lines.insert(int(depth * n), NEEDLE.format(kind, key, value))
    context, asked = "\n".join(lines), f"special magic {kind} for {key} mentioned in the provided text"
    return (f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you "
            f"about the {kind} afterwards.\n{context}\nWhat is the {asked}?", f" The {asked} is", [value])


def vt(rng, n, length):
    """Variable tracking: one chain of four hops in noise, behind an example of another."""
    def chain(letters, n):
        drawn = ("".join(rng.choices(string.ascii_uppercase, k=letters)) for _ in range(9))  # some could be the same
        names, value, sentences = [*dict.fromkeys(drawn)][:5], rng.randrange(10_000, 99_999), [NOISE + "\n"] * n
        lines = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in zip(names, names[1:]))]
        for i, place in enumerate(sorted(rng.sample(range(n), 5))):
            sentences.insert(place + i, lines[i])
        return ("Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
                f"{' '.join(sentences)}\nQuestion: Find all variables that are assigned the value {value} in the text "
                "above.", " Answer: According to the chain(s) of variable assignment in the text above, 5 variables "
                f"are assgined the value {value}, they are: ", names)  # sic
    (example, answer, found), (prompt, prefix, names) = chain(3, 10), chain(5, n)
    return f"{example}{answer} {' '.join(found)}\n\n\n\n{prompt}", prefix, names


def cwe(rng, n, length):
    """Common words extraction: ten words are in a list more often than n others, behind an example of that."""
    def ask_about(n, times, others_times):
        words = rng.sample(all_words(), len(all_words()))[:10 + n]  # all are drawn: more n are the same words and more
        listed = words[:10] * times + words[10:] * others_times
        rng.shuffle(listed)
        numbered = " ".join(map("{}. {}".format, range(1, len(listed) + 1), listed))
        return ("Below is a numbered list of words. In these words, some appear more often than others. Memorize the "
                f"ones that appear most often.\n{numbered}\nQuestion: What are the 10 most common words in the above "
                "list?"), words[:10]
    sizes = ((10, 3, 1), (n, 6, 1)) if length < 4096 else ((30, 10, 3), (n, 30, 3))
    (example, found), (prompt, common) = [ask_about(*size) for size in sizes]
    prefix = " Answer: The top 10 words that appear most often in the list are:"
    return f"{example}{prefix}{' '.join(map('{}. {}'.format, range(1, 11), found))}\n{prompt}", prefix, common


def fwe(rng, n, length):
    """Frequent words extraction: of n coded words the k-th has a share of k^-2 / zeta(2); the first is noise."""
    words = ["...", *("".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(max(3, length // 50 - 1)))]
    coded = [word for k, word in enumerate(words, 1) for _ in range(int(n / k**2 / (np.pi**2 / 6)))]
    rng.shuffle(coded)
    return ("Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(coded)}\nQuestion: Do not provide any explanation. Please ignore the "
            "dots '....'. What are the three most frequently appeared words in the above coded text?",
            " Answer: According to the coded text above, the three most frequently appeared words are:", words[1:4])


TASKS = {  # how, the tokens to generate, the least n (fwe's fourth word is there from 27 on), what else it takes
    "niah_single_1": (niah, 128, 1, "word", "number", NOISE), "niah_multikey_2": (niah, 128, 1, "word", "number"),
    "niah_multikey_3": (niah, 128, 1, "uuid", "uuid"), "vt": (vt, 30, 5), "cwe": (cwe, 120, 1), "fwe": (fwe, 50, 27)}


@functools.cache  # all ropes get the same
def make_prompt(tokenizer, chat, seed, length, task, item):
    """Token ids of the longest prompt that leaves room for the tokens to generate, and the strings to be found."""
    def encode(n):
        text, prefix, expected = make(random.Random(f"{seed} {length} {task} {item}"), n, length, *others)
        if chat:
            text, prefix = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n", prefix.lstrip()
        found = tokenizer.encode(text + prefix.rstrip())
        return found.ids[:len(found) - found.special_tokens_mask[::-1].index(0)], expected  # BOS if it has one, no EOS
    make, to_generate, low, *others = TASKS[task]
    best, room, high, n = encode(low), length - to_generate, length, low + 20  # low fits, high does not
    if len(best[0]) > room:
        raise UserError(f"{task} takes at least {len(best[0]) + to_generate} tokens, not {length}: raise --len")
    while high - low > 1:  # few attempts, as the tokens are nearly linear in n
        n, (tokens, expected) = min(n, high - 1), encode(min(n, high - 1))
        slope = max(0.1, (len(tokens) - len(best[0])) / (n - low))
        low, best, high = (low, best, n) if len(tokens) > room else (n, (tokens, expected), high)
        n = low + max(1, int((room - len(best[0])) / slope))
    return torch.tensor(best[0]), best[1]


def ask(model, tokenizer, trial, chat, seed):
    tokens, expected = make_prompt(tokenizer, chat, seed, trial["length"], trial["task"], trial["item"])
    eos, begun = model.config.hf.get("eos_token_id"), time.perf_counter()
    stop = [*(eos if isinstance(eos, list) else [eos]), *[tokenizer.token_to_id("<|im_end|>")] * chat]
    text = tokenizer.decode(generate(model, tokens, TASKS[trial["task"]][1], trial["length"], stop))
    return {"tokens": len(tokens), "score": sum(e.lower() in text.lower() for e in expected) / len(expected),
            "output": text[:200], "expected": expected, "seconds": round(time.perf_counter() - begun, 3)}


def main(argv=None):
    p = Parser(__doc__, data=False)
    p.add_argument("--rope", nargs="+", help=ROPES)
    p.add_argument("--len", type=natural, nargs="+", help="tokens of prompt and answer (default: 4 times the window)")
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    p.add_argument("--items", type=few, default=20, help="prompts of each task and length (default: 20)")
    p.add_argument("--chat", action="store_true", help="prompts in Qwen's chat template, with no system message")
    p.add_argument("--out", type=Path, help="directory of the result (default: out/ruler-LEN, LEN the longest)")
    args = p.parse_args(argv)
    model, tokenizer = begin(args), load_tokenizer(args.model)
    lengths, tasks = sorted(set(args.len or [4 * model.window])), list(dict.fromkeys(args.tasks))
    if args.context_parallel > 1 or args.chat and tokenizer.token_to_id("<|im_end|>") is None:
        raise UserError("no --context-parallel here, and --chat is for tokenizers that have <|im_end|>")
    ropes = resolve_ropes(args.rope, lengths, model)
    for task in tasks:  # too short a --len shows now
        make_prompt(tokenizer, args.chat, args.seed, lengths[0], task, 0)
    out, setup = args.out or Path(f"out/ruler-{lengths[-1]}"), {"chat": args.chat, "seed": args.seed}
    journal = Journal(out / "ruler.jsonl", describe(model, tokenizer) | setup, recorded(args))
    trials = [{"length": n, "task": task, "item": i} for n in lengths for task in tasks for i in range(args.items)]
    warm_up(model, lengths[-1])
    table = [f" length {' '.join(f'{task:>15}' for task in tasks)}    mean  rope"]
    for name, length, rows in measured(journal, model, ropes, trials,
                                       lambda t: ask(model, tokenizer, t, args.chat, args.seed)):
        scores = np.reshape([row["score"] for row in rows], (len(tasks), -1)).mean(1)
        table.append(f"{length:7} {' '.join(f'{s:15.1%}' for s in scores)} {np.mean(scores):7.1%}  {name}")
    say("\n".join([*table, f"wrote {out}"]))


if __name__ == "__main__":
    run(main)
