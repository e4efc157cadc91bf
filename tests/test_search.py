"""The operators, the loop of Algorithm 1, racing, and search.py as a user starts it. (Resuming, several processes and
the second stage are in test_search_runs.py.)"""
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HEAD_DIM, WINDOW, complaint, hf_logits, random_factors, random_tokens, read_lines, run_script
from transformers import AutoModelForCausalLM

import search
from longrope import (
    Rope,
    Window,
    data_hash,
    load_model,
    load_tokenizer,
    read_documents,
    run,
    save_model,
    su_factor,
    window_nll,
    windows,
)
from search import BASELINES, N_HAT, Individual, Space, crossover, hopeless, is_monotone, mutate, promising, shift

PAIRS, DRAWS = HEAD_DIM // 2, 1000


def on_grid(factors, largest):
    return all(x == round(100 * x) / 100 and 1 <= x <= largest for x in factors)


def individual(factors, n_hat=0, attention_factor=1.0):
    return Individual(tuple(factors), n_hat, attention_factor, "test")


def space(largest, n_hats=N_HAT, attention=(1.0, 1.0)):
    return Space((1.0,) * PAIRS, largest, n_hats, attention)


# ---------------------------------------------------------------------------------------------------------------------
# Mutation


def spread_parent():
    """Genes 1.0 apart, so that at least 101 values are open to every gene and a redraw is almost always visible."""
    return individual([float(i) for i in range(2, PAIRS + 2)], n_hat=8)


def changed_genes():
    """(draws, PAIRS) and (draws,): which factors, and whether n_hat, differ from the parent's."""
    rng, parent = np.random.default_rng(0), spread_parent()
    children = [mutate(rng, parent, 0.3, space(PAIRS + 5.0)) for _ in range(4 * DRAWS)]
    return (np.array([[a != b for a, b in zip(child.factors, parent.factors)] for child in children]),
            np.array([child.n_hat != parent.n_hat for child in children]))


def test_mutation_changes_3_genes_of_10_and_every_gene_alike():
    factors, n_hat = changed_genes()
    assert abs(factors.mean() - 0.30) < 0.01
    assert np.abs(factors.mean(axis=0) - 0.30).max() < 0.05
    assert abs(n_hat.mean() * 14 / 13 - 0.30) < 0.03  # one redraw of 14 gives the parent's own n_hat again


def test_mutation_of_a_gene_leaves_all_other_genes_as_they_were():
    """If a redrawn gene pushed its neighbours, they would be found changed beside it more often than elsewhere."""
    factors, n_hat = changed_genes()
    for distance in (1, 2, 5):
        before, after = factors[:, :-distance], factors[:, distance:]
        assert abs(after[before].mean() - 0.30) < 0.02 and abs(before[after].mean() - 0.30) < 0.02
    assert abs(factors[n_hat].mean() - 0.30) < 0.02
    counts = factors.sum(axis=1)  # independent genes: a binomial number of them
    assert abs(counts.std() / math.sqrt(PAIRS * 0.3 * 0.7) - 1) < 0.1


def test_mutation_with_probability_0_is_a_copy():
    rng = np.random.default_rng(0)
    for parent in (spread_parent(), individual(random_factors(0, 8), 256), individual([1.0] * PAIRS)):
        assert mutate(rng, parent, 0.0, space(40.0)) == parent


def test_mutation_keeps_the_constraint_the_grid_and_the_bounds_over_1000_draws():
    rng, largest = np.random.default_rng(0), 10.0
    lines = [individual([1.0] * PAIRS), individual([largest] * PAIRS), individual([8.0] * PAIRS),
             individual(random_factors(0, largest)), individual([1.0] * 16 + [largest] * 16)]
    for draw in range(DRAWS):
        for i, parent in enumerate(lines):
            child = mutate(rng, parent, (0.05, 0.3, 1.0)[draw % 3], space(largest))
            assert is_monotone(child.factors) and on_grid(child.factors, largest) and len(child.factors) == PAIRS
            assert child.n_hat in N_HAT and child.origin == "mutation"
            lines[i] = child if draw % 10 else parent  # children of children


def test_a_redrawn_gene_takes_every_multiple_of_a_hundredth_between_its_neighbours_alike():
    rng, parent = np.random.default_rng(0), individual([1.1, 1.15, 1.2])
    drawn = np.array([mutate(rng, parent, 0.3, space(1.25)).factors for _ in range(20_000)])
    alone = (drawn != parent.factors).sum(axis=1) == 1
    for i, (low, high) in enumerate(((1.0, 1.15), (1.1, 1.2), (1.15, 1.25))):
        values, counts = np.unique(drawn[alone & (drawn[:, i] != parent.factors[i]), i], return_counts=True)
        expected = [x / 100 for x in range(round(100 * low), round(100 * high) + 1) if x / 100 != parent.factors[i]]
        assert values.tolist() == expected
        assert counts.max() < 1.5 * counts.min()
    n_hats = {mutate(rng, parent, 0.3, space(1.25)).n_hat for _ in range(DRAWS)}
    assert n_hats == set(N_HAT) == {0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256}


def test_the_attention_factor_is_redrawn_only_if_it_is_searched_on_the_grid_within_its_bounds():
    rng, parent = np.random.default_rng(0), individual([1.5] * PAIRS, attention_factor=1.2345)
    fixed = space(10.0, attention=(1.2345, 1.2345))
    assert {mutate(rng, parent, prob, fixed).attention_factor for prob in (0.3, 1.0) for _ in range(100)} == {1.2345}
    drawn = [mutate(rng, parent, 0.3, space(10.0, attention=(1.0, 1.33))).attention_factor for _ in range(4 * DRAWS)]
    assert abs(np.mean([x != 1.2345 for x in drawn]) - 0.30) < 0.03
    assert {x for x in drawn if x != 1.2345} == {x / 100 for x in range(100, 134)}


def test_a_fixed_n_hat_stays():
    rng, parent = np.random.default_rng(0), individual([1.5] * PAIRS, n_hat=0)
    assert {mutate(rng, parent, 1.0, space(10.0, n_hats=(0,))).n_hat for _ in range(100)} == {0}


def test_the_constraint_is_that_no_factor_is_below_the_one_before():
    assert is_monotone((1.0,)) and is_monotone((1.0, 1.0, 1.01, 8.0))
    assert not is_monotone((1.0, 1.01, 1.0)) and not is_monotone((2.0, 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Crossover


def test_every_gene_of_a_child_is_a_parents_at_that_place_and_the_order_is_kept_over_1000_draws():
    rng, mixed = np.random.default_rng(0), 0
    for draw in range(DRAWS):
        a, b = (individual(random_factors(2 * draw + i, 10.0), N_HAT[(draw + 5 * i) % len(N_HAT)]) for i in range(2))
        child = crossover(rng, a, b)
        assert len(child.factors) == PAIRS and child.origin == "crossover"
        assert all(gene in pair for gene, pair in zip(child.factors, zip(a.factors, b.factors)))
        assert child.n_hat in (a.n_hat, b.n_hat)
        assert is_monotone(child.factors)
        mixed += child.factors not in (a.factors, b.factors)
    assert mixed > 0.9 * DRAWS


def test_both_parents_give_genes_each_about_half_where_any_mixture_keeps_the_order():
    rng = np.random.default_rng(0)
    a = individual([1 + i / 10 for i in range(PAIRS)], 0)
    b = individual([1.05 + i / 10 for i in range(PAIRS)], 256)
    children = [crossover(rng, a, b) for _ in range(DRAWS)]
    from_a = np.array([[gene == own for gene, own in zip(child.factors, a.factors)] for child in children])
    assert abs(from_a.mean() - 0.5) < 0.02
    assert np.abs(from_a.mean(axis=0) - 0.5).max() < 0.06
    assert not (from_a.all(axis=1) | (~from_a).all(axis=1)).any()
    assert abs(np.mean([child.n_hat == a.n_hat for child in children]) - 0.5) < 0.06


def test_parents_that_are_each_other_have_that_child():
    rng, parent = np.random.default_rng(0), individual(random_factors(0, 8), 4)
    assert crossover(rng, parent, individual(parent.factors, 4)) == parent


def test_the_attention_factor_of_a_child_is_one_parents_each_about_half():
    rng = np.random.default_rng(0)
    a, b = (individual([2.0] * PAIRS, n_hat, factor) for n_hat, factor in ((0, 1.1), (256, 1.2)))
    children = [crossover(rng, a, b) for _ in range(DRAWS)]
    assert {c.attention_factor for c in children} == {1.1, 1.2}
    assert abs(np.mean([c.attention_factor == 1.1 for c in children]) - 0.5) < 0.06
    assert len({(c.n_hat, c.attention_factor) for c in children}) == 4  # a coin each


def share_of_the_larger(rng, draws, parents):
    """Of the genes in which two parents differ, the share that children take from the parent with the larger."""
    from_larger = []
    for _ in range(draws):
        a, b = parents()
        child = crossover(rng, a, b)
        from_larger += [gene == max(x, y) for gene, x, y in zip(child.factors, a.factors, b.factors) if x != y]
    return np.mean(from_larger)


def test_crossover_favours_neither_the_larger_factors_nor_the_smaller():
    """Walked in one direction only, a child of PI and plain RoPE would almost always be one of the two."""
    rng = np.random.default_rng(0)
    plain, pi = individual([1.0] * PAIRS), individual([8.0] * PAIRS)
    for parents in ((plain, pi), (pi, plain)):
        assert 0.45 < share_of_the_larger(rng, 4 * DRAWS, lambda parents=parents: parents) < 0.55
    seeds = iter(range(2 * DRAWS))
    assert 0.45 < share_of_the_larger(
        rng, DRAWS, lambda: [individual(random_factors(next(seeds), 10.0)) for _ in range(2)]) < 0.55
    low, high = individual(np.linspace(1, 4, PAIRS).round(2)), individual(np.linspace(2, 8, PAIRS).round(2))
    assert 0.45 < share_of_the_larger(rng, DRAWS, lambda: (low, high)) < 0.55


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1, with a fitness that costs nothing


def arguments(*changes):
    """Of Algorithm 1 as it is printed."""
    return search.parser().parse_args(["--screening", "1", "--population-size", "12", "--num-mutations", "6",
                                       "--num-crossovers", "5", "--num-parents", "7", "--iterations", "8",
                                       "--max-evals", "1000", *changes])


TARGET, WEIGHTS = np.array(random_factors(77, 6.0)), np.sqrt(np.arange(2, PAIRS + 2))
STARTS = [Individual(tuple(np.round(getattr(Rope, name)(HEAD_DIM, 10000.0, WINDOW, 8.0).rescale_factors, 2).tolist()),
                     0, 1.0, name) for name in BASELINES]


def distance(candidate):
    """A fitness with one best point; irrational weights, so that no two individuals are equally good."""
    return float(np.abs(np.array(candidate.factors) - TARGET) @ WEIGHTS + candidate.n_hat * math.pi / 100)


def fake_nll(candidate):
    """Of two documents, the second of which says nothing."""
    return [distance(candidate) - 10.0, 10.0]


def fake_search(seed=0, args=None, largest=10.0, drop=lambda candidate, iteration: False):
    """The best individual, and all that were evaluated in their order with their iterations."""
    calls = []

    def evaluate(population, iteration, parents):
        calls.extend((candidate, iteration) for candidate in population)
        return {c: None if drop(c, iteration) else fake_nll(c) for c in population}

    return search.search(args or arguments(), np.random.default_rng(seed), STARTS, space(largest), evaluate), calls


def test_the_first_population_is_pi_ntk_yarn_and_mutants_of_these():
    population = [c for c, iteration in fake_search(args=arguments("--population-size", "16"))[1] if iteration == 0]
    assert len(population) == len(set(population)) == 16
    assert population[:3] == STARTS and [p.origin for p in population] == [*BASELINES] + ["mutation"] * 13
    shared = [max(sum(a == b for a, b in zip(p.factors, base.factors)) for base in STARTS) for p in population[3:]]
    assert min(shared) >= PAIRS * 0.4  # each descends from one of the three
    few = fake_search(args=arguments("--population-size", "2", "--num-parents", "2", "--iterations", "0"))[1]
    assert [c for c, _ in few] == STARTS[:2]


def test_the_search_evaluates_the_population_then_mutants_and_children_every_iteration():
    _, calls = fake_search()
    by_iteration = [[c.origin for c, t in calls if t == iteration] for iteration in range(9)]
    assert by_iteration[0] == ["pi", "ntk", "yarn"] + ["mutation"] * 9
    assert all(sorted(origins) == ["crossover"] * 5 + ["mutation"] * 6 for origins in by_iteration[1:])
    assert [t for _, t in calls] == sorted(t for _, t in calls)


def test_nothing_is_evaluated_twice():
    for prob in (0.3, 0.01):  # with 0.01 three mutants of four are copies of their parents
        _, calls = fake_search(args=arguments("--mutation-prob", str(prob)))
        assert len(calls) == 12 + 8 * 11 and len({c for c, _ in calls}) == len(calls)


def test_a_space_that_is_used_up_ends_the_search():
    """Two pairs between 1 and 1.01 and one n_hat: three points."""
    args, evaluated = arguments("--mutation-prob", "1"), []
    starts = [Individual((1.0, 1.0), 0, 1.0, "pi"), Individual((1.01, 1.01), 0, 1.0, "ntk")]

    def evaluate(population, iteration, parents):
        evaluated.extend(population)
        return {c: [sum(c.factors)] for c in population}

    assert search.search(args, np.random.default_rng(0), starts, space(1.01, (0,)), evaluate) == starts[0]
    assert sorted(c.factors for c in evaluated) == [(1.0, 1.0), (1.0, 1.01), (1.01, 1.01)]


def test_everything_evaluated_keeps_the_constraint_the_grid_and_the_bounds():
    for c, _ in fake_search(largest=8.13)[1]:
        assert is_monotone(c.factors) and on_grid(c.factors, 8.13) and c.n_hat in N_HAT


def test_the_same_seed_is_the_same_search_and_another_seed_another():
    one, two, other = (fake_search(seed) for seed in (5, 5, 6))
    assert one == two and [c.origin for c, _ in one[1]] == [c.origin for c, _ in two[1]]
    assert one != other


def parents_used(monkeypatch):
    """A list that fills with those that were mutated or crossed."""
    used, plain_mutate, plain_crossover = [], search.mutate, search.crossover
    monkeypatch.setattr(search, "mutate", lambda rng, p, *a: [used.append(p), plain_mutate(rng, p, *a)][1])
    monkeypatch.setattr(search, "crossover", lambda rng, a, b: [used.extend((a, b)), plain_crossover(rng, a, b)][1])
    return used


def test_parents_are_the_top_k_of_all_that_was_evaluated_and_the_best_is_returned(monkeypatch):
    used, evaluated, ranks, older = parents_used(monkeypatch), [], set(), 0

    def evaluate(population, iteration, parents):
        nonlocal older
        top = sorted(evaluated, key=distance)[:7]
        assert parents == [fake_nll(p) for p in top]
        if iteration:
            assert set(used) <= set(top)
            ranks.update(map(top.index, used))
            older += not set(top) <= set(last)
        used.clear()
        evaluated.extend(population)
        last[:] = population
        return {c: fake_nll(c) for c in population}

    last = []
    best = search.search(arguments(), np.random.default_rng(0), STARTS, space(10.0), evaluate)
    assert best == min(evaluated, key=distance)
    assert ranks == set(range(7))  # all of the top k have offspring
    assert older  # parents stay parents while nothing better comes


def test_a_dropped_individual_is_never_a_parent_and_never_evaluated_again(monkeypatch):
    used, dropped = parents_used(monkeypatch), set()

    def drop(candidate, iteration):  # half of every generation
        if iteration and round(100 * sum(candidate.factors)) % 2:
            dropped.add(candidate)
        return candidate in dropped

    best, calls = fake_search(args=arguments("--mutation-prob", "0.02", "--iterations", "20"), drop=drop)
    assert len(dropped) > 20 and not dropped & set(used)
    assert len({c for c, _ in calls}) == len(calls) > 100
    assert best == min((c for c, _ in calls if c not in dropped), key=distance)


def test_the_search_comes_nearer_to_the_target_than_pi_ntk_and_yarn():
    for seed in range(3):
        best, calls = fake_search(seed, arguments("--iterations", "40"))
        baselines = [distance(c) for c, _ in calls if c.origin in BASELINES]
        assert len(baselines) == 3 and distance(best) < 0.5 * min(baselines)


def test_max_evals_ends_the_search_with_dropped_individuals_counted():
    def odd(candidate, iteration):
        return iteration and round(100 * sum(candidate.factors)) % 2

    everything = [c for c, _ in fake_search(drop=odd)[1]]
    for limit in (1, 5, 12, 20, 23, 29):
        best, calls = fake_search(args=arguments("--max-evals", str(limit)), drop=odd)
        assert [c for c, _ in calls] == everything[:limit]
        assert best == min((c for c, iteration in calls if not odd(c, iteration)), key=distance)


def test_iterations_0_is_the_first_population_alone():
    best, calls = fake_search(args=arguments("--iterations", "0"))
    assert len(calls) == 12 and distance(best) == min(distance(c) for c, _ in calls)


def test_the_defaults_are_those_of_the_paper():
    assert search.PAPER == {"samples": 5, "population_size": 64, "num_mutations": 16, "num_crossovers": 16,
                            "num_parents": 32, "iterations": 40}
    assert search.parser().parse_args([]).mutation_prob == 0.3


def test_shift_multiplies_neighbouring_factors_by_one_number():
    rng, parent = np.random.default_rng(3), Individual(tuple(random_factors(5, 6.0)), 4, 1.1, "crossover")
    before, runs = np.array(parent.factors), set()
    for _ in range(300):
        child = shift(rng, parent, space(8.0))
        after = np.array(child.factors)
        assert is_monotone(child.factors) and on_grid(child.factors, 8.0)
        assert (child.n_hat, child.attention_factor, child.origin) == (4, 1.1, "mutation")
        moved = np.flatnonzero(after != before)
        if len(moved):
            run = slice(moved[0], moved[-1] + 1)
            number = after[run].sum() / before[run].sum()
            assert np.abs(after[run] - number * before[run]).max() < 0.011  # rounded to 0.01
            runs.add((run.start, run.stop, number > 1))
    assert {number for *_, number in runs} == {True, False}
    assert {start for start, *_ in runs} >= {0, PAIRS // 2} and {stop for _, stop, _ in runs} >= {PAIRS // 2, PAIRS}


def test_the_slow_pairs_bound_is_kept_by_every_operator_and_reached_over_1000_draws():
    slow = 20
    bounded = replace(space(10.0), smallest=(1.0,) * slow + (9.5,) * (PAIRS - slow))
    rng, start = np.random.default_rng(0), random_factors(1, 9.5)[:slow]
    a, b = (individual([*start, *[high] * (PAIRS - slow)]) for high in (9.75, 10.0))
    lowest = []
    for _ in range(DRAWS):
        made = mutate(rng, a, 0.3, bounded), shift(rng, b, bounded), crossover(rng, a, b)
        for child in made:
            assert is_monotone(child.factors) and on_grid(child.factors, 10.0) and min(child.factors[slow:]) >= 9.5
        lowest.append([child.factors[slow] for child in made])
        a, b = made[0], made[1] if rng.integers(10) else b  # children of children
    assert np.array(lowest).min(axis=0).tolist() == [9.5, 9.5, 9.5]
    free = [mutate(np.random.default_rng(i), a, 1.0, bounded).factors[slow - 1] for i in range(100)]
    assert min(free) < 9.5  # it is for the slow pairs alone


# ---------------------------------------------------------------------------------------------------------------------
# Racing


def screened(count=150, seed=0):
    """Mutants of NTK, twice `count` of them, and the NLLs of the first half."""
    rng = np.random.default_rng(seed)
    made = search.unseen(lambda: mutate(rng, STARTS[1], 0.3, space(10.0)), 2 * count, set())
    return made[count:], {c: [distance(c) + 10.0, 10.0] for c in made[:count]}


def test_screening_keeps_those_that_turn_out_to_be_good():
    children, nlls = screened()
    kept = promising(children, nlls, 15)
    assert len(set(kept)) == 15 and set(kept) < set(children)
    place = sorted(children, key=distance).index
    assert np.mean([place(c) for c in kept]) < 0.15 * len(children)  # by chance it is half


def test_screening_sees_n_hat_and_is_not_misled_by_those_that_are_far_off():
    rng = np.random.default_rng(1)
    made = search.unseen(lambda: replace(mutate(rng, STARTS[1], 0.02, space(10.0)), n_hat=int(rng.choice(N_HAT))), 500,
                         set())
    nlls = {c: [10.0 - math.log2(1 + c.n_hat)] for c in made[:250]}
    nlls |= {c: [1e6] for c in made[250:320]}  # more than 200 in all, and these would drown the others
    assert {c.n_hat for c in promising(made[320:], nlls, 10)} <= {128, 256}


def test_screening_runs_in_one_thread_whoever_was_dropped(monkeypatch):
    children, nlls = screened()
    threads, kept, inside = torch.get_num_threads(), promising(children, nlls, 15), []
    monkeypatch.setattr(torch.linalg, "cholesky", lambda x, plain=torch.linalg.cholesky: [
        inside.append(torch.get_num_threads()), plain(x)][1])
    try:
        torch.set_num_threads(3)
        assert promising(children, nlls | {children[0]: None}, 15) == kept
        assert torch.get_num_threads() == 3 and set(inside) == {1}
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("values", [[], [None, math.inf], [5.0], [5.0, 5.0, 5.0], [0.0, 1.0]])
def test_screening_with_little_to_go_by_still_gives_so_many(values):
    children, nlls = screened(20)
    known = {c: value if value is None else [value] for c, value in zip(nlls, values)}
    assert len(set(promising(children, known, 7))) == 7 and promising([], known, 7) == []


def test_screening_needs_fewer_evaluations():
    def best(seed, screening):
        found, calls = fake_search(seed, arguments("--screening", str(screening)))
        assert len(calls) == 12 + 8 * 11
        return distance(found)
    assert all(best(seed, 64) < 0.8 * best(seed, 1) for seed in range(3))


@pytest.mark.parametrize("nll, parents, k, dropped", [
    ([2.1], [[1.0, 1.0], [2.0, 2.0]], 2, True),
    ([2.0], [[1.0, 1.0], [2.0, 2.0]], 2, False),  # as good as the worst parent
    ([2.1, 1.8], [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], 2, False),  # by the mean of both documents
    ([2.1, 2.0], [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]], 2, True),
    ([9.1], [[8.0, 1.0], [9.0, 2.0]], 2, True),  # the document's own difficulty cancels
    ([8.9], [[8.0, 1.0], [9.0, 2.0]], 2, False),
    ([1.8], [[1.0, 3.0], [2.0, 2.0]], 2, False),  # the parents differ by 0.5 from document to document: 0.35 is luck
    ([1.9], [[1.0, 3.0], [2.0, 2.0]], 2, True),
    ([9.0], [[1.0, 1.0], [2.0, 2.0]], 3, False),  # fewer than k parents: anyone may become one
    ([9.0], [], 3, False),
    ([math.inf], [[1.0, 1.0], [2.0, 2.0]], 2, True),
    ([9.0], [[1.0, 1.0], [math.inf, 2.0]], 2, False),
])
def test_racing_drops_who_would_need_luck_to_become_a_parent(nll, parents, k, dropped):
    assert hopeless(nll, parents, k) is dropped


# ---------------------------------------------------------------------------------------------------------------------
# search.py as a user starts it

LENGTH, EVALUATIONS = 4 * WINDOW, 6 + 2 * (3 + 2)


def command(tiny, books, out):
    return [str(x) for x in (
        "--model", tiny, "--data", books, "--len", LENGTH, "--samples", 2, "--population-size", 6, "--num-mutations", 3,
        "--num-crossovers", 2, "--num-parents", 3, "--iterations", 2, "--seed", 0, "--out", out)]


def history_of(out):
    """Its lines after the first, which says what was searched."""
    first, *lines = read_lines(out / "history.jsonl")
    assert "setup" in first
    return lines


def whole(history):
    """Those that racing did not drop."""
    return [line for line in history if line["ppl"] is not None]


def without_seconds(history):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in history]


@pytest.fixture(scope="module")
def searched(tiny, books, tmp_path_factory):
    """The finished process and its --out."""
    out = tmp_path_factory.mktemp("searched") / "out"
    return run_script("search.py", *command(tiny, books, out)), out


def test_search_leaves_a_line_of_history_for_every_candidate(searched):
    done, out = searched
    assert done.returncode == 0, done.stderr
    history = history_of(out)
    assert len(history) == EVALUATIONS == len({json.dumps(line["genes"]) for line in history})
    assert [line["origin"] for line in history[:6]] == ["pi", "ntk", "yarn"] + ["mutation"] * 3
    assert [line["iteration"] for line in history] == [0] * 6 + [1] * 5 + [2] * 5
    for name, line in zip(BASELINES, history):
        exact = getattr(Rope, name)(HEAD_DIM, 10000.0, WINDOW, 4.0).rescale_factors
        assert np.abs(np.array(line["genes"]["factors"]) - exact).max() <= 0.005 + 1e-12
        assert line["genes"]["n_hat"] == 0
    for line in history:
        genes = line["genes"]
        assert is_monotone(genes["factors"]) and on_grid(genes["factors"], 5.0) and genes["n_hat"] in N_HAT
        assert genes["attention_factor"] == su_factor(4.0, WINDOW) and line["seconds"] >= 0
        assert len(line["nll"]) == 2 or line["ppl"] is None
    for line in whole(history):
        assert line["ppl"] == pytest.approx(math.exp(sum(line["nll"]) / (2 * (LENGTH - 1))), rel=1e-12)
    assert len({line["ppl"] for line in history}) > EVALUATIONS / 2  # the factors matter


def test_rope_json_is_the_best_of_the_history_and_measures_what_it_says(searched, tiny, books):
    _, out = searched
    history, written = history_of(out), json.loads((out / "rope.json").read_text())
    best, record = min(whole(history), key=lambda line: line["ppl"]), written["search"]
    assert written["long_factor"] == best["genes"]["factors"] and written["long_n_hat"] == best["genes"]["n_hat"]
    assert written["factor"] == 4.0 and written["original_max_position_embeddings"] == WINDOW
    assert written["attention_factor"] == su_factor(4.0, WINDOW)
    assert written["short_factor"] == [1.0] * PAIRS and written["short_attention_factor"] == 1.0
    assert record["perplexity"] == best["ppl"] and record["target_length"] == LENGTH and record["seed"] == 0
    assert record["evaluations"] == EVALUATIONS and record["model"] == str(tiny)
    assert record["document_evaluations"] == sum(len(line["nll"]) for line in history)
    assert record["arguments"]["population_size"] == 6 and record["versions"]["torch"] == torch.__version__

    found = windows(read_documents([books]), load_tokenizer(tiny), LENGTH, 2)
    assert record["data"] == ["book0.txt", "book1.txt"] and record["data_sha256"] == data_hash(found)
    assert record["comparison"]["unseen"] == ["book2.txt", "book3.txt"]
    model = load_model(tiny, out / "rope.json", device="cpu")
    nll = torch.stack([window_nll(model, w.tokens) for w in found])
    assert math.exp(nll.mean()) == pytest.approx(best["ppl"], rel=1e-6)


def test_search_prints_the_cost_first_and_a_table_at_the_end(searched):
    done, out = searched
    lines = done.stdout.splitlines()
    assert re.match(r"one candidate \(2 documents of 256 tokens\) takes about \S+ s, the whole search "
                    r"\(16 candidates\) up to about \S+ s, the comparison after it \S+ s$", lines[0])
    assert re.match(r"loading and reading took \S+ s$", lines[1])
    assert [search.duration(s) for s in (0.0754, 119, 120, 7199, 7200, 175000)] == [
        "0.0754 s", "119 s", "2 minutes", "120 minutes", "2 hours", "2.03 days"]
    start = next(i for i, line in enumerate(lines) if line.startswith("rope "))
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[start + 1:start + 6]}
    assert list(rows) == ["none", "pi", "ntk", "yarn", "searched"]
    assert rows["searched"][1] == pytest.approx(min(line["ppl"] for line in whole(history_of(out))), abs=1e-3)
    assert rows["pi"][0] == 1.0 and rows["yarn"][0] == pytest.approx(0.1 * math.log(4) + 1, abs=1e-3)
    assert all(1 < ppl < 1e6 for row in rows.values() for ppl in row[1:])
    assert all(row[1] != row[2] for row in rows.values())  # on the search's documents and on others
    assert (out / "search.png").read_bytes()[:4] == b"\x89PNG"


def test_columns_of_the_table_stay_apart_whatever_is_in_them(capsys):
    rows = [{"rope": "pi", "attention_factor": 1.0, "search": 8.486e11, "unseen": 5.1e8},
            {"rope": "searched", "attention_factor": 1.14, "search": math.inf, "unseen": 999999.0}]
    search.say_table(rows, 256, [Window("a", torch.zeros(256))] * 2, [Window("b", torch.zeros(256))], "needle")
    printed = capsys.readouterr().out.splitlines()
    assert printed[3].split() == ["pi", "1.000", "8.49e+11", "5.10e+08"]
    assert printed[4].split() == ["searched", "1.140", "inf", "999999.000"]


def test_the_same_command_finds_the_same_factors_again(searched, tiny, books, tmp_path, capsys):
    search.main([*command(tiny, books, tmp_path), "--device", "cpu"])
    capsys.readouterr()
    assert (tmp_path / "rope.json").read_bytes() == (searched[1] / "rope.json").read_bytes()
    assert without_seconds(history_of(tmp_path)) == without_seconds(history_of(searched[1]))


def test_racing_spares_documents_and_drops_by_the_parents_alone(searched):
    """Decided anew from the history, for the first document of two and the best three so far."""
    history = history_of(searched[1])
    for iteration in (1, 2):
        before = [line["nll"] for line in whole(history) if line["iteration"] < iteration]
        parents = sorted(before, key=math.fsum)[:3]
        first, second = (statistics.fmean(column) for column in zip(*parents))
        ahead = [(a - first + b - second) / 2 for a, b in parents]  # of each parent, of the three's mean
        scatter = [x for (a, b), by in zip(parents, ahead) for x in (a - first - by, b - second - by)]
        error = math.sqrt(statistics.fmean(x * x for x in scatter)) * math.sqrt(1 / 2)
        for line in (line for line in history if line["iteration"] == iteration):
            behind = line["nll"][0] - first > max(ahead) + error
            assert len(line["nll"]) == (1 if behind else 2) and (line["ppl"] is None) == behind
    assert {len(line["nll"]) for line in history[6:]} == {1, 2}  # both happen


def test_no_racing_starts_alike_and_measures_every_document(searched, tiny, books, tmp_path, capsys):
    search.main([*command(tiny, books, tmp_path), "--no-racing", "--device", "cpu"])
    capsys.readouterr()
    history, raced = history_of(tmp_path), history_of(searched[1])
    assert without_seconds(history[:6]) == without_seconds(raced[:6])
    assert len(history) == EVALUATIONS and all(len(line["nll"]) == 2 and line["ppl"] for line in history)
    assert [line["genes"] for line in history[6:11]] == [line["genes"] for line in raced[6:11]]  # the same parents
    assert [line["nll"][0] for line in history[6:11]] == [line["nll"][0] for line in raced[6:11]]


def test_a_searched_attention_factor_is_a_gene_and_stands_in_rope_json(tiny, books, tmp_path, capsys):
    search.main([*command(tiny, books, tmp_path), "--attention-factor", "search", "--seed", "5", "--device", "cpu"])
    capsys.readouterr()
    history, su = history_of(tmp_path), su_factor(4.0, WINDOW)
    drawn = {line["genes"]["attention_factor"] for line in history}
    assert all(x == round(x, 2) and 1.0 <= x <= round(1.25 * su, 2) for x in drawn) and len(drawn) > 2
    assert {line["genes"]["attention_factor"] for line in history[:3]} == {round(su, 2)}
    best = min(whole(history), key=lambda line: line["ppl"])
    assert Rope.load(tmp_path / "rope.json").attention_factor == best["genes"]["attention_factor"]


def test_slow_least_bounds_the_pairs_that_make_no_full_turn_within_the_window(tiny, books, tmp_path, capsys):
    search.main([*command(tiny, books, tmp_path), "--slow-least", "1.1", "--device", "cpu"])
    capsys.readouterr()
    slow = np.array([2 * math.pi * 10000.0 ** (2 * i / HEAD_DIM) > WINDOW for i in range(PAIRS)])
    factors = np.array([line["genes"]["factors"] for line in history_of(tmp_path)])
    assert 0 < slow.sum() < PAIRS and factors[:, slow].min() == 4.4  # 1.1 s; PI's 4 is put there
    assert factors[1, ~slow].min() == 1.0 and factors[1, slow].min() == 4.4  # NTK's
    assert np.array(Rope.load(tmp_path / "rope.json").rescale_factors)[slow].min() >= 4.4


@pytest.mark.parametrize("given, value", [
    ("su", su_factor(4.0, WINDOW)), ("yarn", 0.1 * math.log(4) + 1), ("none", 1.0), ("1.125", 1.125)])
def test_a_fixed_attention_factor_is_that_of_all(given, value):
    args = arguments("--attention-factor", given)
    assert search.attention_factors(args, 4.0, WINDOW) == (value, (value, value))


def test_what_was_found_can_be_used_in_plain_transformers(searched, tiny, tmp_path):
    """n_hat aside, which transformers' format cannot say."""
    rope = Rope.load(searched[1] / "rope.json")
    model = load_model(tiny, Rope.longrope(rope.rescale_factors, rope.rope_theta, WINDOW, rope.scale), device="cpu")
    save_model(model, tmp_path, dtype=torch.float32)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = random_tokens(LENGTH)
    torch.testing.assert_close(hf_logits(hf, tokens), model(tokens), atol=1e-4, rtol=0)


def test_ctrl_c_leaves_the_best_so_far_and_resume_goes_on_from_it(searched, tiny, books, tmp_path, monkeypatch, capsys):
    plain, calls = search.Evaluator.measure, []

    def interrupted(self, task):
        calls.append(task)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return plain(self, task)

    monkeypatch.setattr(search.Evaluator, "measure", interrupted)
    with pytest.raises(SystemExit) as stopped:
        search.main([*command(tiny, books, tmp_path), "--device", "cpu"])
    assert "rope.json" in str(stopped.value) and "--resume" in str(stopped.value) and stopped.value.code != 0
    assert "Traceback" not in capsys.readouterr().err
    history = history_of(tmp_path)
    assert len(history) == 4  # the fifth was on its second document
    best = min(history, key=lambda line: line["ppl"])
    assert list(Rope.load(tmp_path / "rope.json").rescale_factors) == best["genes"]["factors"]

    monkeypatch.setattr(search.Evaluator, "measure", plain)
    search.main([*command(tiny, books, tmp_path), "--resume", "--device", "cpu"])
    assert (tmp_path / "rope.json").read_bytes() == (searched[1] / "rope.json").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# The defaults and a user's mistakes


def filled_in(device, *arguments, window=131072):
    args = search.parser().parse_args(arguments)
    search.fill_in(args, SimpleNamespace(window=window, unembedding=SimpleNamespace(device=torch.device(device))))
    return args


def sizes(args):
    return {key: getattr(args, key) for key in search.PAPER}


def test_above_512k_tokens_the_defaults_are_halved_on_a_gpu():
    assert sizes(filled_in("cuda", "--len", "262144")) == sizes(filled_in("cuda", "--len", "524288")) == search.PAPER
    above = {"samples": 3, "population_size": 32, "num_mutations": 8, "num_crossovers": 8, "num_parents": 32,
             "iterations": 40}
    assert sizes(filled_in("cuda", "--len", "524289")) == sizes(filled_in("cuda", "--len", "2097152")) == above
    assert sizes(filled_in("cuda")) == above  # 8 times the window
    assert sizes(filled_in("cpu")) == search.ON_CPU
    assert filled_in("cuda", "--len", "1048576").max_evals == 32 + 40 * 16
    given = filled_in("cuda", "--len", "1048576", "--population-size", "9", "--num-mutations", "0", "--samples", "1")
    assert sizes(given) == above | {"population_size": 9, "num_mutations": 0, "samples": 1}


def test_the_length_is_8_windows_or_with_short_the_window_and_names_the_directory():
    args = filled_in("cpu", window=64)
    assert (args.len, args.out) == (512, Path("out/search-512"))
    args = filled_in("cpu", "--short", "--init", "rope.json", window=64)
    assert (args.len, args.out) == (64, Path("out/search-64-short"))


def test_the_short_set_gets_an_attention_factor_of_its_own_unless_hugging_face_is_to_read_it():
    short = "--short", "--init", "rope.json"
    for given, chosen in (((), "su"), (short, "search"), ((*short, "--export", "out"), "su"),
                          ((*short, "--attention-factor", "yarn"), "yarn")):
        assert filled_in("cpu", *given).attention_factor == chosen


def test_two_generations_of_the_cpus_default_have_crossover():
    assert search.ON_CPU["iterations"] >= 2 and search.ON_CPU["num_crossovers"] > 0


@pytest.mark.parametrize("changes, said", [
    (["--model", "nowhere"], "nowhere"),
    (["--data", "nowhere.txt"], "nowhere.txt"),
    (["--len", "100000"], "no document of 100000 tokens"),
    (["--len", str(WINDOW)], f"nothing to extend, the window is {WINDOW} already"),
    (["--len", "0"], "--len 0: nothing to predict"),
    (["--len", "10"], f"nothing to extend, the window is {WINDOW} already"),
    (["--population-size", "2"], "--population-size must be at least 3"),
    (["--num-parents", "1"], "--num-parents must be at least 2"),
    (["--samples", "0"], "--samples must be at least 1"),
    (["--iterations", "-1"], "--iterations must be at least 0"),
    (["--max-evals", "0"], "--max-evals must be at least 1"),
    (["--mutation-prob", "1.5"], "--mutation-prob between 0 and 1"),
    (["--n-hat", "-1"], "--n-hat must be 0 or more"),
    (["--short"], "--init"),
    (["--init", "nowhere/rope.json"], "nowhere/rope.json"),
    (["--start-from", "nowhere/rope.json"], "--start-from nowhere/rope.json: no such file"),
    (["--start-from", __file__, "--population-size", "3"], "--population-size must be at least 4"),
    (["--attention-factor", "foo"], "--attention-factor foo: give su, yarn, none, search or a number above 0"),
    (["--attention-factor", "nan"], "--attention-factor nan"),
    (["--attention-factor", "0"], "--attention-factor 0"),
    (["--slow-least", "0"], "--slow-least 0: give a number above 0 and at most 1.25"),
    (["--slow-least", "1.26"], "--slow-least 1.26: give a number above 0 and at most 1.25"),
    (["--slow-least", "0.2"], "--slow-least 0.2 bounds nothing: 0.2 times s = 4 is no more than 1"),
    (["--fitness", "needle", "--len", str(WINDOW + 1)], "raise --len"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_users_mistake_is_one_line_and_exit_code_2(tiny, books, tmp_path, capsys, changes, said):
    assert said in complaint(search.main, capsys, *command(tiny, books, tmp_path / "out"), *changes)
    assert not (tmp_path / "out").exists()  # found before any work


def test_the_factors_to_start_from_are_not_overwritten(searched, tiny, books, capsys):
    before = (searched[1] / "rope.json").read_bytes()
    said = complaint(search.main, capsys, *command(tiny, books, searched[1]), "--start-from", searched[1] / "rope.json")
    assert "is where the result goes: give another --out" in said
    assert (searched[1] / "rope.json").read_bytes() == before


def test_a_seed_is_a_natural_number(capsys):
    for text in ("-1", "x", "1.5"):
        with pytest.raises(SystemExit) as end:
            search.main(["--seed", text])
        assert end.value.code == 2 and "is not 0, 1, 2" in capsys.readouterr().err


def test_an_out_that_is_a_file_is_one_line_and_exit_code_2(tiny, books, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit) as end:
        run(lambda: search.main(command(tiny, books, tmp_path / "out")))
    said = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(said) == 1 and "out" in said[0]


def test_an_init_of_another_head_dim_is_one_line_and_exit_code_2(tiny, books, tmp_path, capsys):
    Rope.longrope(random_factors(0, 4, pairs=16), 10000.0, WINDOW, 2.0).save(tmp_path / "rope.json")
    said = complaint(search.main, capsys, *command(tiny, books, tmp_path / "out"), "--init", tmp_path / "rope.json")
    assert "head_dim 32" in said and not (tmp_path / "out").exists()


def test_a_users_mistake_is_one_line_and_exit_code_2_from_the_shell_too(tiny, tmp_path):
    done = run_script("search.py", "--model", tiny, "--data", Path("no") / "such.txt", "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == ["search.py: data no/such.txt: no such file or directory"]
