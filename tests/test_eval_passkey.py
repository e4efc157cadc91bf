"""The prompt, greedy decoding with a cache, and the two ways of scoring against each other."""
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import WINDOW, complaint, prose, save_tiny
from test_eval_ppl import torchrun, without_times
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import eval_passkey
from eval_passkey import FILLER, NEEDLE, QUESTION, TASK, ask, make_prompt, make_trials, teacher_forced
from longrope import Cache, Rope, generate, load_model, load_tokenizer, token_nll

DIGITS = {
    "one-digit": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                          pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "multi-digit": pre_tokenizers.Sequence([  # as Llama 3
        pre_tokenizers.Split(Regex(r"\d{1,3}| ?[^\s\d]+|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    "space-prefixed": pre_tokenizers.ByteLevel(add_prefix_space=False),  # as GPT-2
}


def passkey(out, *arguments):
    eval_passkey.main([*map(str, arguments), "--out", str(out), "--device", "cpu"])
    return json.loads((out / "passkey.json").read_text())


@pytest.fixture(scope="module", params=DIGITS)
def tokenizer(request):
    """A small BPE of each of the three kinds, checked to be of its kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = DIGITS[request.param], decoders.ByteLevel()
    numbers = "".join(f"key is {n}. {n} is" for n in range(10_000, 99_999, 97))
    tokenizer.train_from_iterator([TASK + FILLER + NEEDLE + QUESTION, prose(0, 500), numbers], trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(f"{QUESTION} 41975", add_special_tokens=False).ids]
    longest = max((p for p in pieces if p.strip().isdigit()), key=len)
    assert {"one-digit": len(longest) == 1, "multi-digit": len(longest) > 1 and longest.isdigit(),
            "space-prefixed": longest.startswith(" ") and len(longest) > 2}[request.param], pieces
    return tokenizer


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_a_prompt_has_exactly_the_tokens_asked_for_and_ends_with_the_key(tokenizer, depth):
    for length in (200, 333):
        tokens, count = make_prompt(tokenizer, length, depth, "41975")
        text = tokenizer.decode(tokens)
        assert len(tokens) == length and tokens[0] == 0
        assert tokenizer.decode(tokens[-count:]).strip() == "41975"
        assert tokenizer.decode(tokens[:-count]).endswith(QUESTION)
        start, end = len(TASK), len(text) - len(f"{QUESTION} 41975")
        place = text.index("The pass key is 41975. Remember it. 41975 is the pass key.")
        room = end - start - len(NEEDLE.format(key=41975))
        assert text.startswith(TASK) and abs((place - start) / room - depth) < 0.05


@pytest.mark.parametrize("length", [None, WINDOW], ids=["long factors", "short factors"])
def test_decoding_over_the_original_window_equals_recomputing_without_a_cache(tiny_model, tiny_rope, length):
    """The set of factors is that of the whole length from the first token on; transformers changes it on the way."""
    different = Rope.longrope(tiny_rope.rescale_factors, 10000.0, WINDOW, 4.0, n_hat=3)
    tiny_model.rope = different
    prompt = torch.randint(512, (WINDOW - 6,), generator=torch.Generator().manual_seed(3))
    new = generate(tiny_model, prompt, 16, length)
    tiny_model.rope = dataclasses.replace(different, short=None) if length is None else different.short
    sequence, logits = prompt, []
    for token in new:
        logits.append(tiny_model(sequence[None])[0, -1])
        assert logits[-1].argmax() == token
        sequence = torch.cat((sequence, torch.tensor([token])))
    assert len(new) == 16 and len(set(new)) > 3

    # the same in the logits, and not for want of a difference between the two sets
    table = tiny_model.rope.table(len(sequence))
    caches = [Cache(len(sequence), tiny_model.config, tiny_model.unembedding) for _ in tiny_model.model.layers]
    pieces = [sequence[:len(prompt)], *sequence[len(prompt):, None]]
    for piece, expected in zip(pieces, logits):
        at = slice(caches[0].filled, caches[0].filled + len(piece))
        h = tiny_model.hidden(piece[None], (table[0][at], table[1][at]), caches)[0, -1]
        torch.testing.assert_close(F.linear(h, tiny_model.unembedding), expected, atol=1e-4, rtol=0)
    tiny_model.rope = different.short if length is None else dataclasses.replace(different, short=None)
    assert (tiny_model(sequence[None, :-1])[0, -1] - logits[-1]).abs().max() > 0.1


def test_decoding_ends_before_a_token_of_stop(tiny_model):
    prompt = torch.arange(20)
    new = generate(tiny_model, prompt, 20)
    end = next(i for i, t in enumerate(new) if i and t not in new[:i])
    assert generate(tiny_model, prompt, 20, stop=[new[end]]) == new[:end]


TRIALS = make_trials(seed=0, lengths=[200], depths=2, count=2)


@pytest.fixture(scope="module")
def answering(tokenizer, tmp_path_factory):
    """A tiny model drilled on the first trial, so that it hits there and misses on the others."""
    path = tmp_path_factory.mktemp("answering")
    save_tiny(path, vocab_size=1000, max_position_embeddings=512, initializer_range=0.02)
    model = load_model(path, device="cpu")
    end = tokenizer.encode(".\n", add_special_tokens=False).ids
    prompt, count = make_prompt(tokenizer, 200, TRIALS[0]["depth"], TRIALS[0]["key"])
    drill, count = torch.tensor([prompt + end]), count + len(end)
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        token_nll(model.hidden(drill)[0, -count - 1:-1], model.unembedding, drill[0, -count:]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def test_teacher_forced_and_greedy_decoding_agree_on_hits_and_on_misses(tokenizer, answering):
    for trial, knows in zip(TRIALS, (True, False, False, False)):
        forced, greedy = (ask(answering, tokenizer, trial, generating) for generating in (False, True))
        assert forced["exact"] == greedy["exact"] == forced["hit"] == greedy["hit"] == knows, (forced, greedy)
        if knows:
            assert forced["answer"].strip() == trial["key"] and trial["key"] in greedy["answer"]
    assert len({t["key"] for t in TRIALS}) == len(TRIALS)


def test_the_first_number_counts_when_generating_and_exact_tokens_are_recorded_beside(tiny, monkeypatch):
    model, tokenizer, trial = load_model(tiny, device="cpu"), load_tokenizer(tiny), TRIALS[0] | {"length": 600}
    key = trial["key"]
    for answer, hit, exact in [(f" {key}.", True, True), (f" {key}7", False, True), (f": {key} 1", True, False),
                               (f" 1 {key}", False, False), (" unknown", False, False)]:
        said = tokenizer.encode(f"{QUESTION}{answer}", add_special_tokens=False).ids
        said = said[len(tokenizer.encode(QUESTION, add_special_tokens=False).ids):]
        monkeypatch.setattr(eval_passkey, "generate", lambda *_, said=said, **__: said)
        found = ask(model, tokenizer, trial, True)
        assert (found["hit"], found["exact"]) == (hit, exact), answer


def test_only_the_keys_logits_are_computed_and_they_are_the_models(tiny_model, monkeypatch):
    tokens = torch.randint(512, (50,), generator=torch.Generator().manual_seed(1))
    expected = tiny_model(tokens[None])[0, -6:-1].argmax(-1).tolist()
    linear, rows = F.linear, []

    def counting(x, weight, bias=None):
        if weight is tiny_model.unembedding:
            rows.append(len(x))
        return linear(x, weight, bias)
    monkeypatch.setattr(F, "linear", counting)
    assert teacher_forced(tiny_model, tokens.tolist(), 5) == expected
    assert rows == [5]


def test_keys_and_depths_come_from_the_seed_and_are_the_same_for_all_ropes(tmp_path, tiny):
    command = ["--model", tiny, "--rope", "none", "yarn:2", "--len", 500, 600, "--depths", 3, "--trials", 2]
    found = passkey(tmp_path / "a", *command)
    keys = {rope: [(t["length"], t["depth"], t["key"]) for t in found["trials"] if t["rope"] == rope]
            for rope in ("none", "yarn:2")}
    assert keys["none"] == keys["yarn:2"] and len(keys["none"]) == len({key for *_, key in keys["none"]}) == 12
    assert [r["depth"] for r in found["rows"]] == 4 * [0.0, 0.5, 1.0] and all(r["trials"] == 2 for r in found["rows"])
    assert all(len(key) == 5 and key.isdigit() for *_, key in keys["none"])
    other = passkey(tmp_path / "b", *command, "--seed", 1)
    assert not {t["key"] for t in other["trials"]} & {t["key"] for t in found["trials"]}
    assert (tmp_path / "a" / "passkey.png").read_bytes().startswith(b"\x89PNG")


def test_rows_count_the_trials_they_stand_for(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(eval_passkey, "teacher_forced",  # right where the key is even
                        lambda model, tokens, count: tokens[-count:] if len(tokens) > 400 and tokens[-1] % 2 else [0])
    found = passkey(tmp_path, "--model", tiny, "--rope", "none", "--len", 400, 500, "--depths", 2, "--trials", 8)
    for row in found["rows"]:
        mine = [t for t in found["trials"] if (t["length"], t["depth"]) == (row["length"], row["depth"])]
        assert row["trials"] == len(mine) == 8 and row["hits"] == sum(t["hit"] for t in mine)
    assert [r["hits"] > 0 for r in found["rows"]] == [False, False, True, True]


def test_a_run_stopped_half_way_keeps_its_trials_and_the_same_command_goes_on(tmp_path, tiny, monkeypatch):
    command = ["--model", tiny, "--rope", "none", "pi", "--len", 400, "--depths", 2, "--trials", 2, "--generate"]
    whole = passkey(tmp_path / "whole", *command)
    asked = []

    def stops_at_the_sixth(*args):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(args[2]["key"])
        return ask(*args)
    monkeypatch.setattr(eval_passkey, "ask", stops_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        passkey(tmp_path / "half", *command)
    kept = len(json.loads((tmp_path / "half" / "passkey.json").read_text())["trials"])
    assert kept >= 4  # the first rope's, and what else was there a second ago
    monkeypatch.setattr(eval_passkey, "ask", lambda *args: asked.append(args[2]["key"]) or ask(*args))
    assert without_times(passkey(tmp_path / "half", *command)) == without_times(whole)
    assert len(asked) == 5 + 8 - kept
    more = passkey(tmp_path / "half", *command, "--trials", 3)  # only what is new
    assert len(more["trials"]) == 12 and len(asked) == 5 + 8 - kept + 4


def test_two_processes_write_what_one_writes(tmp_path, tiny):
    command = ["--model", tiny, "--rope", "none", "ntk", "--len", 400, "--depths", 3, "--generate"]
    two = torchrun("eval_passkey.py", *command, "--out", tmp_path / "two")
    one = passkey(tmp_path / "one", *command)
    assert without_times(json.loads((tmp_path / "two" / "passkey.json").read_text())) == without_times(one)
    assert two.stdout.count("wrote") == 1


@pytest.mark.parametrize("arguments, says", [
    (["--rope", "yran"], "yran"),
    (["--len", "400", "50"], "a pass-key prompt takes at least"),
    (["--depths", "0"], "--depths and --trials must be at least 1"),
    (["--model", "gone"], "gone"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_a_mistake_is_one_line_before_anything_is_asked(tmp_path, tiny, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(eval_passkey, "teacher_forced", None)  # asking would be an error
    line = complaint(eval_passkey.main, capsys, "--model", tiny, "--len", 400, "--out", tmp_path, *arguments)
    assert says in line and not list(tmp_path.iterdir())


def test_a_tokenizer_that_joins_the_question_with_the_key_is_refused(tmp_path, tiny, capsys):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    joining = Tokenizer(models.BPE())  # no pre-tokenizer: "is 1" can become one token
    joining.train_from_iterator([QUESTION + " 1"] * 9, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    joining.save(str(tmp_path / "tokenizer.json"))
    line = complaint(eval_passkey.main, capsys, "--model", tmp_path, "--len", 2000, "--out", tmp_path / "out")
    assert "joins the question's end with the key" in line
