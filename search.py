"""Search the rescale factors of LongRoPE: Algorithm 1 of the paper (arXiv 2402.13753), an evolution over perplexity.

    $ python search.py                                        # the bundled model, 8 times its window
    $ python search.py --model DIR --data books/ --len 131072
    $ torchrun --nproc-per-node 8 search.py --model DIR --data books/ --len 262144      # the same result, sooner
    $ python search.py --fitness needle --start-from out/search-8192/rope.json --out out/needle   # from factors found
    $ python search.py --model FINETUNED --init FINETUNED/rope.json --len 2097152       # second stage, no more training
    $ python search.py --model FINETUNED --init FINETUNED/rope.json --short --len 8192  # short-window recovery

An individual is one lambda for each rotary pair and one n_hat. In --out: rope.json, the best one so far at any time;
history.jsonl, a line for each individual evaluated, from which --resume goes on; search.png.
"""
import argparse
import itertools
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from eval_passkey import make_prompt
from longrope import (
    NAMED,
    Rope,
    UserError,
    Window,
    add_arguments,
    barrier,
    begin,
    data_hash,
    describe,
    duration,
    forward_flops,
    load_tokenizer,
    rank,
    read_documents,
    resolve_rope,
    run,
    save_config,
    say,
    say_start,
    set_aside,
    spread,
    su_factor,
    utilisation,
    whole_file,
    window_nll,
    windows,
    world_size,
    yarn_factor,
)

N_HAT = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)  # table 4 of the paper
BASELINES = NAMED[1:]
PAPER = {"samples": 5, "population_size": 64, "num_mutations": 16, "num_crossovers": 16, "num_parents": 32,
         "iterations": 40}
PAPER_ABOVE_512K = PAPER | {"samples": 3, "population_size": 32, "num_mutations": 8, "num_crossovers": 8}
ON_CPU = {"samples": 2, "population_size": 16, "num_mutations": 5, "num_crossovers": 3, "num_parents": 6,
          "iterations": 5}


# ---------------------------------------------------------------------------------------------------------------------
# The search space and its operators.


@dataclass(frozen=True)
class Individual:
    """One point of the search space. Equal genes make equal individuals, wherever they come from."""
    factors: tuple           # lambda_i, (D/2,), multiples of 0.01 between Space's bounds, non-decreasing
    n_hat: int               # one of Space.n_hats
    attention_factor: float  # a gene too with --attention-factor search
    origin: str = field(compare=False)


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


def mutate(rng, parent, prob, space):
    """Each gene, with probability `prob`, anew: lambda_i between its neighbours as they then are, n_hat from its set.

    So the constraint holds without sorting, and a gene that is not mutated keeps its value.
    """
    factors = [1.0, *parent.factors, space.largest]
    for i in range(1, len(factors) - 1):
        if rng.random() < prob:
            factors[i] = draw(rng, max(factors[i - 1], space.smallest[i - 1]), factors[i + 1])
    n_hat = int(rng.choice(space.n_hats)) if rng.random() < prob else parent.n_hat
    attention_factor, (low, high) = parent.attention_factor, space.attention
    if low < high and rng.random() < prob:
        attention_factor = draw(rng, low, high)
    return Individual(tuple(factors[1:-1]), n_hat, attention_factor, "mutation")


def shift(rng, parent, space):
    """lambda_a .. lambda_(b-1) times one number, log-uniform within what their neighbours and bounds allow.

    Good factors are smooth in i, and `mutate`, pair by pair, hardly moves one whose neighbours are close.
    """
    factors = np.array([1.0, *parent.factors, space.largest])
    a, b = sorted(rng.choice(np.arange(1, len(factors)), 2, replace=False))
    low = max(factors[a - 1] / factors[a], (space.smallest[a - 1:b - 1] / factors[a:b]).max())
    high = factors[b] / factors[b - 1]
    factors[a:b] *= low * (high / low) ** rng.random()
    return replace(parent, factors=tuple(np.round(factors[1:-1], 2).tolist()), origin="mutation")


def crossover(rng, a, b):
    """Every gene from one of two parents, by a coin for each gene.

    Where the coin's parent would break the constraint the gene comes from the parent of the gene before, whose own
    order guarantees that it fits. The walk goes up or down by another coin: always upward would favour large factors.
    """
    up = bool(rng.integers(2))
    factors, parent = [], a
    for i in range(len(a.factors)) if up else reversed(range(len(a.factors))):
        other = (a, b)[rng.integers(2)]
        if not factors or (other.factors[i] >= factors[-1] if up else other.factors[i] <= factors[-1]):
            parent = other
        factors.append(parent.factors[i])
    n_hat, attention_factor = (a, b)[rng.integers(2)].n_hat, (a, b)[rng.integers(2)].attention_factor
    return Individual(tuple(factors if up else factors[::-1]), n_hat, attention_factor, "crossover")


def unseen(make, count, seen):
    """Up to `count` individuals from make(), none of them twice and none in `seen`."""
    made = {}
    for _ in range(100 * count):  # a space almost used up ends here
        if len(made) == count:
            break
        individual = make()
        if individual not in seen:
            made[individual] = None
    return list(made)


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1.


def search(args, rng, starts, space, evaluate):
    """The best individual after `args.iterations` generations, or `args.max_evals` evaluations.

    starts: PI, NTK and YaRN as individuals, and what else the search begins with. evaluate(population, iteration,
    parents' NLLs) -> {individual: NLL of each document, or None if racing dropped it}.
    """
    mutants = unseen(lambda: mutate(rng, starts[rng.integers(len(starts))], args.mutation_prob, space),
                     args.population_size - len(starts), set(starts))
    population = (starts + mutants)[:args.population_size]
    nlls, parents = {}, []  # of every individual ever evaluated; the top k
    for iteration in range(args.iterations + 1):
        population = population[:args.max_evals - len(nlls)]
        nlls |= evaluate(population, iteration, [nlls[p] for p in parents])
        candidates = [i for i in (*parents, *population) if nlls[i]]
        parents = sorted(candidates, key=lambda i: math.fsum(nlls[i]))[:args.num_parents]
        if iteration == args.iterations or len(nlls) == args.max_evals:
            return parents[0]
        mutants = unseen(lambda: mutant(args, rng, parents[rng.integers(len(parents))], space),
                         args.screening * args.num_mutations, nlls)
        children = unseen(lambda: crossover(rng, *(parents[i] for i in rng.choice(len(parents), 2, replace=False))),
                          args.screening * args.num_crossovers if len(parents) > 1 else 0, {*nlls, *mutants})
        population = mutants + children  # the parents stay, with the perplexity they have
        if args.screening > 1:
            population = promising(population, nlls, args.num_mutations + args.num_crossovers)


def mutant(args, rng, parent, space):
    """The paper's mutation; with screening half of the time ours, of neighbouring pairs together."""
    if args.screening > 1 and rng.integers(2):
        return shift(rng, parent, space)
    return mutate(rng, parent, args.mutation_prob, space)


def promising(children, nlls, count):
    """Screening: the `count` of `children` whose NLL a Gaussian process expects to be lowest.

    It is fitted to the best 200 individuals measured so far: x = (log lambda, n_hat, attention factor), y = log(NLL -
    0.99 of the lowest NLL), which spreads out the good ones; the kernel is exp(-|x - x'|^2 / 2 l^2) with noise on the
    diagonal, l and noise of the highest likelihood. No randomness and one thread: all processes choose the same.
    """
    totals = {i: total for i, nll in nlls.items() if nll and (total := math.fsum(nll)) < math.inf}
    best = sorted(totals, key=totals.get)[:200]
    if not (best and children):
        return children[:count]

    def features(individuals):  # (N, D/2 + 2), so scaled that a step in each matters alike
        return torch.tensor([(*map(math.log, i.factors), math.log2(1 + i.n_hat) / 10, 10 * i.attention_factor)
                             for i in individuals], dtype=torch.float64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, new = features(best), features(children)
    total = torch.tensor([totals[i] for i in best], dtype=torch.float64)
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
    return [children[i] for i in expected.argsort(stable=True)[:count]]


def hopeless(nll, parents, num_parents):
    """Racing: would a candidate with `nll` on the first m of n documents have to be lucky to come before a parent?

    What counts is how much worse it is than the parents' mean on the same documents, so their own difficulty cancels:
    more than the worst parent is on all n, plus one standard error sigma sqrt(1/m - 1/n), where sigma is how much the
    parents' own differences vary from document to document. Until there are k parents nobody is dropped.
    """
    if len(parents) < num_parents or not np.isfinite(parents).all():
        return False
    m, parents = len(nll), np.array(parents)  # (k, n)
    mean = parents.mean(axis=0)
    differences = (parents - mean).mean(axis=1)  # (k,)
    sigma = (parents - mean - differences[:, None]).std()
    behind = np.mean(np.array(nll) - mean[:m]) - differences.max()
    return bool(behind > sigma * math.sqrt(1 / m - 1 / parents.shape[1]))


class Evaluator:
    """Measures populations for `search`, and keeps what it leaves behind: the bar, history.jsonl, the best rope.json.

    The unit of work is one individual on one document. A round takes one from each of as many individuals as there are
    processes; racing decides after the round, by the individual's own NLLs and the last generation's parents alone. So
    results do not depend on the number of processes.
    """

    def __init__(self, args, model, found, make_rope, setup):
        self.args, self.model, self.found, self.make_rope = args, model, found, make_rope
        self.best, self.count, self.documents = math.inf, 0, 0
        self.flops_per_token = forward_flops(model, args.len) / args.len
        self.record = {
            "model": str(args.model), "data": [w.document for w in found], "data_sha256": data_hash(found),
            "target_length": args.len, "fitness": args.fitness, "seed": args.seed,
            "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
                          if k not in ("out", "resume")},
            **{k: setup[k] for k in ("dtype", "attention", "versions")}}
        self.known, self.history = open_history(args.out / "history.jsonl", setup, args.resume)
        self.measured, self.begun = 0, time.perf_counter()  # in this run, for the speed; all processes are here
        self.bar = tqdm(total=args.max_evals, desc="search", unit="candidate", smoothing=0.05, disable=rank() > 0)

    def __call__(self, population, iteration, parents):
        assert all(is_monotone(individual.factors) for individual in population)
        nlls, waiting, active = {}, list(population), []
        while waiting or active:
            while waiting and len(active) < world_size():
                individual = waiting.pop(0)
                if (key := genes(individual)) in self.known:  # measured before --resume, and rope.json written
                    nlls[individual] = self.finish(individual, *self.known[key], save=False)
                else:
                    active.append((individual, [], time.perf_counter()))
            values = spread(self.measure, [(individual, len(nll)) for individual, nll, _ in active])
            self.measured += len(values)
            for one, value in zip(list(active), values):
                individual, nll, begun = one
                nll.append(value)
                whole = len(nll) == len(self.found)
                if whole or self.args.racing and hopeless(nll, parents, self.args.num_parents):
                    nlls[individual] = self.finish(individual, nll, whole)
                    self.note(individual, iteration, nll, time.perf_counter() - begun)
                    active.remove(one)
        return nlls

    def measure(self, task):
        """Summed -log p of one document under one individual."""
        individual, document = task
        self.model.rope = self.make_rope(individual)
        window = self.found[document]
        nll = window_nll(self.model, window.tokens, window.first).sum().item()
        return nll if math.isfinite(nll) else math.inf

    def note(self, individual, iteration, nll, seconds):
        """A line of history.jsonl."""
        if self.history:
            ppl = perplexity_of(nll, self.found) if len(nll) == len(self.found) else None
            self.history.write(json.dumps({
                "iteration": iteration, "origin": individual.origin, "genes": json.loads(genes(individual)),
                "nll": nll, "ppl": ppl, "seconds": round(seconds, 3)}) + "\n")
            self.history.flush()

    def finish(self, individual, nll, whole, save=True):
        """Count an individual that is measured, or dropped. Returns its NLLs, or None."""
        self.count, self.documents = self.count + 1, self.documents + len(nll)
        if whole and (ppl := perplexity_of(nll, self.found)) < self.best:
            self.best = ppl
            if save:
                self.save(self.make_rope(individual))
        speed = self.measured * self.args.len / (time.perf_counter() - self.begun)
        mfu = utilisation(speed * self.flops_per_token, 1, self.model.unembedding.device)
        self.bar.set_postfix_str(f"best perplexity {self.best:.3f}, {speed:.3g} tokens/s"
                                 + (f", MFU {mfu:.0%}" if mfu else ""))
        self.bar.update()
        return nll if whole else None

    def save(self, rope, **extra):
        if rank() == 0:
            rope.save(self.args.out / "rope.json", search=self.record | {
                "perplexity": self.best, "evaluations": self.count, "document_evaluations": self.documents} | extra)


def genes(individual):
    """The key of an individual in history.jsonl."""
    return json.dumps({"factors": individual.factors, "n_hat": individual.n_hat,
                       "attention_factor": individual.attention_factor})


def open_history(path, setup, resume):
    """({genes: (NLLs, on all documents?)} measured before, the open file). What follows a damaged line is left out.

    Raises UserError if the file is another search's. Only the first process writes.
    """
    lines = []
    if resume and path.exists():
        for text in path.read_text().split("\n")[:-1]:
            try:
                lines.append(dict(json.loads(text)))
            except (ValueError, TypeError):
                break
        if not lines or "setup" not in lines[0] or any("genes" not in line for line in lines[1:]):
            raise UserError(f"{path}: not a history that can be resumed; start without --resume")
        if differs := [key for key in setup if lines[0]["setup"].get(key) != setup[key]]:
            raise UserError(f"{path} is of a search with another {', '.join(differs)}; resume with the same, or start "
                            "without --resume")
    known = {json.dumps(line["genes"]): (line["nll"], line["ppl"] is not None) for line in lines[1:]}
    barrier()  # all have read it before the first writes it
    if rank() > 0:
        return known, None
    old = [p for p in (path, path.with_name("rope.json")) if p.exists()]
    if old and not lines:
        say(f"starting afresh (--resume goes on with a history.jsonl): {set_aside(old)}")
    part = path.with_name(path.name + ".part")  # the old one stays until what goes on from it is whole
    file = open(part, "w")
    file.writelines(json.dumps(line) + "\n" for line in lines or [{"setup": setup}])
    file.flush()
    part.replace(path)
    return known, file


def perplexity_of(nlls, found):
    """exp(total NLL / total tokens) over the windows."""
    mean = math.fsum(nlls) / sum(len(w.tokens) - w.first for w in found)
    return math.exp(mean) if mean < 700 else math.inf


# ---------------------------------------------------------------------------------------------------------------------
# What is searched: the factors of a plain model, a second stage on top of those of --init, or their short set.


def start_of(args, model, init):
    """(starts, space, make_rope, ropes to compare with) of the search that the arguments ask for. init: the rope of
    --init, or None. That of --start-from is compared as it is after being put into the space, as an individual."""
    start = {"start": resolve_rope(args.start, model, args.len).at(args.len)} if args.start else {}
    starts, space, make_rope, compared = (recovery if args.short else extension)(args, model, init, start)
    for name, given in start.items():
        compared[name] = make_rope(starts[0])
        used = compared[name].at(args.len)
        if not np.allclose(used.rescale_factors, given.rescale_factors, atol=0.01) or used.n_hat != given.n_hat:
            say(f"--start-from: put into the space of this search, factors rising from 1 to {space.largest:g}"
                f"{' times those of --init' if init and not args.short else ''}"
                f"{f', those of slow pairs from {space.smallest[-1]:g}' if args.slow_least else ''}, "
                f"n_hat {used.n_hat}")
    return starts, space, make_rope, compared


def extension(args, model, init, start):
    """A longer window: a first stage from the factors that the model was trained with, or a second one from those of
    --init. Factors found are multiplied onto them: lambda = lambda_finetuned * lambda_second."""
    trained = model.config.rope.trained
    base = init or trained
    window = round(base.scale * model.window)
    scale = args.len / window
    if scale <= 1:
        raise UserError(f"--len {args.len}: nothing to extend, the window is {window} already")
    total_scale = scale * base.scale
    attention, attention_range = attention_factors(args, total_scale, model.window)
    short = base.short or trained

    def extended(rope):
        return replace(base, rescale_factors=base.times(rope).rescale_factors, scale=total_scale)

    def make_rope(individual):
        rope = extended(replace(base, rescale_factors=individual.factors))
        return replace(rope, n_hat=individual.n_hat, attention_factor=individual.attention_factor, short=short,
                       short_max_length=base.short_max_length or model.window)
    named = formulas(model, window, scale)
    compared = {"none": base} | {
        name: replace(extended(rope), attention_factor=yarn_factor(total_scale) if name == "yarn" else
                      base.attention_factor) for name, rope in named.items()}
    relative = {name: replace(rope, rescale_factors=tuple(np.divide(rope.rescale_factors, base.rescale_factors)))
                for name, rope in start.items()}
    smallest = least_factors(args, base, window, scale)
    starts, space = into_space(args, relative | named, base.n_hat, scale, attention, attention_range, smallest)
    return starts, space, make_rope, compared


def recovery(args, model, init, start):
    """The short set of --init, which a model fine-tuned for a longer window takes up to --len tokens. lambda goes up to
    min(s, 5), with the same margin as elsewhere, or as far as --len is beyond the window, on top of the factors that
    the model was trained with."""
    trained, window = model.config.rope.trained, round(init.scale * model.window)
    if args.len >= window:
        raise UserError(f"--short --len {args.len}: the long set would never be used, it is for {window} tokens")
    beyond = args.len / model.window
    scale = max(min(init.scale, 5.0), max(beyond, 1.0) * max(trained.rescale_factors))  # Llama 3.1's own reach 8
    attention, attention_range = attention_factors(args, init.scale, model.window)

    def with_short(short):
        return replace(init, short=short, short_max_length=max(args.len, model.window))

    def make_rope(individual):
        return with_short(Rope(individual.factors, init.rope_theta, model.window, 1.0, individual.n_hat,
                               individual.attention_factor))
    named = formulas(model, model.window, beyond if beyond > 1 else scale)
    if beyond > 1:  # a short set for more than the window: begin as for so much
        named = {name: trained.times(rope) for name, rope in named.items()}
        if args.attention_factor == "search":
            attention = round(su_factor(beyond, model.window), 2)
    least = least_factors(args, trained, model.window, beyond)
    smallest = np.where(least > 1, np.round(least * trained.rescale_factors, 2), 1.0)
    starts, space = into_space(args, start | {"none": trained, "long": init} | named, init.n_hat, scale, attention,
                               attention_range, smallest)
    # in what is exported transformers gives the long set's attention factor to plain RoPE, too
    plain = replace(trained, attention_factor=init.attention_factor) if args.export else trained
    return starts, space, make_rope, {"none": with_short(plain), "long": replace(init, short=None)}


def least_factors(args, base, window, scale):
    """The least factors, on top of those of `base`, for `scale` times its window, (D/2,): 1, or with --slow-least R
    for slow pairs R s. With less than s they reach angles beyond the window that the model never saw."""
    slow = base.turns(window) < 1  # (D/2,)
    least = max(1.0, round((args.slow_least or 0) * scale, 2))
    if args.slow_least and (scale <= 1 or least == 1 or not slow.any()):
        raise UserError(f"--slow-least {args.slow_least:g} bounds nothing: " + (
            f"{args.len} tokens are within the window of {window}" if scale <= 1 else
            f"{args.slow_least:g} times s = {scale:.4g} is no more than 1" if least == 1 else
            f"every pair makes a full turn within the window of {window} tokens"))
    return np.where(slow, least, 1.0)


def formulas(model, window, scale):
    """PI, NTK and YaRN from a window, in tokens, to `scale` times it."""
    rope = model.config.rope
    return {name: getattr(Rope, name)(model.config.head_dim, rope.rope_theta, window, scale) for name in BASELINES}


def into_space(args, ropes, n_hat, scale, attention, attention_range, smallest):
    """(individuals, space): the ropes as first individuals, put into the space whatever they were; `smallest`, (D/2,),
    is its least lambda_i once made non-decreasing. Where the attention factor is searched, those that the model knows
    and that of --start-from, which has its own n_hat too, begin with their own."""
    largest, n_hats = round(1.25 * scale, 2), N_HAT if args.n_hat is None else (args.n_hat,)
    starts, (low, high), smallest = [], attention_range, np.maximum.accumulate(smallest)
    for name, rope in ropes.items():
        factors = np.maximum.accumulate(np.clip(rope.rescale_factors, smallest, largest))
        own = attention if name in BASELINES or low == high else round(min(max(rope.attention_factor, low), high), 2)
        first = min(n_hats, key=lambda n, own=rope.n_hat if name == "start" else n_hat: abs(n - own))
        starts.append(Individual(tuple(np.round(factors, 2).tolist()), first, own, name))
    starts = list(dict.fromkeys(starts))  # two can be the same, as long factors that are PI's
    return starts, Space(tuple(smallest.tolist()), largest, n_hats, attention_range)


def attention_factors(args, scale, window):
    """The attention factor to start with, and its (lowest, highest). Searched, it goes from 1 to 1.25 su by 0.01."""
    su = su_factor(scale, window)
    match args.attention_factor:
        case "su":
            fixed = su
        case "yarn":
            fixed = yarn_factor(scale)
        case "none":
            fixed = 1.0
        case "search":
            return round(su, 2), (1.0, round(1.25 * su, 2))
        case number:
            try:
                fixed = float(number)
            except ValueError:
                fixed = math.nan
            if not 0 < fixed < math.inf:
                raise UserError(f"--attention-factor {number}: give su, yarn, none, search or a number above 0")
    return fixed, (fixed, fixed)


def windows_of(args, tokenizer):
    """Twice as many as are searched on, if there are: the others are to compare on."""
    count = 2 * args.samples
    if args.fitness == "needle" and not args.data:
        return needle_windows([(f"pass key {i}", None) for i in range(count)], tokenizer, args.len, args.seed)
    found = windows(read_documents(args.data, 5 * args.len), tokenizer, args.len, count)
    if args.fitness == "ppl":
        return found
    bos = len(tokenizer.encode("").ids)  # the prompt brings its own
    return needle_windows([(w.document, w.tokens[bos:].tolist()) for w in found], tokenizer, args.len, args.seed)


def needle_windows(fillers, tokenizer, length, seed):
    """Needle fitness (LongRoPE2, arXiv 2502.20082): a pass key near the start of a long text, the question at its end,
    and only the answer's tokens are scored. fillers: (name, tokens, or None for the pass-key protocol's own)."""
    rng, made = np.random.default_rng(seed), []
    for name, filler in fillers:
        depth, key = float(rng.uniform(0, 0.1)), str(rng.integers(10_000, 100_000))
        tokens, count = make_prompt(tokenizer, length, depth, key, filler)
        made.append(Window(name, torch.tensor(tokens), len(tokens) - count))
    return made


# ---------------------------------------------------------------------------------------------------------------------
# What the user sees.


def compare(model, ropes, searched, held_out):
    """A row for each rope: its perplexity on the search's windows and on windows the search did not see."""
    bar = tqdm(total=len(ropes) * (len(searched) + len(held_out)), desc="compare", unit="window", leave=False,
               disable=rank() > 0)
    rows = []
    for name, rope in ropes.items():
        def measure(w, rope=rope):
            model.rope = rope
            bar.update(world_size())
            return window_nll(model, w.tokens, w.first).sum().item()
        row = {"rope": name, "attention_factor": rope.at(len(searched[0].tokens)).attention_factor}
        for where, found in (("search", searched), ("unseen", held_out)):
            row[where] = perplexity_of(spread(measure, found), found) if found else None
        rows.append(row)
    bar.close()
    return rows


def say_table(rows, length, searched, held_out, fitness):
    say(f"\nperplexity{' of the answer' if fitness == 'needle' else ''} at {length} tokens, one window a document")
    say(f"{'rope':10}{'attention factor':>18}{f'{len(searched)} searched on':>18}{f'{len(held_out)} unseen':>14}")
    for row in rows:
        on, off = ("-" if ppl is None else f"{ppl:.3f}" if ppl < 1e6 else f"{ppl:.2e}"  # a pass key can be hopeless
                   for ppl in (row["search"], row["unseen"]))
        say(f"{row['rope']:10}{row['attention_factor']:18.3f}{on:>18}{off:>14}")
    for where in ("search", "unseen") if held_out else ("search",):
        other = min(rows[:-1], key=lambda row: row[where])
        gain = 1 - rows[-1][where] / other[where]
        what = "as good as" if gain == 0 else f"{abs(gain):.1%} {'below' if gain > 0 else 'above'}"
        say(f"{where} documents: searched is {what} {other['rope']}, the best of the others")
    if not held_out:
        say("give more documents, or fewer --samples, to compare on some that the search did not see")


def plot(ropes, length, history, path):
    """Left: lambda of each pair for each method. Right: every individual, and the best one as the search went on."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colors = dict(zip(ropes, ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7"))) | {"searched": "black"}
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, rope in ropes.items():
        rope = rope.at(length)
        label = f"{name}, $\\hat n$ = {rope.n_hat}" if name == "searched" else name
        left.plot(rope.rescale_factors, label=label, color=colors[name], lw=2 if name == "searched" else 1.5)
    left.set(xlabel="rotary pair i", ylabel=r"rescale factor $\lambda_i$", yscale="log",
             title=f"factors for {length} tokens")
    left.legend()

    first, *lines = [json.loads(line) for line in history.read_text().splitlines()]
    ppl = np.array([line["ppl"] or np.nan for line in lines])  # none where racing dropped it
    best = np.fmin.accumulate(ppl)
    as_baseline, as_all = ", the same attention factor", ", bounded" * bool(first["setup"].get("slow_least"))
    right.plot(range(1, len(ppl) + 1), ppl, ".", color="#999999", ms=4, label="an individual")
    right.step(range(1, len(ppl) + 1), best, where="post", color="black", lw=2, label="the best so far")
    for line in lines:
        if line["origin"] in colors:
            right.axhline(line["ppl"], lw=1, ls="--", color=colors[line["origin"]],
                          label=line["origin"] + as_baseline * (line["origin"] in BASELINES) + as_all)
    spread_of_good = max(np.median(ppl[np.isfinite(ppl)]) - best[-1], 0.01 * best[-1])
    right.set(xlabel="individuals evaluated", ylabel="perplexity on the search's documents", title="search",
              ylim=(best[-1] - 0.5 * spread_of_good, best[-1] + 5 * spread_of_good))
    right.legend(loc="upper right")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def say_cost(args, model, searched, compared, begun):
    """The first lines: what a candidate, the whole search and the comparison of `compared` windows after it will take,
    from one probe of the machine, and what it took to start since `begun`."""
    on_cpu = model.unembedding.device.type == "cpu"
    probe = searched[0].tokens[:2048] if on_cpu else searched[0].tokens
    window_nll(model, probe)  # the first call warms up
    warm = time.perf_counter()
    window_nll(model, probe)
    a_window = (time.perf_counter() - warm) * forward_flops(model, args.len) / forward_flops(model, len(probe))
    a_candidate, processes, total = a_window * len(searched), world_size(), args.max_evals
    history = args.out / "history.jsonl"
    if args.resume and history.is_file():
        total = max(0, total - len(history.read_text().splitlines()[1:]))
    say(f"one candidate ({len(searched)} documents of {args.len} tokens) takes about {duration(a_candidate)}, the "
        f"{'whole search' if total == args.max_evals else 'rest of the search'} ({total} candidates"
        f"{f' on {processes} processes' if processes > 1 else ''}) up to about "
        f"{duration(total * a_candidate / processes)}, the comparison after it "
        f"{duration(compared * a_window / processes)}")
    say_start(model, warm - begun)
    if on_cpu and total * a_candidate > 1800:
        shorter = f"--len {8 * model.window} or " if args.len > 8 * model.window else ""
        say(f"that is long for a CPU: try {shorter}a smaller --max-evals")


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(p)
    p.add_argument("--len", type=int, help="target length in tokens (default: 8 times the model's window; with "
                                           "--short the window)")
    for key, what in {"samples": "documents a candidate is evaluated on", "population_size": "first individuals, P",
                      "num_mutations": "mutants in an iteration, N1", "num_crossovers": "children in an iteration, N2",
                      "num_parents": "how many of the best mutate and cross, k",
                      "iterations": "generations after the first, T"}.items():
        halved = f", {PAPER_ABOVE_512K[key]} above 512k tokens" if PAPER_ABOVE_512K[key] != PAPER[key] else ""
        p.add_argument(f"--{key.replace('_', '-')}", type=int,
                       help=f"{what} (default: the paper's {PAPER[key]}{halved}; {ON_CPU[key]} on a CPU)")
    p.add_argument("--mutation-prob", type=float, default=0.3, help="a gene's probability to mutate, p (default: 0.3)")
    p.add_argument("--n-hat", type=int, help="fix n_hat, 0 to leave it out (default: a gene, from the paper's set)")
    p.add_argument("--attention-factor", metavar="su|yarn|none|NUMBER|search",
                   help="su = sqrt(1 + ln s / ln L0), yarn = 0.1 ln s + 1, none = 1, search = a gene (default: su; "
                   "with --short and no --export: search, since Hugging Face has but one for both sets)")
    p.add_argument("--slow-least", type=float, metavar="R",
                   help="no factor below R s, R up to 1.25, for the slow pairs, those that make no full turn within "
                   "the window, so that they reach no angle the model never saw (LongRoPE2: R = 1; README has what "
                   "1.19 does to pass keys). With --init s and window are those of the second stage, with --short s "
                   "is --len over the window (default: no such bound, as in the paper)")
    p.add_argument("--fitness", choices=["ppl", "needle"], default="ppl",
                   help="perplexity of whole documents, or of the answer where a pass key is hidden near their start "
                   "and asked for at their end (without --data in the pass-key protocol's own sentences) "
                   "(default: ppl)")
    p.add_argument("--start-from", dest="start", type=Path, metavar="ROPE",
                   help="a rope.json, say one found with another --fitness: beside PI, NTK and YaRN its factors, put "
                   "within this search's bounds, and mutants of them are first individuals; its attention factor "
                   "is used only with --attention-factor search")
    p.add_argument("--init", type=Path, metavar="ROPE",
                   help="rope.json of a fine-tuned model: search a second stage, to be multiplied onto its factors "
                   "(with --short: of any model that has a long set)")
    p.add_argument("--short", action="store_true", help="search the short set of --init, for lengths up to --len")
    p.add_argument("--screening", type=int, default=64, metavar="N",
                   help="make N times as many mutants and children and evaluate those that a Gaussian process on all "
                   "evaluated before finds most promising; 1 is the paper's search (default: 64)")
    p.add_argument("--no-racing", dest="racing", action="store_false",
                   help="evaluate every candidate on all documents; with --screening 1 to the letter of the paper")
    p.add_argument("--max-evals", type=int, help="stop after so many candidates, the first population among "
                   "them (default: no limit)")
    p.add_argument("--out", type=Path, help="directory of the result (default: out/search-LEN)")
    p.add_argument("--resume", action="store_true", help="go on from history.jsonl in --out")
    p.add_argument("--export", type=Path, metavar="DIR",
                   help="write the model with the result as a Hugging Face directory, its weights as hard links")
    p.add_argument("--allow-n-hat", action="store_true",
                   help="export n_hat above 0 all the same: only this program, by rope.json, will use it")
    return p


def check_export(args, model, space, init):
    """Before the search: nothing is overwritten, and its result is not one that config.json cannot say."""
    if args.export.resolve() == model.path.resolve():
        raise UserError(f"--export {args.export} is the model's own directory")
    kept = init if args.short else init and init.short  # of the two sets of --init the one that is not searched
    n_hats = {kept.n_hat if kept else 0, *([] if args.resume else space.n_hats)}  # what is found may well be 0
    if any(n_hats) and not args.allow_n_hat:
        raise UserError("--export: config.json cannot say n_hat above 0: search without it (--n-hat 0), or give "
                        "--allow-n-hat" + (" (that of --init is above 0)" if not any(space.n_hats) else
                                           ", or export with --resume when the search has found n_hat 0"))


def export(model, path):
    """A Hugging Face directory of the model with its rope. The search changes no weights, so they are hard links."""
    save_config(model, path)
    for old in path.glob("*.safetensors*"):
        old.unlink()
    for file in model.path.glob("*.safetensors*"):
        try:
            os.link(file.resolve(), path / file.name)  # the Hub's cache holds symbolic links
        except OSError:  # another file system
            with whole_file(path / file.name) as part:
                shutil.copyfile(file, part)


def fill_in(args, model):
    """Defaults that depend on the model and the machine, and checks."""
    if args.len is None:
        args.len = model.window if args.short else 8 * model.window
    if args.len < 2:
        raise UserError(f"--len {args.len}: nothing to predict")
    what = ("-short" if args.short else "") + ("-needle" if args.fitness == "needle" else "")
    args.out = args.out or Path(f"out/search-{args.len}{what}")
    paper = PAPER_ABOVE_512K if args.len > 512 * 1024 else PAPER
    args.attention_factor = args.attention_factor or ("search" if args.short and not args.export else "su")
    for key, value in (ON_CPU if model.unembedding.device.type == "cpu" else paper).items():
        setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
        least = {"population_size": 3 + bool(args.start),  # PI, NTK, YaRN
                 "num_parents": 2, "samples": 1}.get(key, 0)  # two to cross
        if getattr(args, key) < least:
            raise UserError(f"--{key.replace('_', '-')} must be at least {least}")
    total = args.population_size + args.iterations * (args.num_mutations + args.num_crossovers)
    args.max_evals = total if args.max_evals is None else min(args.max_evals, total)
    if args.max_evals < 1 or not 0 <= args.mutation_prob <= 1:
        raise UserError("--max-evals must be at least 1 and --mutation-prob between 0 and 1")
    if args.screening < 1:
        raise UserError("--screening must be at least 1")
    if args.n_hat is not None and args.n_hat < 0:
        raise UserError("--n-hat must be 0 or more")
    if args.slow_least is not None and not 0 < args.slow_least <= 1.25:
        raise UserError(f"--slow-least {args.slow_least:g}: give a number above 0 and at most 1.25, as no factor is "
                        "above 1.25 s")
    if args.start and not args.start.is_file():
        raise UserError(f"--start-from {args.start}: no such file")
    if args.start and args.start.resolve() == (args.out / "rope.json").resolve():
        raise UserError(f"--start-from {args.start} is where the result goes: give another --out")
    if args.short and not args.init:
        raise UserError("--short searches the short set of an extended model: give its rope.json with --init")


def main(argv=None):
    begun, args = time.perf_counter(), parser().parse_args(argv)
    model = begin(args)
    tokenizer = load_tokenizer(args.model)
    fill_in(args, model)
    model.check_length(args.len)
    init = resolve_rope(args.init, model) if args.init else None
    starts, space, make_rope, others = start_of(args, model, init)
    if args.export:
        check_export(args, model, space, init)
    found = windows_of(args, tokenizer)
    searched, held_out = found[:args.samples], found[args.samples:]
    say_cost(args, model, searched, len(found) * (len(others) + 1), begun)
    if len(searched) < args.samples:
        say(f"only {len(searched)} documents are long enough, not {args.samples}: give more for factors to rely on")

    same = ("len", "fitness", "seed", "population_size", "num_mutations", "num_crossovers", "num_parents", "n_hat",
            "mutation_prob", "attention_factor", "slow_least", "short", "racing",
            "screening")  # what a resumed search must agree in
    setup = describe(model, args) | {"data_sha256": data_hash(searched), "init": init and init.to_dict(),
                                     "start": args.start and others["start"].to_dict()}
    setup |= {key: getattr(args, key) for key in same}
    args.out.mkdir(parents=True, exist_ok=True)
    evaluate = Evaluator(args, model, searched, make_rope, setup)
    try:
        best = search(args, np.random.default_rng(args.seed), starts, space, evaluate)
    except KeyboardInterrupt:
        evaluate.bar.close()
        best = f"the best so far is in {args.out / 'rope.json'}, " if math.isfinite(evaluate.best) else ""
        sys.exit(f"\nstopped after {evaluate.count} candidates; {best}the same command with --resume goes on")
    evaluate.bar.close()

    ropes = others | {"searched": make_rope(best)}
    rows = compare(model, ropes, searched, held_out)
    kept, extra = "searched", {"comparison": {"unseen": [w.document for w in held_out], "rows": rows}}
    if args.short:  # the set found may well be worse than plain RoPE or the long set, which its range does not reach
        used = {name: np.array(rope.at(args.len).rescale_factors) for name, rope in ropes.items()}
        allowed = [row for row in rows if (used[row["rope"]] + 0.005 >= space.smallest).all()]
        row = min(reversed(allowed), key=lambda row: row["search"])  # a tie is the search's
        kept = row["rope"]
        extra |= {"kept": kept, "perplexity": row["search"]}
    evaluate.save(ropes[kept], **extra)
    say_table(rows, args.len, searched, held_out, args.fitness)
    if args.short and (less := min(rows, key=lambda row: row["search"]))["search"] < row["search"]:
        say(f"{less['rope']} has less perplexity, but slow pairs below --slow-least: it is not kept")
    if kept != "searched":
        say(f"so rope.json has {'plain RoPE' if kept == 'none' else 'the long set'} up to {args.len} tokens")
    if rank() == 0:
        plot(ropes, args.len, args.out / "history.jsonl", args.out / "search.png")
    say(f"\nwrote {args.out / 'rope.json'}, history.jsonl and search.png")
    if args.export and rank() == 0:
        model.rope = rope = ropes[kept]
        if (n_hat := max(rope.n_hat, rope.short.n_hat if rope.short else 0)) and not args.allow_n_hat:
            raise UserError(f"--export: config.json cannot say the n_hat that was found, {n_hat}: search with --n-hat "
                            "0, or give --allow-n-hat")
        export(model, args.export)
        say(f"wrote {args.export}, a Hugging Face directory")


if __name__ == "__main__":
    run(main)
