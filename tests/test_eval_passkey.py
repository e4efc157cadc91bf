"""The prompt, greedy decoding with a cache, and the two ways of scoring against each other."""
import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import BOS, EOS, WINDOW, complaint, make_rope, prose, random_factors, random_tokens, save_tiny
from matplotlib.figure import Figure
from test_eval_ppl import results, run_script
from test_finetune_distributed import spawn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import eval_passkey
import longrope
from eval_passkey import FILLER, NEEDLE, QUESTION, TASK, ask, make_prompt, make_trials
from longrope import Cache, generate, load_model, load_tokenizer, rope_to_dict, token_nll, write_json

DIGITS = {
    "one-digit": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                          pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "multi-digit": pre_tokenizers.Sequence([  # as Llama 3
        pre_tokenizers.Split(Regex(r"\d{1,3}| ?[^\s\d]+|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    "space-prefixed": pre_tokenizers.ByteLevel(add_prefix_space=False),  # as GPT-2
}


def passkey(out, *arguments):
    gc.collect()  # an earlier run's journal, and with it its lock
    eval_passkey.main([*map(str, arguments), "--out", str(out), "--device", "cpu"])
    return results(out / "passkey.jsonl")


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module", params=DIGITS)
def tokenizer(request):
    """A small BPE of each of the three kinds, checked to be of its kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = DIGITS[request.param], decoders.ByteLevel()
    numbers = "".join(f"key is {n}. {n} is" for n in range(10_000, 99_999, 97))
    tokenizer.train_from_iterator([TASK + FILLER + NEEDLE + QUESTION, prose(0, 500), numbers], trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    pieces = [tokenizer.decode([i]) for i in encode(tokenizer, f"{QUESTION} 41975")]
    longest = max((p for p in pieces if p.strip().isdigit()), key=len)
    assert {"one-digit": len(longest) == 1, "multi-digit": len(longest) > 1 and longest.isdigit(),
            "space-prefixed": longest.startswith(" ") and len(longest) > 2}[request.param], pieces
    return tokenizer


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_a_prompt_has_exactly_the_tokens_asked_for_and_ends_with_the_key(tokenizer, depth):
    for length in (200, 333):
        tokens, count, middle = make_prompt(tokenizer, length, depth, "41975")
        text = tokenizer.decode(tokens)
        assert len(tokens) == length and tokens[0] == BOS
        assert tokenizer.decode(tokens[-count:]).strip() == "41975"
        assert tokenizer.decode(tokens[:-count]).endswith(QUESTION)
        start, end = len(TASK), len(text) - len(f"{QUESTION} 41975")
        place = text.index("The pass key is 41975. Remember it. 41975 is the pass key.")
        room = end - start - len(NEEDLE.format(key=41975))
        assert text.startswith(TASK) and abs((place - start) / room - depth) < 0.05


def test_no_spaces_come_in_at_the_seams_of_a_prompt_and_no_eos_behind_its_beginning():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()  # as Llama 2
    tokenizer.train_from_iterator([TASK + FILLER + NEEDLE + QUESTION, "a\n\n0123456789"], trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False))
    plain = make_prompt(tokenizer, 400, 0.5, "41975")[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    assert make_prompt(tokenizer, 401, 0.5, "41975")[0] == [BOS, *plain]
    before, needle, after = tokenizer.decode(plain).partition(NEEDLE.format(key=41975))
    filler = before.removeprefix(TASK).removesuffix("\n"), after.removesuffix(f"\n{QUESTION} 41975")
    assert needle and filler[0] and all((FILLER * 99).startswith(part) for part in filler)


@pytest.mark.parametrize("length", [None, WINDOW], ids=["long factors", "short factors"])
def test_decoding_over_the_original_window_equals_recomputing_without_a_cache(tiny_model, length):
    """The set of factors is that of the whole length from the first token on; transformers changes it on the way."""
    rope = make_rope(random_factors(1, 4), 4.0, n_hat=3)
    used, other = (replace(rope, long=f, short=None) for f in (rope.long, rope.short)[::-1 if length else 1])
    tiny_model.rope, prompt = rope, random_tokens(WINDOW - 6, 3)[0]
    new = torch.tensor(generate(tiny_model, prompt, 16, length))
    sequence = torch.cat((prompt, new))
    tiny_model.rope = used
    logits = torch.stack([tiny_model(sequence[None, :end])[0, -1] for end in range(len(prompt), len(sequence))])
    assert logits.argmax(-1).equal(new) and len(new) == 16 and len(set(new.tolist())) > 3
    # the same in the logits, and not for want of a difference between the two sets
    caches = [Cache(len(sequence), tiny_model.config, tiny_model.unembedding) for _ in tiny_model.model.layers]
    cos, sin = used.table(len(sequence))
    for piece, expected in zip([prompt, *new[:, None]], logits):
        now = slice(caches[0].filled, caches[0].filled + len(piece))
        h = tiny_model.hidden(piece[None], (cos[now], sin[now]), [cache.attend for cache in caches])[0, -1]
        torch.testing.assert_close(F.linear(h, tiny_model.unembedding), expected, atol=1e-4, rtol=0)
    tiny_model.rope = other
    assert (tiny_model(sequence[None, :-1])[0, -1] - logits[-1]).abs().max() > 0.1
    end = next(i for i, t in enumerate(new.tolist()) if i and t not in new[:i])
    tiny_model.rope = rope
    assert generate(tiny_model, prompt, 16, length, stop=[new[end].item()]) == new[:end].tolist()


TRIALS = make_trials(seed=0, lengths=[200], depths=2, count=2)


def test_teacher_forced_and_greedy_decoding_agree_on_hits_and_on_misses(tokenizer, tmp_path):
    """A tiny model drilled on the first trial hits there and misses on the others."""
    save_tiny(tmp_path, vocab_size=1000, max_position_embeddings=512, initializer_range=0.02)
    model, end = load_model(tmp_path, device="cpu").requires_grad_(True), encode(tokenizer, ".\n")
    prompt, count, _ = make_prompt(tokenizer, 200, TRIALS[0]["depth"], TRIALS[0]["key"])
    drill, count = torch.tensor([prompt + end]), count + len(end)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        token_nll(model.hidden(drill)[0, -count - 1:-1], model.unembedding, drill[0, -count:]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for trial, knows in zip(TRIALS, (True, False, False, False)):
        forced, greedy = (ask(model, tokenizer, trial, generating) for generating in (False, True))
        assert forced["exact"] == greedy["exact"] == forced["hit"] == greedy["hit"] == knows, (forced, greedy)
        assert not knows or forced["answer"].strip() == trial["key"] and trial["key"] in greedy["answer"]
    assert len({t["key"] for t in TRIALS}) == len(TRIALS)


def test_the_first_number_counts_when_generating_and_exact_tokens_are_recorded_beside(tiny, monkeypatch):
    model, tokenizer, trial = load_model(tiny, device="cpu"), load_tokenizer(tiny), TRIALS[0] | {"length": 600}
    key = trial["key"]
    for answer, hit, exact in [(f" {key}.", True, True), (f" {key}7", False, True), (f": {key} 1", True, False),
                               (f" 1 {key}", False, False), (" unknown", False, False)]:
        said = encode(tokenizer, QUESTION + answer)[len(encode(tokenizer, QUESTION)):]
        monkeypatch.setattr(eval_passkey, "generate", lambda *_, said=said, **__: said)
        found = ask(model, tokenizer, trial, True)
        assert (found["hit"], found["exact"]) == (hit, exact), answer


def test_only_the_keys_logits_are_computed_and_they_are_the_models(tiny, tiny_model, monkeypatch):
    tokens, tokenizer, linear, rows = random_tokens(50)[0], load_tokenizer(tiny), F.linear, []
    expected = tiny_model(tokens[None])[0, -6:-1].argmax(-1).tolist()
    monkeypatch.setattr(eval_passkey, "make_prompt", lambda *_: (tokens.tolist(), 5, 0))
    monkeypatch.setattr(F, "linear", lambda x, weight, *bias: rows.append(
        len(x) if weight is tiny_model.unembedding else 0) or linear(x, weight, *bias))
    assert ask(tiny_model, tokenizer, TRIALS[0], False)["answer"] == tokenizer.decode(expected) and sum(rows) == 5


def test_keys_are_of_the_seed_for_all_ropes_and_the_table_counts_the_hits(tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr(eval_passkey, "over_window",  # right beyond 500 tokens
                        lambda model, tokens, first, _: tokens[first:] * (len(tokens) > 500))
    command = ["--model", tiny, "--rope", "none", "yarn:2", "--len", 500, 600, "--depths", 3, "--trials", 2]
    found = passkey(tmp_path / "a", *command)
    keys, same = ([(t["length"], t["depth"], t["key"]) for t in found if t["rope"] == rope] for rope in command[3:5])
    assert keys == same and len(keys) == len({key for *_, key in keys}) == 12
    assert [depth for _, depth, _ in keys] == 2 * [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert all(len(key) == 5 and key.isdigit() for *_, key in keys)
    table = [line.split()[:6] for line in capsys.readouterr().out.splitlines() if line.startswith(("none", "yarn:2"))]
    assert [(line[0], *line[3:]) for line in table] == [(rope, "6", hits, share) for hits, share in (
        ("0", "0.0%"), ("6", "100.0%")) for rope in ("none", "yarn:2")]
    other = passkey(tmp_path / "b", *command, "--seed", 1)
    assert not {t["key"] for t in other} & {t["key"] for t in found}
    assert (tmp_path / "a" / "passkey.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_a_panel_with_a_name_for_each_rope_three_a_row_at_most(tmp_path, monkeypatch):
    saved, names = [], ("none", "yarn:4", "out/long/rope.json", "a/seed0.rope.json")
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **more: saved.append(figure))
    eval_passkey.plot([{"rope": rope, "length": 8, "depth": depth, "hit": depth < 1} for rope in names
                       for depth in (0.0, 1.0)], "teacher-forced", tmp_path)
    titles = [ax.get_title() for ax in saved[0].axes[:4]]
    assert titles == ["none, 50%", "yarn:4, 50%", "long, 50%", "seed0, 50%"]
    assert saved[0].axes[0].get_gridspec().get_geometry() == (2, 2)
    equal = {"_mine/rope.json": "mine", "a/long/rope.json": "a/long/rope.json", "b/long/rope.json": "b/long/rope.json"}
    assert longrope.titles_of(equal) == equal
    assert [*longrope.titles_of(["_a/x/rope.json", "b/x/rope.json"]).values()] == ["a/x/rope.json", "b/x/rope.json"]
    eval_passkey.plot([{"rope": rope, "length": 8, "depth": 0.0, "hit": True} for rope in equal], "", tmp_path)
    assert [ax.get_title() for ax in saved[1].axes[:3]] == ["mine, 100%", *(
        f"{name}/long/rope.json\n, 100%" for name in "ab")]


def test_a_stopped_run_has_its_trials_on_disk_and_goes_on_with_more_ropes_lengths_and_trials(tmp_path, tiny, tiny_rope,
                                                                                           monkeypatch):
    rope, renamed, half, asked = tmp_path / "rope.json", tmp_path / "renamed.json", tmp_path / "half", []
    write_json(rope, rope_to_dict(tiny_rope))
    command = ["--model", tiny, "--len", 400, "--depths", 2, "--trials", 2, "--generate", "--rope", "none"]
    whole = passkey(tmp_path / "whole", *command, rope)

    def counting(*args):
        asked.append((half / "passkey.jsonl").read_text())
        return None if len(asked) == 6 else ask(*args)  # which breaks the run
    monkeypatch.setattr(eval_passkey, "ask", counting)
    with pytest.raises(TypeError):
        passkey(half, *command, rope)
    assert asked[5].count('"key"') == 5  # what a kill would leave
    rope.rename(renamed)
    found = passkey(half, *command, renamed)
    assert [t | {"rope": 0} for t in found] == [t | {"rope": 0} for t in whole] and len(asked) == 6 + 3
    write_json(rope, rope_to_dict(tiny_rope) | {"long_n_hat": 7})  # as searched on
    more = passkey(half, *command, rope, renamed, "--trials", 3, "--len", 400, 440)
    assert more[:8] == found and len(more) == 3 * 2 * 2 * 3 and len(asked) == 9 + 36 - 8
    assert (half / "passkey.jsonl").read_text().startswith(asked[5])


@pytest.mark.parametrize("how", [["--generate"], ["--context-parallel", 2], ["--context-parallel", 2, "--generate"]],
                         ids=str)
def test_two_processes_write_what_one_writes(tmp_path, how):
    command = ["--rope", "none", "pi:8", "--len", 256, 512, "--depths", 3]  # of the bundled model
    spawn(2, run_script, "eval_passkey", *command, *how, "--out", tmp_path / "two")
    one = passkey(tmp_path / "one", *command, *[x for x in how if x == "--generate"])
    assert results(tmp_path / "two" / "passkey.jsonl") == one and {t["hit"] for t in one} == {True, False}


@pytest.mark.parametrize("arguments, says", [
    ("--rope yran", "yran"), ("--len 400 50", "a pass-key prompt takes at least"),
    ("--len 177 --trials 4", "at least 180 tokens"), ("--model gone", "gone"),
    ("--context-parallel 2 --len 402", "402 tokens"), ("--context-parallel 3", "2 processes")])
def test_a_mistake_is_one_line_before_anything_is_asked(tmp_path, tiny, capsys, monkeypatch, arguments, says):
    monkeypatch.setattr(eval_passkey, "ask", None)  # asking would be an error
    monkeypatch.setattr(longrope, "world_size", lambda: 2 if "parallel" in arguments else 1)
    monkeypatch.setattr(longrope, "Context", lambda group: group)
    monkeypatch.setattr(longrope.dist, "new_subgroups", lambda processes: [processes])
    line = complaint(eval_passkey.main, capsys, "--model", tiny, "--len", 400, "--out", tmp_path, *arguments.split())
    assert says in line and not list(tmp_path.iterdir())


def test_a_tokenizer_that_joins_the_question_with_the_key_is_refused():
    joining = Tokenizer(models.BPE())  # no pre-tokenizer: "is 1" can become one token
    joining.train_from_iterator([QUESTION + " 1"] * 9, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    with pytest.raises(longrope.UserError, match="joins the question's end with the key"):
        make_prompt(joining, 2000, 0, "12345")
