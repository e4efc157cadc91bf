"""Search the rescale factors of LongRoPE: Algorithm 1 of the paper (arXiv 2402.13753), an evolution over perplexity.

    $ python search.py                                        # the bundled model, 8 times its window
    $ python search.py --model DIR --data books/ --len 131072
    $ torchrun --nproc-per-node 8 search.py --model DIR --data books/ --len 262144      # the same result, sooner
    $ python search.py --model FINETUNED --init FINETUNED/rope.json --len 2097152       # second stage, no more training
    $ python search.py --model FINETUNED --init FINETUNED/rope.json --short --len 8192  # short-window recovery

In --out: rope.json, the best factors so far at any time; history.jsonl, a line for each candidate evaluated, from which
the same command goes on where it was stopped; search.png.
"""
import argparse
import itertools
import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from longrope import (FORMULAS, Factors, Journal, Rope, UserError, add_arguments, begin, data_hash, describe,
                      forward_flops, inv_freq_of, load_tokenizer, natural, perplexity, plain, rank, read_documents,
                      reading, recorded, resolve_rope, rope_to_dict, run, save_config, say, sha256_of, share_sequences,
                      spread, su_factor, utilisation, whole, whole_file, window_nll, windows, world_size, write_json,
                      yarn_factor)

# ---------------------------------------------------------------------------------------------------------------------
# The search space and its operators. A candidate is a Factors: one lambda for each rotary pair, relative to the base
# that the search multiplies onto, one n_hat and one attention factor as they will be used.

BASELINES = ("pi", "ntk", "yarn")
PAPER = {"samples": 5, "population_size": 64, "num_mutations": 16, "num_crossovers": 16, "num_parents": 32,
         "iterations": 40}
PAPER_ABOVE_512K = PAPER | {"samples": 3, "population_size": 32, "num_mutations": 8, "num_crossovers": 8}
ON_CPU = {"samples": 2, "population_size": 16, "num_mutations": 5, "num_crossovers": 3, "num_parents": 6,
          "iterations": 5}
N_HAT = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)  # table 4 of the paper
MUTATION_PROB = 0.3  # p, of a gene


@dataclass(frozen=True)
class Space:
    smallest: tuple   # lambda_i, (D/2,), non-decreasing: 1, or with --slow-least more for the slow pairs
    largest: float    # of lambda: 1.25 s
    n_hats: tuple     # N_HAT, or the one that is fixed
    attention: tuple  # lowest and highest attention factor; equal if it is fixed


def is_monotone(factors):
    """The paper's constraint: lambda_i <= lambda_(i+1)."""
    return all(a <= b for a, b in zip(factors, factors[1:]))


def draw(rng, low, high):
    """Uniform on the multiples of 0.01 from low to high, both included."""
    return int(rng.integers(round(100 * low), round(100 * high) + 1)) / 100


def mutate(rng, parent, space):
    """Each gene, with probability p, anew: lambda_i between its neighbours as they then are, n_hat from its set.

    So the constraint holds without sorting, and a gene that is not mutated keeps its value.
    """
    factors = [1.0, *parent.rescale_factors, space.largest]
    for i in range(1, len(factors) - 1):
        if rng.random() < MUTATION_PROB:
            factors[i] = draw(rng, max(factors[i - 1], space.smallest[i - 1]), factors[i + 1])
    n_hat = int(rng.choice(space.n_hats)) if rng.random() < MUTATION_PROB else parent.n_hat
    attention_factor, (low, high) = parent.attention_factor, space.attention
    if low < high and rng.random() < MUTATION_PROB:
        attention_factor = draw(rng, low, high)
    return Factors(tuple(factors[1:-1]), n_hat, attention_factor)


def shift(rng, parent, space):
    """lambda_a .. lambda_(b-1) times one number, log-uniform within what their neighbours and bounds allow.

    Good factors are smooth in i, and `mutate`, pair by pair, hardly moves one whose neighbours are close.
    """
    factors = np.array([1.0, *parent.rescale_factors, space.largest])
    a, b = sorted(rng.choice(np.arange(1, len(factors)), 2, replace=False))
    low = max(factors[a - 1] / factors[a], (space.smallest[a - 1:b - 1] / factors[a:b]).max())
    high = factors[b] / factors[b - 1]
    factors[a:b] *= low * (high / low) ** rng.random()
    return replace(parent, rescale_factors=tuple(np.round(factors[1:-1], 2).tolist()))


def crossover(rng, a, b):
    """Every gene from one of two parents, by a coin for each gene.

    Where the coin's parent would break the constraint the gene comes from the parent of the gene before, whose own
    order guarantees that it fits. The walk goes up or down by another coin: always upward would favour large factors.
    """
    up = bool(rng.integers(2))
    factors, parent = [], a
    for i in range(len(a.rescale_factors)) if up else reversed(range(len(a.rescale_factors))):
        gene = (other := (a, b)[rng.integers(2)]).rescale_factors[i]
        if not factors or (gene >= factors[-1] if up else gene <= factors[-1]):
            parent = other
        factors.append(parent.rescale_factors[i])
    n_hat, attention_factor = (a, b)[rng.integers(2)].n_hat, (a, b)[rng.integers(2)].attention_factor
    return Factors(tuple(factors if up else factors[::-1]), n_hat, attention_factor)


def unseen(make, count, seen):
    """Up to `count` candidates from make(), none of them twice and none in `seen`."""
    made = {}
    for _ in range(100 * count):  # a space almost used up ends here
        if len(made) == count:
            break
        if (candidate := make()) not in seen:
            made[candidate] = None
    return list(made)


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def search(args, rng, starts, space, evaluate):
    """The best candidate after `args.iterations` generations, or `args.max_evals` evaluations.

    starts: {candidate: name}, PI, NTK, YaRN and what else the search begins with. evaluate({candidate: origin},
    iteration) -> {candidate: its NLL}.
    """
    first = list(starts)
    mutants = unseen(lambda: mutate(rng, first[rng.integers(len(first))], space), args.population_size - len(first),
                     starts)
    population = starts | dict.fromkeys(mutants, "mutation")
    nll = {}  # of every candidate ever evaluated
    for iteration in itertools.count():
        allowed = itertools.islice(population.items(), args.max_evals - len(nll))
        nll |= evaluate(dict(allowed), iteration)
        parents = sorted(nll, key=nll.get)[:args.num_parents]  # the top k stay, with the NLL they have
        if iteration == args.iterations or len(nll) == args.max_evals:
            return parents[0]
        mutants = unseen(lambda: mutant(args, rng, parents[rng.integers(len(parents))], space),
                         args.screening * args.num_mutations, nll)
        children = unseen(lambda: crossover(rng, *(parents[i] for i in rng.choice(len(parents), 2, replace=False))),
                          args.screening * args.num_crossovers if len(parents) > 1 else 0, {*nll, *mutants})
        population = dict.fromkeys(mutants, "mutation") | dict.fromkeys(children, "crossover")
        if args.screening > 1 and population:
            chosen = promising(list(population), nll, args.num_mutations + args.num_crossovers)
            population = {candidate: population[candidate] for candidate in chosen}


def mutant(args, rng, parent, space):
    """The paper's mutation; with screening half of the time ours, of neighbouring pairs together."""
    return shift(rng, parent, space) if args.screening > 1 and rng.integers(2) else mutate(rng, parent, space)


def promising(candidates, nll, count):
    """Screening: the `count` of `candidates` whose NLL a Gaussian process expects to be lowest.

    It is fitted to the best 200 candidates measured so far: x = (log lambda, n_hat, attention factor), y = log(NLL -
    0.99 of the lowest NLL), which spreads out the good ones; the kernel is exp(-|x - x'|^2 / 2 l^2) with noise on the
    diagonal, l and noise of the highest likelihood. No randomness and one thread: all processes choose the same.
    """
    best = sorted(nll, key=nll.get)[:200]

    def features(some):  # (N, D/2 + 2), so scaled that a step in each matters alike
        return torch.tensor([(*map(math.log, c.rescale_factors), math.log2(1 + c.n_hat) / 10, 10 * c.attention_factor)
                             for c in some], dtype=torch.float64).view(len(some), -1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, new = features(best), features(candidates)
    total = torch.tensor([nll[c] for c in best], dtype=torch.float64)
    y = (total - 0.99 * total[0] + 1e-9).log()
    y = (y - y.mean()) / y.std(correction=0).clamp(min=1e-9)
    fits = []
    for length, noise in itertools.product((0.5, 1, 2, 4), (1e-4, 1e-2)):
        kernel = (-torch.cdist(x, x) ** 2 / (2 * length**2)).exp()
        root = torch.linalg.cholesky(kernel + noise * torch.eye(len(x), dtype=torch.float64))
        weights = torch.cholesky_solve(y[:, None], root)[:, 0]  # K^-1 y
        fits.append((0.5 * y @ weights + root.diagonal().log().sum(), length, weights))  # -log likelihood
    _, length, weights = min(fits, key=lambda fit: fit[0])
    expected = (-torch.cdist(new, x) ** 2 / (2 * length**2)).exp() @ weights
    torch.set_num_threads(threads)
    return [candidates[i] for i in expected.argsort(stable=True)[:count]]


# ---------------------------------------------------------------------------------------------------------------------
# What is searched. The same loop serves a first stage, a second one on top of factors found, and a short set: they
# differ in what the candidates' lambdas multiply onto, how far they go, and which of a rope's two sets they replace.


@dataclass(frozen=True)
class Problem:
    rope: Rope        # what the model has now; the result becomes one of its sets
    base: Factors     # what the candidates' lambdas multiply onto
    window: int       # tokens that the base serves
    scale: float      # s; lambda goes up to 1.25 s
    known: dict       # {name: Factors}, sets that exist already, first candidates
    short: bool       # is it the short set that is searched?

    def put(self, candidate, length):
        """The Rope with a candidate in its place, for `length` tokens."""
        found, window = candidate.on(self.base), self.rope.original_max_position_embeddings
        if self.short:
            return replace(self.rope, short=found, short_max_length=max(length, window))
        return replace(self.rope, long=found, scale=length / window, short=self.rope.short or self.rope.trained,
                       short_max_length=self.rope.short_max_length or window)


def first_stage(rope, length):
    """From the window that the model was trained on, onto what it was trained with."""
    window = rope.original_max_position_embeddings
    trained = replace(rope, long=rope.trained, scale=1.0, short=None, short_max_length=0)
    return Problem(trained, rope.trained, window, length / window, {}, short=False)


def second_stage(rope, length):
    """From the window that a fine-tuned model has, without more training: lambda = lambda_finetuned * lambda_second
    (paper, section 3.3)."""
    return Problem(rope, rope.long, rope.target_length, length / rope.target_length, {}, short=False)


def recovery(rope, length):
    """The short set of an extended model, up to `length` tokens: lambda goes less far, up to 1.25 times 5 (published
    factors reach 2.8 to 5), or as far as `length` is beyond the window."""
    beyond = length / rope.original_max_position_embeddings
    long = replace(rope.long, rescale_factors=tuple(np.divide(rope.long.rescale_factors, rope.trained.rescale_factors)))
    return Problem(rope, rope.trained, rope.original_max_position_embeddings, max(min(rope.scale, 5.0), beyond),
                   {"none": plain(len(long.rescale_factors)), "long": long}, short=True)


def fitness(model, rope, tokens):
    """Summed -log p of a window of text (T,) under a rope: what the search makes small."""
    model.rope = rope
    return window_nll(model, tokens).sum().item()


# =====================================================================================================================
# Here the lesson ends. What follows is plumbing: bounds and first candidates, the journal, tables, plots, arguments.


def first_candidates(args, problem, start=None):
    """(Space, {candidate: name}): PI, NTK, YaRN, the sets that exist and that of --start-from, put within bounds."""
    rope, beyond = problem.rope, args.len / problem.window
    window, pairs = rope.original_max_position_embeddings, len(problem.base.rescale_factors)
    attention, bounds = attention_factors(args, rope.scale if problem.short else args.len / window, window)
    if problem.short and args.attention_factor == "search" and beyond > 1:
        attention = round(su_factor(beyond, window), 2)
    turns = problem.window / (2 * math.pi) * inv_freq_of(problem.base.rescale_factors, rope.rope_theta)
    slow = turns < 1  # with less than s these pairs reach angles that the model never saw
    least = round((args.slow_least or 0) * beyond, 2)
    if args.slow_least and (beyond <= 1 or least <= 1 or not slow.any()):
        raise UserError(f"--slow-least {args.slow_least:g} bounds nothing: {args.len} tokens are {beyond:.4g} times "
                        f"the window of {problem.window}, within which {slow.sum()} pairs make no full turn")
    space = Space(tuple(np.maximum.accumulate(np.where(slow, max(1.0, least), 1.0)).tolist()),
                  round(1.25 * problem.scale, 2), N_HAT if args.n_hat == "search" else (args.n_hat,), bounds)
    named = {name: FORMULAS[name](pairs, rope.rope_theta, problem.window, beyond if beyond > 1 else problem.scale)
             for name in BASELINES}
    if start:
        relative = np.divide(start.rescale_factors, problem.base.rescale_factors)
        if not is_monotone(relative):
            say("--start-from: its factors fall somewhere from pair to pair; sorted")
        start = {"start": replace(start, rescale_factors=tuple(relative))}
    starts = {}
    for name, factors in ((start or {}) | problem.known | named).items():
        lambdas = np.clip(np.sort(factors.rescale_factors), space.smallest, space.largest)
        n_hat = (factors if name == "start" else rope.long).n_hat
        own = attention if name in named or bounds[0] == bounds[1] else (
            round(float(np.clip(factors.attention_factor, *bounds)), 2))
        candidate = Factors(tuple(np.round(lambdas, 2).tolist()), min(space.n_hats, key=lambda n: abs(n - n_hat)), own)
        starts.setdefault(candidate, name)  # two can be the same, as long factors that are PI's
    return space, starts


def attention_factors(args, scale, window):
    """The attention factor to start with, and its (lowest, highest). Searched, it goes from 1 to 1.25 su by 0.01."""
    su = su_factor(scale, window)
    if args.attention_factor == "search":
        return round(su, 2), (1.0, round(1.25 * su, 2))
    fixed = {"su": su, "yarn": yarn_factor(scale), "none": 1.0}.get(args.attention_factor, args.attention_factor)
    return fixed, (fixed, fixed)


def ropes_to_compare(args, problem):
    """{name: Rope}: what there is without a search. The formulas have the attention factors of their own papers."""
    rope = problem.rope
    if problem.short:  # in what is exported transformers gives the long set's attention factor to plain RoPE, too
        unscaled = replace(plain(len(problem.base.rescale_factors)),
                           attention_factor=rope.long.attention_factor if args.export else 1.0)
        return {"none": problem.put(unscaled, args.len),
                "long": replace(rope, short=None, short_max_length=0)}
    ropes, window = {"none": rope}, rope.original_max_position_embeddings
    for name in BASELINES:
        factors = FORMULAS[name](len(rope.long.rescale_factors), rope.rope_theta, problem.window, problem.scale)
        factor = yarn_factor(args.len / window) if name == "yarn" else rope.long.attention_factor
        ropes[name] = problem.put(replace(factors, n_hat=rope.long.n_hat, attention_factor=factor), args.len)
    return ropes


def nll_of_each(args, model, tasks):
    """Yield (task, NLL) for tasks (rope, tokens, ...), dealt to torchrun's processes, in the order of `tasks`: so sums
    over them do not depend on the number of processes."""
    together = world_size() // args.context_parallel
    for now in (tasks[at:at + together] for at in range(0, len(tasks), together)):
        yield from zip(now, spread(lambda task: fitness(model, *task[:2]), now, args.context_parallel))


class Evaluator:
    """Measures populations for `search`, and keeps what it leaves behind: the bar, the journal, the best rope.json."""

    def __init__(self, args, model, problem, documents, journal, record):
        self.args, self.model, self.problem, self.documents = args, model, problem, documents
        self.journal, self.record, self.nll, self.best, self.measured = journal, record, {}, math.inf, 0
        for row in journal.rows:
            if genes := row.get("genes"):
                self.keep(Factors(**genes | {"rescale_factors": tuple(genes["rescale_factors"])}), row["nll"])
        self.save()
        self.begun, self.bar = time.perf_counter(), tqdm(
            total=args.max_evals, initial=min(len(self.nll), args.max_evals), desc="search", unit="candidate",
            smoothing=0.05, disable=rank() > 0)

    def __call__(self, population, iteration):
        ropes = {c: self.problem.put(c, self.args.len) for c in population if c not in self.nll}
        tasks, nlls = [(rope, tokens, c) for c, rope in ropes.items() for tokens in self.documents], []
        begun = time.perf_counter()
        for (_, _, candidate), nll in nll_of_each(self.args, self.model, tasks):
            nlls, self.measured = [*nlls, nll], self.measured + 1
            if len(nlls) == len(self.documents):
                self.journal.write({
                    "iteration": iteration, "origin": population[candidate], "genes": asdict(candidate), "nll": nlls,
                    "ppl": self.perplexity(nlls), "seconds": round(time.perf_counter() - begun, 3)})
                if self.keep(candidate, nlls):
                    self.save()
                self.show()
                nlls, begun = [], time.perf_counter()
        return {candidate: self.nll[candidate] for candidate in population}

    def keep(self, candidate, nlls):
        """Remember a candidate; is it the best so far?"""
        assert is_monotone(candidate.rescale_factors)
        self.nll[candidate] = math.fsum(nlls)
        if better := self.perplexity(nlls) < self.best:
            self.best, self.rope = self.perplexity(nlls), self.problem.put(candidate, self.args.len)
        return better

    def perplexity(self, nlls):
        return perplexity(nlls, len(self.documents) * (self.args.len - 1))

    def show(self):
        speed = self.measured / (time.perf_counter() - self.begun)  # windows a second
        mfu = utilisation(speed * forward_flops(self.model, self.args.len), 1, self.model.unembedding.device)
        self.bar.set_postfix_str(f"best perplexity {self.best:.3f}, {speed * self.args.len:.3g} tokens/s"
                                 + (f", MFU {mfu:.0%}" if mfu else ""))
        self.bar.update()

    def save(self, **extra):
        if rank() == 0 and self.nll:
            write_json(self.args.out / "rope.json", rope_to_dict(self.rope) | {"search": self.record | {
                "perplexity": self.best, "evaluations": len(self.nll)} | extra})


# ---------------------------------------------------------------------------------------------------------------------
# What the user sees


def compare(args, model, ropes, documents, journal):
    """A row for each rope: its perplexity on the search's documents, the first args.samples, and on the others."""
    keys = {name: sha256_of(rope_to_dict(rope)) for name, rope in ropes.items()}
    known = {(row["rope"], row["document"]): row["nll"] for row in journal.rows if "rope" in row}
    tasks = [(rope, tokens, keys[name], d) for name, rope in ropes.items() for d, tokens in enumerate(documents)
             if (keys[name], d) not in known]
    bar = tqdm(total=len(tasks), desc="compare", unit="window", leave=False, disable=rank() > 0)
    for (_, _, key, d), nll in nll_of_each(args, model, tasks):
        known[key, d] = nll
        journal.write({"rope": key, "document": d, "nll": nll})
        bar.update()
    bar.close()

    def over(name, some):
        return perplexity([known[keys[name], d] for d in some], len(some) * (args.len - 1))
    return [{"rope": name, "attention_factor": rope.at(args.len).attention_factor,
             "search": over(name, range(args.samples)), "unseen": over(name, range(args.samples, len(documents)))}
            for name, rope in ropes.items()]


def say_table(rows, length, samples, held_out):
    say(f"\nperplexity at {length} tokens, one window a document")
    say(f"{'rope':10}{'attention factor':>18}{f'{samples} searched on':>18}{f'{held_out} unseen':>14}")
    for row in rows:
        on, off = ("-" if ppl is None else f"{ppl:.3f}" if ppl < 1e6 else f"{ppl:.2e}"
                   for ppl in (row["search"], row["unseen"]))
        say(f"{row['rope']:10}{row['attention_factor']:18.3f}{on:>18}{off:>14}")
    for where in ("search", "unseen") if held_out else ("search",):
        other = min(rows[:-1], key=lambda row: row[where])
        gain = 1 - rows[-1][where] / other[where]
        what = "as good as" if gain == 0 else f"{abs(gain):.1%} {'below' if gain > 0 else 'above'}"
        say(f"{where} documents: searched is {what} {other['rope']}, the best of the others")
    if not held_out:
        say("give more documents, or fewer --samples, to compare on some that the search did not see")


def plot(ropes, length, rows, bounded, path):
    """Left: lambda of each pair for each rope. Right: every candidate, and the best one as the search went on."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colors = dict(zip(ropes, ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7"))) | {"searched": "black"}
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, rope in ropes.items():
        factors = rope.at(length)
        label = f"{name}, $\\hat n$ = {factors.n_hat}" if name == "searched" else name
        left.plot(factors.rescale_factors, label=label, color=colors[name], lw=2 if name == "searched" else 1.5)
    left.set(xlabel="rotary pair i", ylabel=r"rescale factor $\lambda_i$", yscale="log",
             title=f"factors for {length} tokens")
    left.legend()
    rows = [row for row in rows if "ppl" in row]
    ppl, evaluated = np.array([row["ppl"] for row in rows]), range(1, len(rows) + 1)
    best, top = np.minimum.accumulate(ppl), np.median(ppl)
    right.plot(evaluated, ppl, ".", color="#999999", ms=4, label="a candidate")
    right.step(evaluated, best, where="post", color="black", lw=2, label="the best so far")
    limits = best[-1] - 0.5 * (span := max(top - best[-1], 0.01 * best[-1])), best[-1] + 5 * span
    for row in rows:
        if row["origin"] in colors and row["ppl"] < limits[1]:
            right.axhline(row["ppl"], lw=1, ls="--", color=colors[row["origin"]],
                          label=f"{row['origin']}, the search's attention factor{', bounded' * bounded}")
    right.set(xlabel="candidates evaluated", ylabel="perplexity on the search's documents", title="search", ylim=limits)
    right.legend(loc="upper right")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def say_cost(args, model, tokens, candidates, compared):
    """What so many candidates and `compared` windows after them will take, from one probe of the machine."""
    on_cpu, step = model.unembedding.device.type == "cpu", 2 * args.context_parallel
    probe = tokens[:2048 // step * step] if on_cpu else tokens
    for _ in range(2):  # the first time warms up
        begun = time.perf_counter()
        window_nll(model, probe)
    a_window = (time.perf_counter() - begun) * forward_flops(model, args.len) / forward_flops(model, len(probe))
    seconds = a_window * (candidates * args.samples + compared) * args.context_parallel / world_size()
    say(f"a candidate ({args.samples} documents of {args.len} tokens) takes about {a_window * args.samples:.3g} s, "
        f"{candidates} candidates and the comparison about {tqdm.format_interval(seconds)}")
    if on_cpu and seconds > 1800:
        shorter = f"--len {8 * model.window} or " if args.len > 8 * model.window else ""
        say(f"that is long for a CPU: try {shorter}a smaller --max-evals")


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(p)
    p.add_argument("--len", type=natural, help="target length in tokens (default: 8 times the model's window; with "
                   "--short the window)")
    for key, what in {"samples": "documents a candidate is evaluated on, without --data 2",
                      "population_size": "first candidates, P", "num_mutations": "mutants in an iteration, N1",
                      "num_crossovers": "children in an iteration, N2",
                      "num_parents": "how many of the best mutate and cross, k",
                      "iterations": "generations after the first, T"}.items():
        halved = f", {PAPER_ABOVE_512K[key]} above 512k tokens" if PAPER_ABOVE_512K[key] != PAPER[key] else ""
        p.add_argument(f"--{key.replace('_', '-')}", type=whole if key == "iterations" else natural, metavar="N",
                       help=f"{what} (default: the paper's {PAPER[key]}{halved}; {ON_CPU[key]} on a CPU)")
    p.add_argument("--n-hat", type=lambda text: text if text == "search" else whole(text), default=0,
                   metavar="N|search", help="search = a gene, from the paper's set (default: 0, as no other program "
                   "knows it)")
    p.add_argument("--attention-factor", metavar="su|yarn|none|NUMBER|search",
                   help="su = sqrt(1 + ln s / ln L0), yarn = 0.1 ln s + 1, none = 1, search = a gene (default: su; "
                   "with --short and no --export: search, since Hugging Face has but one for both sets)")
    p.add_argument("--slow-least", type=float, metavar="R",
                   help="no factor below R s, R up to 1.25, for the slow pairs, those that make no full turn within "
                   "the window, so that they reach no angle the model never saw; 1.19 keeps pass keys. With --init s "
                   "and window are those of the second stage, with --short s is --len over the window (default: no "
                   "such bound, as in the paper)")
    p.add_argument("--start-from", dest="start", type=Path, metavar="ROPE",
                   help="a rope.json, say one found for another length: beside PI, NTK and YaRN its factors, put "
                   "within this search's bounds, and mutants of them are first candidates")
    p.add_argument("--init", type=Path, metavar="ROPE",
                   help="rope.json of a fine-tuned model: search a second stage, to be multiplied onto its factors "
                   "(with --short: of any model that has a long set)")
    p.add_argument("--short", action="store_true", help="search the short set of --init, for lengths up to --len")
    p.add_argument("--screening", type=natural, default=64, metavar="N",
                   help="make N times as many mutants and children and evaluate those that a Gaussian process on all "
                   "evaluated before finds most promising; 1 is the paper's search (default: 64)")
    p.add_argument("--max-evals", type=natural, metavar="N", help="stop after so many candidates, the first "
                   "population among them (default: no limit)")
    p.add_argument("--out", type=Path, help="directory of the result (default: out/search-LEN, or -LEN-short)")
    p.add_argument("--export", type=Path, metavar="DIR",
                   help="write the model with the result as a Hugging Face directory, too")
    return p


def fill_in(args, model):
    """Defaults that depend on the model and the machine, and checks."""
    args.len = args.len or (1 if args.short else 8) * model.window
    args.out = args.out or Path(f"out/search-{args.len}{'-short' * args.short}")
    args.attention_factor = args.attention_factor or ("search" if args.short and not args.export else "su")
    paper = PAPER_ABOVE_512K if args.len > 512 * 1024 else PAPER
    defaults = ON_CPU if model.unembedding.device.type == "cpu" else paper
    if not args.data:  # of the five books that come with it the others are to compare on
        defaults = defaults | {"samples": 2}
    for key, value in defaults.items():
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
    total = args.population_size + args.iterations * (args.num_mutations + args.num_crossovers)
    args.max_evals = min(args.max_evals or total, total)
    if args.len < 2 or args.num_parents < 2 or args.population_size < 3 + bool(args.start):  # PI, NTK, YaRN
        raise UserError("--len and --num-parents must be at least 2, --population-size 3, with --start-from 4")
    if args.attention_factor not in ("su", "yarn", "none", "search"):
        with reading("--attention-factor: not su, yarn, none, search or a number above 0"):
            if not 0 < (number := float(args.attention_factor)) < math.inf:
                raise ValueError(args.attention_factor)
            args.attention_factor = number
    if args.slow_least is not None and not 0 < args.slow_least <= 1.25:
        raise UserError(f"--slow-least {args.slow_least:g}: give a number above 0 and at most 1.25, as no factor is "
                        "above 1.25 s")
    if args.start and args.start.resolve() == (args.out / "rope.json").resolve():
        raise UserError(f"--start-from {args.start} is where the result goes: give another --out")
    if args.export and list(args.export.glob("*.safetensors")):
        raise UserError(f"--export {args.export}: has weights already; give another directory")


def problem_of(args, model):
    """The Problem that the arguments ask for."""
    if args.short and not args.init:
        raise UserError("--short searches the short set of an extended model: give its rope.json with --init")
    rope = resolve_rope(args.init, model) if args.init else model.config.rope
    problem = (recovery if args.short else second_stage if args.init else first_stage)(rope, args.len)
    if args.short and args.len >= rope.target_length:
        raise UserError(f"--short --len {args.len}: the long set would never be used, it is for {rope.target_length} "
                        "tokens")
    if not args.short and args.len <= problem.window:
        raise UserError(f"--len {args.len}: nothing to extend, the window is {problem.window} already")
    if args.export and (args.n_hat or rope.long.n_hat or rope.short and rope.short.n_hat):
        raise UserError("--export: config.json cannot say n_hat above 0; search without it")
    return problem


def export(model, path):
    """A Hugging Face directory of the model with its rope; the search changes no weights, so they are copied."""
    save_config(model, path)
    for file in model.path.glob("*.safetensors*"):
        with whole_file(path / file.name) as part:
            shutil.copyfile(file, part)


def main(argv=None):
    args = parser().parse_args(argv)
    model = begin(args)
    fill_in(args, model)
    tokenizer = load_tokenizer(args.model)
    share_sequences(model, args.context_parallel, [args.len])
    problem = problem_of(args, model)
    start = resolve_rope(args.start, model, args.len).at(args.len) if args.start else None
    space, starts = first_candidates(args, problem, start)
    ropes = ropes_to_compare(args, problem)
    found = windows(read_documents(args.data, 5 * args.len), tokenizer, args.len, 2 * args.samples)
    if len(found) < args.samples:
        say(f"only {len(found)} documents are long enough, not {args.samples}: give more for factors to rely on")
        args.samples = len(found)
    documents = [tokens for _, tokens in found]  # those not searched on are to compare on

    same = ("len", "seed", "samples", "population_size", "num_mutations", "num_crossovers", "num_parents", "n_hat",
            "attention_factor", "slow_least", "short", "screening", "context_parallel")
    setup = describe(model, tokenizer) | {key: getattr(args, key) for key in same} | {
        "data_sha256": data_hash(documents), "base": rope_to_dict(problem.rope),
        "starts": sha256_of([asdict(c) for c in starts])}
    record = {"model": str(args.model), "data": [name for name, _ in found[:args.samples]],
              "data_sha256": setup["data_sha256"], "target_length": args.len, "seed": args.seed} | recorded(args)
    journal = Journal(args.out / "history.jsonl", setup, record)
    left = max(0, args.max_evals - sum("genes" in row for row in journal.rows))
    say_cost(args, model, documents[0], left, len(documents) * (len(ropes) + 1))
    evaluate = Evaluator(args, model, problem, documents[:args.samples], journal, record)
    best = search(args, np.random.default_rng(args.seed), starts, space, evaluate)
    evaluate.bar.close()

    if start:
        ropes["start"] = problem.put(next(iter(starts)), args.len)
    ropes["searched"] = problem.put(best, args.len)
    rows = compare(args, model, ropes, documents, journal)
    say_table(rows, args.len, args.samples, len(documents) - args.samples)
    kept = "searched"
    if args.short:  # the set found may well be worse than plain RoPE or the long set, which its range does not reach
        base, least = np.array(problem.base.rescale_factors), np.array(space.smallest) - 0.005
        allowed = [row for row in rows if (ropes[row["rope"]].at(args.len).rescale_factors / base >= least).all()]
        kept = min(reversed(allowed), key=lambda row: row["search"])["rope"]  # a tie is the search's
        if kept != "searched":
            say(f"so rope.json has {'plain RoPE' if kept == 'none' else 'the long set'} up to {args.len} tokens")
    evaluate.rope, evaluate.best = ropes[kept], next(row["search"] for row in rows if row["rope"] == kept)
    evaluate.save(kept=kept, comparison=rows)
    if rank() == 0:
        plot(ropes, args.len, journal.rows, bool(args.slow_least), args.out / "search.png")
    say(f"\nwrote {args.out / 'rope.json'}, history.jsonl and search.png")
    if args.export and rank() == 0:
        model.rope = ropes[kept]
        export(model, args.export)
        say(f"wrote {args.export}, a Hugging Face directory")


if __name__ == "__main__":
    run(main)
