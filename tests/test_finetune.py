"""finetune.py: segments, the order of the data, the schedule, a run, and a run that was killed and resumed."""
import json
import os
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    BOS,
    EOS,
    HEAD_DIM,
    VOCAB,
    WINDOW,
    complaint,
    hf_logits,
    processes,
    prose,
    random_factors,
    random_tokens,
    read_lines,
    run_script,
    save_tiny,
    signalling,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import finetune
from finetune import batch_of, learning_rate, reading_order, segments
from longrope import Rope, UserError, compile_blocks, load_model, load_tokenizer, read_documents, run, use_attention

LENGTH, STEPS = 2 * WINDOW, 16


# ---------------------------------------------------------------------------------------------------------------------
# Data and schedule


def cut(documents, tokenizer, length):
    return torch.from_numpy(np.concatenate(list(segments(iter(documents), tokenizer, length, BOS, EOS))))


def test_segments_are_bookended_pieces_of_one_document_each_of_exactly_the_length(tiny, books):
    tokenizer, documents = load_tokenizer(tiny), list(read_documents([books]))
    for length in (16, 100, 333):
        found = cut(documents, tokenizer, length)
        bodies = []
        for _, text in documents:  # cut by hand; what is left at the end of a document fills no segment
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            bodies += [ids[i:i + length - 2] for i in range(0, len(ids) - length + 3, length - 2)]
        assert found.tolist() == [[BOS, *body, EOS] for body in bodies]
        assert found.shape == (len(bodies), length) and len(bodies) >= 6


def test_a_long_document_loses_nothing_where_it_is_encoded_in_pieces(tiny):
    tokenizer = load_tokenizer(tiny)
    text = prose(5, 45_000)
    assert len(text) > 200_000
    found = cut([("long", text)], tokenizer, 64)
    kept = tokenizer.decode(found[:, 1:-1].flatten().tolist())
    assert text.startswith(kept) and len(text) - len(kept) < 64 * 10


def test_a_document_shorter_than_a_segment_is_the_users_mistake(tiny):
    tokenizer = load_tokenizer(tiny)
    text = prose(5, 30)
    tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
    assert cut([("a", text)], tokenizer, tokens + 2).shape == (1, tokens + 2)
    for documents in ([("a", text)], [("a", "")], []):
        with pytest.raises(UserError, match="give longer documents"):
            cut(documents, tokenizer, tokens + 3)


def test_every_epoch_takes_every_segment_once_in_an_order_of_its_own():
    data = torch.arange(10)[:, None]
    order = torch.cat([batch_of(data, step, 4, seed=1) for step in range(10)]).flatten()
    epochs = order.view(4, 10)
    assert (epochs.sort().values == torch.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert torch.equal(batch_of(data, 7, 4, seed=1).flatten(), order[28:32])  # a resumed run sees the same data
    assert not torch.equal(batch_of(data, 7, 4, seed=2).flatten(), order[28:32])
    assert batch_of(data, 0, 25, seed=1).flatten()[:10].tolist() == epochs[0].tolist()  # more than an epoch in a step


@pytest.mark.parametrize("count, batch_size", [(12, 3), (10, 4), (3, 7)])  # steps may end in another epoch, or span it
def test_an_epoch_reads_every_row_once_whatever_it_is_cut_to(count, batch_size):
    for epoch in range(50):
        found = reading_order(count, epoch, batch_size, 1, (64, 8, 8, 16, 64))
        tokens = torch.cat([torch.arange(count * 64).view(-1, length)[rows].flatten() for length, rows in found])
        assert torch.equal(tokens.sort().values, torch.arange(count * 64))


def test_the_pieces_of_an_epochs_steps_of_one_length_are_shuffled_and_bookended():
    """Twelve segments of eight pieces, three to a step."""
    data, several = torch.arange(12 * 64).view(12, 64), 0
    for first in range(0, 400, 4):
        epoch = [batch_of(data, step, 3, seed=1, mix=(8, 8, 16)) for step in range(first, first + 4)]
        assert {batch.shape for batch in epoch} <= {(3, 64), (24, 8), (12, 16)}
        for batch in epoch:
            if batch.shape[1] == 64:
                assert (batch == data[batch[:, 0] // 64]).all()
            else:
                assert (batch[:, 0] == data[0, 0]).all() and (batch[:, -1] == data[0, -1]).all()
                assert (batch[:, 1:-1].diff() == 1).all() and (batch[:, 1] % batch.shape[1] == 1).all()
        alike = [batch for batch in epoch if batch.shape[1] == 8]
        if len(alike) > 1:  # each has pieces of more segments than its three
            assert all(len((batch[:, 1] // 64).unique()) > 3 for batch in alike)
            several += 1
    assert several > 20


def test_the_learning_rate_warms_up_to_its_peak_and_decays_to_nothing():
    for schedule, middle in (("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)):
        rate = partial(learning_rate, steps=110, peak=3.0, warmup=10, schedule=schedule)
        assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.3, 1.5, 3.0])
        assert rate(10) == pytest.approx(3.0) and rate(60) == pytest.approx(3.0 * middle)
        late = {"linear": 0.01, "cosine": 0.000247, "constant": 1.0}[schedule]
        assert rate(109) == pytest.approx(3.0 * late, rel=0.01)
    assert learning_rate(0, 10, 1.0, 0, "linear") == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# finetune.py as a user starts it


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A repetitive text, easily learned, and a searched-looking rope with n_hat."""
    path = tmp_path_factory.mktemp("inputs")
    (path / "text.txt").write_text(prose(3, 60) * 60)
    Rope.longrope(random_factors(1, 2), 10000.0, WINDOW, 2.0, n_hat=2).save(path / "rope.json")
    return path


def command(tiny, inputs, out):
    return [str(x) for x in (
        "--model", tiny, "--rope", inputs / "rope.json", "--data", inputs / "text.txt", "--len", LENGTH,
        "--steps", STEPS, "--lr", 1e-2, "--warmup", 3, "--batch-size", 4, "--micro-batch-size", 2, "--save-every", 4,
        "--out", out)]


@pytest.fixture(scope="module")
def finetuned(tiny, inputs, tmp_path_factory):
    """The finished process and its --out."""
    out = tmp_path_factory.mktemp("finetuned") / "out"
    return run_script("finetune.py", *command(tiny, inputs, out)), out


def losses(out):
    return [line["loss"] for line in read_lines(out / "log.jsonl")]


def test_the_loss_goes_down_on_a_repetitive_text(finetuned):
    done, out = finetuned
    assert done.returncode == 0, done.stderr
    log = read_lines(out / "log.jsonl")
    assert [line["step"] for line in log] == list(range(STEPS))
    assert log[0]["loss"] > 5 and sum(losses(out)[-3:]) / 3 < 0.7 * log[0]["loss"]
    assert all(line["grad_norm"] > 0 and line["tokens_per_s"] > 0 for line in log)
    assert [line["lr"] for line in log] == [learning_rate(step, STEPS, 1e-2, 3, "linear") for step in range(STEPS)]
    assert f"segments of {LENGTH} tokens" in done.stdout.splitlines()[0]
    assert not list(out.glob("checkpoint*")) and not list(out.glob("*.part"))


def test_the_first_loss_is_that_of_the_model_as_it_was(finetuned, tiny, inputs):
    data = cut(read_documents([inputs / "text.txt"]), load_tokenizer(tiny), LENGTH)
    batch = batch_of(data, 0, 4, seed=0)
    logits = load_model(tiny, inputs / "rope.json", device="cpu")(batch)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), batch[:, 1:].flatten())
    assert losses(finetuned[1])[0] == pytest.approx(loss.item(), rel=1e-5)


def test_the_result_loads_in_transformers_and_has_learned(finetuned, tiny, inputs):
    out = finetuned[1]
    hf, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    rope = Rope.load(out / "rope.json")
    assert rope == Rope.load(inputs / "rope.json")
    assert hf.config.max_position_embeddings == LENGTH
    assert hf.config.rope_parameters["long_factor"] == list(rope.rescale_factors)

    ours = load_model(out, device="cpu")
    assert ours.rope == rope
    # all but n_hat, which transformers cannot express
    ours.rope = Rope.longrope(rope.rescale_factors, rope.rope_theta, WINDOW, rope.scale)
    tokens = random_tokens(LENGTH)
    assert_close(ours(tokens), hf_logits(hf.eval(), tokens), atol=1e-4, rtol=0)

    ids = torch.tensor([[BOS, *load_tokenizer(tiny).encode((inputs / "text.txt").read_text()).ids[1:LENGTH]]])
    with torch.no_grad():
        learned = hf(ids, labels=ids).loss.item()
        before = AutoModelForCausalLM.from_pretrained(tiny).eval()(ids, labels=ids).loss.item()
    assert learned < 0.7 * before


def stopped_without_a_terminal(arguments):
    """finetune.py, whose stdout and stderr are pipes that nobody reads, stopped in step 5."""
    batch_of = signalling(5, signal.SIGINT)

    def closing(data, step, *rest):
        if step == 5:
            for number in (1, 2):
                os.dup2(pipe, number)
        return batch_of(data, step, *rest)
    read, pipe = os.pipe()
    os.close(read)
    finetune.batch_of = closing
    torch.set_num_threads(1)
    finetune.main([*arguments, "--device", "cpu"])


def train_until(arguments, last):
    """finetune.py, killed without warning at the beginning of step `last`."""
    finetune.batch_of = signalling(last, signal.SIGKILL)
    torch.set_num_threads(1)
    finetune.main(arguments)


def killed(arguments, step):
    process = processes.Process(target=train_until, args=(arguments, step))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL


def test_a_run_killed_three_times_has_the_losses_of_the_undisturbed_run(finetuned, tiny, inputs, tmp_path, capsys):
    """Killed in steps 3, 10 and 13: the log then is ahead of the last checkpoint, of step 0, 8 and 12."""
    arguments = [*command(tiny, inputs, tmp_path), "--device", "cpu"]
    for step, saved in ((3, []), (10, ["checkpoint-8"]), (13, ["checkpoint-12"])):
        killed([*arguments, "--resume"], step)
        assert len(losses(tmp_path)) == step and not (tmp_path / "model.safetensors").exists()
        assert [path.name for path in tmp_path.glob("checkpoint*")] == saved
    finetune.main([*arguments, "--resume"])
    assert "resumed at step 12" in capsys.readouterr().out
    assert [line["step"] for line in read_lines(tmp_path / "log.jsonl")] == list(range(STEPS))
    assert losses(tmp_path) == losses(finetuned[1])
    one, two = (load_model(out, device="cpu").state_dict() for out in (finetuned[1], tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM] * 2, [signal.SIGINT, signal.SIGTERM]])
def test_a_signal_ends_the_run_in_a_checkpoint_after_the_step(
        finetuned, tiny, inputs, tmp_path, capfd, monkeypatch, numbers):
    arguments, handler = [*command(tiny, inputs, tmp_path), "--device", "cpu", "--resume"], signal.getsignal(numbers[0])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(finetune, "batch_of", signalling(5, *numbers))
        finetune.main(arguments)
    said = capfd.readouterr()
    assert ended.value.code == 1 and "stopped at step 6" in said.out and said.err.count("stopping when") == 1
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-6"] and len(losses(tmp_path)) == 6
    finetune.main(arguments)
    assert "resumed at step 6" in capfd.readouterr().out and losses(tmp_path) == losses(finetuned[1])
    assert signal.getsignal(numbers[0]) == handler


def test_a_second_ctrl_c_stops_at_once(tiny, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "batch_of", signalling(5, signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        finetune.main([*command(tiny, inputs, tmp_path), "--device", "cpu"])
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-4"]


def test_a_signal_in_the_last_step_or_while_the_result_is_written_changes_nothing(
        finetuned, tiny, inputs, tmp_path, monkeypatch):
    def save_model(*arguments, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*arguments, **more)
    save = finetune.save_model
    monkeypatch.setattr(finetune, "save_model", save_model)
    monkeypatch.setattr(finetune, "batch_of", signalling(STEPS - 1, signal.SIGTERM))
    finetune.main([*command(tiny, inputs, tmp_path), "--device", "cpu"])
    assert losses(tmp_path) == losses(finetuned[1]) and not list(tmp_path.glob("checkpoint*"))
    assert (tmp_path / "run.json").exists() and (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_is_written_where_ctrl_c_closed_the_terminals_pipe(tiny, inputs, tmp_path):
    """As with | tee, which Ctrl-C ends first."""
    process = processes.Process(target=stopped_without_a_terminal, args=(command(tiny, inputs, tmp_path),))
    process.start()
    process.join(100)
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-6"]


class Stop(Exception):
    pass


@pytest.fixture
def stopped(tiny, inputs, tmp_path, monkeypatch, capsys):
    """--out of a run that ended after its first checkpoint, of step 4."""
    save = finetune.save_checkpoint

    def save_and_stop(*arguments):
        save(*arguments)
        raise Stop
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(finetune, "save_checkpoint", save_and_stop)
        finetune.main([*command(tiny, inputs, tmp_path), "--device", "cpu"])
    capsys.readouterr()
    return tmp_path


def test_a_checkpoint_says_where_in_the_data_it_is(stopped):
    saved = json.loads((stopped / "checkpoint-4" / "run.json").read_text())
    assert saved["step"] == 4 and saved["segments_read"] == 16 and saved["seed"] == 0


def test_resume_refuses_another_model_data_or_length(stopped, tiny, inputs, capsys):
    save_tiny(stopped / "other", initializer_range=0.2)
    (stopped / "other" / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    (stopped / "other.txt").write_text(prose(4, 60) * 60)
    for change, value, said in (("--model", stopped / "other", "another model"), ("--len", LENGTH - 8, "len"),
                                ("--data", stopped / "other.txt", "another data"), ("--batch-size", 2, "batch_size"),
                                ("--rope", "pi", "another rope"), ("--seed", 1, "another seed"),
                                ("--lr", 1e-5, "another lr"), ("--schedule", "constant", "another schedule"),
                                ("--steps", 40, "steps"), ("--clip", 2.0, "clip"), ("--mix", WINDOW, "another mix")):
        line = complaint(finetune.main, capsys, *command(tiny, inputs, stopped), "--resume", change, value)
        assert said in line and "checkpoint-4" in line
    assert (stopped / "checkpoint-4").exists() and len(losses(stopped)) == 4


def test_a_new_run_does_not_take_the_place_of_one_that_can_go_on(stopped, tiny, inputs, capsys):
    assert "--resume" in complaint(finetune.main, capsys, *command(tiny, inputs, stopped))
    assert (stopped / "checkpoint-4").exists() and len(losses(stopped)) == 4


def test_a_checkpoint_that_is_not_whole_changes_nothing(stopped, tiny, inputs, monkeypatch, capsys):
    def half(state, checkpoint_id):
        checkpoint_id.mkdir()
        (checkpoint_id / "half").write_text("")
        raise Stop
    arguments = [*command(tiny, inputs, stopped), "--device", "cpu", "--resume"]
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(finetune.dcp, "save", half)
        finetune.main(arguments)
    assert sorted(path.name for path in stopped.glob("checkpoint*")) == ["checkpoint-4", "checkpoint-8.part"]
    finetune.main(arguments)
    assert "resumed at step 4" in capsys.readouterr().out and len(losses(stopped)) == STEPS


def test_text_is_tokenised_once(tiny, inputs, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text((inputs / "text.txt").read_text())
    tokenizer, calls = load_tokenizer(tiny), []

    def counted(*arguments):
        calls.append(1)
        yield from segments(*arguments)
    monkeypatch.setattr(finetune, "segments", counted)

    def read():
        return read_documents([tmp_path / "text.txt"])
    first, source = finetune.tokenised(read, tokenizer, 64, BOS, EOS, tmp_path)
    again, same = finetune.tokenised(read, tokenizer, 64, BOS, EOS, tmp_path)
    assert len(calls) == 1 and same == source and torch.equal(first, again)
    assert torch.equal(first, cut(read(), tokenizer, 64))
    (tmp_path / "text.txt").write_text(prose(4, 600))
    other, new = finetune.tokenised(read, tokenizer, 64, BOS, EOS, tmp_path)
    assert len(calls) == 2 and new != source and torch.equal(other, cut(read(), tokenizer, 64))
    assert finetune.tokenised(read, tokenizer, 32, BOS, EOS, tmp_path)[0].shape[1] == 32
    assert len(list(tmp_path.glob("segments-*"))) == 1  # the others are gone


# ---------------------------------------------------------------------------------------------------------------------
# Recipes and memory


def test_recipes_set_the_papers_values_and_flags_override_them(tiny_model):
    def completed(*given):
        args = finetune.parser().parse_args(["--rope", "none", *given])
        finetune.complete(args, tiny_model, torch.device("cuda"))
        return args.lr, args.schedule, args.batch_size, args.steps, args.len, args.warmup, args.clip
    assert completed("--recipe", "llama2") == (2e-5, "linear", 32, 400, 8 * WINDOW, 20, 1.0)
    assert completed("--recipe", "mistral") == (1e-6, "constant", 64, 400, 16384, 20, 1.0)
    assert completed("--recipe", "mistral", "--lr", "0.1", "--len", "32") == (0.1, "constant", 64, 400, 32, 20, 1.0)
    assert completed() == (2e-5, "linear", 32, 20, 8 * WINDOW, 5, 1.0)


def test_the_mistral_recipe_trains_within_the_window_under_the_long_factors(tiny, inputs, tmp_path, tiny_rope, capsys):
    tiny_rope.save(tmp_path / "rope.json")
    short = ["--device", "cpu", "--rope", str(tmp_path / "rope.json"), "--len", str(WINDOW), "--steps", "1"]
    finetune.main([*command(tiny, inputs, tmp_path / "out"), *short, "--recipe", "mistral"])
    finetune.main([*command(tiny, inputs, tmp_path / "plain"), *short])
    assert f"{max(tiny_rope.rescale_factors):.2f}" in capsys.readouterr().out.splitlines()[1]
    assert abs(losses(tmp_path / "out")[0] - losses(tmp_path / "plain")[0]) > 1e-3
    assert Rope.load(tmp_path / "out" / "rope.json") == tiny_rope  # with its short set


def test_segments_cut_by_chance_are_trained_under_the_short_set_within_the_window(tiny, inputs, tmp_path, capsys):
    """With a learning rate of 0 every step's loss is that of the model as it was, on pieces of the step's length."""
    rope = replace(Rope.load(inputs / "rope.json"), short=Rope(random_factors(4, 2), 10000.0, WINDOW),
                   short_max_length=WINDOW)
    rope.save(tmp_path / "rope.json")
    finetune.main([*command(tiny, inputs, tmp_path / "out"), "--device", "cpu", "--rope", str(tmp_path / "rope.json"),
                   "--lr", "0", "--mix", f"{WINDOW}:2", str(WINDOW // 2)])
    assert f"{LENGTH} tokens, whole or cut to {WINDOW} or {WINDOW // 2}, of" in capsys.readouterr().out
    data = cut(read_documents([inputs / "text.txt"]), load_tokenizer(tiny), LENGTH)
    log, model = read_lines(tmp_path / "out" / "log.jsonl"), load_model(tiny, rope, device="cpu")
    assert {line["len"] for line in log} == {LENGTH, WINDOW, WINDOW // 2}
    for line in log:
        pieces = batch_of(data, line["step"], 4, 0, (WINDOW, WINDOW, WINDOW // 2))
        assert pieces.shape == (4 * LENGTH // line["len"], line["len"])
        assert (pieces[:, 0] == BOS).all() and (pieces[:, -1] == EOS).all()
        logits = model(pieces)  # long or short by the pieces' length
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), pieces[:, 1:].flatten())
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert Rope.load(tmp_path / "out" / "rope.json") == rope


def test_pieces_of_all_lengths_share_two_graphs_a_part(tiny, tiny_rope):
    """One for a single piece, one for any number of them; of each the part before attention and the one after."""
    graphs = []
    torch._dynamo.reset()
    model = load_model(tiny, tiny_rope, device="cpu").requires_grad_(True)
    finetune.recompute(model)
    compile_blocks(model, backend=lambda graph, inputs: [graphs.append(graph), graph][1])
    for rows, length in ((1, 128), (2, 64), (4, 32), (8, 16), (1, 128), (2, 64)):
        finetune.loss_of(model, random_tokens(rows * length).view(rows, length), torch.float32).backward()
    assert len(graphs) == 4
    torch._dynamo.reset()


def test_a_killed_run_of_cut_segments_goes_on_as_it_was(tiny, inputs, tmp_path, capsys):
    rope = Rope.load(inputs / "rope.json")
    replace(rope, short=Rope.none(HEAD_DIM, 10000.0, WINDOW), short_max_length=WINDOW).save(tmp_path / "rope.json")
    mixed = ["--device", "cpu", "--rope", str(tmp_path / "rope.json"), "--mix", str(WINDOW), "--resume"]
    finetune.main([*command(tiny, inputs, tmp_path / "whole"), *mixed])
    killed([*command(tiny, inputs, tmp_path / "killed"), *mixed], 6)
    finetune.main([*command(tiny, inputs, tmp_path / "killed"), *mixed])
    assert "resumed at step 4" in capsys.readouterr().out
    whole, again = (read_lines(tmp_path / name / "log.jsonl") for name in ("whole", "killed"))
    assert [(line["len"], line["loss"]) for line in whole] == [(line["len"], line["loss"]) for line in again]


class CountAttention(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.forward += op in finetune.attention_ops()
        self.backward += "attention" in str(op) and "backward" in str(op)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_computes_all_again_but_attention(tiny, tiny_rope, compiled):
    """Without a kept output attention would run twice in each of the two layers."""
    gradients, bytes_kept = [], []
    for recompute in (False, True):
        model = load_model(tiny, tiny_rope, device="cpu").requires_grad_(True)
        if compiled:
            compile_blocks(model, backend="aot_eager")
        if recompute:
            finetune.recompute(model)
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
            loss = finetune.loss_of(model, random_tokens(LENGTH), torch.float32)
        bytes_kept.append(sum(x.nbytes for x in kept.values()))
        with CountAttention() as count:
            finetune.loss_of(model, random_tokens(LENGTH), torch.float32).backward()
        assert (count.forward, count.backward) == (2, 2)
        gradients.append([p.grad for p in model.parameters()])
        assert loss.requires_grad
    for one, two in zip(*gradients):
        assert torch.equal(one, two)
    assert bytes_kept[1] < 0.7 * bytes_kept[0], bytes_kept


def test_checkpointing_is_on_where_activations_are_large(tiny_model):
    def on(*given):
        args = finetune.parser().parse_args(["--rope", "none", *given])
        finetune.complete(args, tiny_model, torch.device("cpu"))
        return args.checkpointing
    # 5e8 / 2 layers / width 128 = 1953125 tokens
    assert not on("--len", "1000000") and on("--len", "2000000")
    assert on("--len", "1000000", "--micro-batch-size", "2", "--batch-size", "2")
    assert on("--len", "1000000", "--checkpointing") and not on("--len", "2000000", "--no-checkpointing")


def test_out_of_memory_is_one_line_that_says_what_to_lower(tiny, inputs, tmp_path, monkeypatch, capsys):
    def starved(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(finetune, "loss_of", starved)
    with pytest.raises(SystemExit) as end:
        run(lambda: finetune.main([*command(tiny, inputs, tmp_path), "--device", "cpu"]), finetune.REMEDY)
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "out of memory, Tried to allocate 2.00 GiB" in line and "--micro-batch-size" in line


def test_a_kernel_can_be_forced(tiny, inputs, tmp_path, capsys, finetuned):
    try:
        finetune.main([*command(tiny, inputs, tmp_path), "--steps", "1", "--attention", "math"])
    finally:
        use_attention(None)
    assert read_lines(tmp_path / "log.jsonl")[0]["loss"] > 0


def test_factors_for_the_bundled_model_are_found_where_its_search_left_them(bundled, tmp_path, monkeypatch):
    def rope_for(*given):
        args = finetune.parser().parse_args(given)
        return finetune.complete(args, bundled.model, torch.device("cpu")), args.rope
    monkeypatch.chdir(tmp_path)
    committed = bundled.path.parent / "rope.json"
    assert rope_for() == rope_for("--len", "8192") == (Rope.load(committed), str(committed))
    with pytest.raises(UserError, match=r"--len 2048: the model reaches 1024 tokens, its s being 1; search"):
        rope_for("--len", "2048")
    with pytest.raises(UserError, match=r"--len 16384: \S+rope.json reaches 8192 tokens, its s being 8; search"):
        rope_for("--len", "16384", "--rope", str(committed))
    with pytest.raises(UserError, match=r"--len 8192: yarn:4 reaches 4096 tokens"):
        rope_for("--rope", "yarn:4")
    with pytest.raises(UserError, match=r"--len 0: a segment is"):
        rope_for("--len", "0")
    assert set(rope_for("--len", "2048", "--rope", "none", "--mix", "1024")[0].rescale_factors) == {1.0}
    assert set(rope_for("--len", "2048", "--rope", "none")[0].rescale_factors) == {1.0}
    assert rope_for("--len", "1024")[0] == bundled.model.config.rope
    found = tmp_path / "out" / "search-2048" / "rope.json"
    found.parent.mkdir(parents=True)
    Rope.named("yarn:2", bundled.model.config, 2048).save(found)
    assert rope_for("--len", "2048") == (Rope.load(found), "out/search-2048/rope.json")


def test_resume_starts_at_the_beginning_without_a_checkpoint_and_leaves_a_whole_run_alone(
        tiny, inputs, tmp_path, finetuned, capsys):
    arguments = [*command(tiny, inputs, tmp_path), "--device", "cpu", "--steps", "2", "--warmup", "0", "--lr", "1e-3"]
    finetune.main([*arguments, "--resume"])
    assert len(losses(tmp_path)) == 2 and losses(tmp_path)[0] == losses(finetuned[1])[0]
    assert "earlier run" not in capsys.readouterr().out
    written = (tmp_path / "run.json").read_bytes()  # with the seconds it took
    finetune.main([*arguments, "--resume"])
    assert "this run came to its end" in capsys.readouterr().out
    assert (tmp_path / "run.json").read_bytes() == written
    for again in (["--resume", "--seed", "1"], []):
        finetune.main([*arguments, *again])
        assert "the model of an earlier run, which will be replaced" in capsys.readouterr().out
    assert (tmp_path / "run.json").read_bytes() != written


def test_micro_batches_give_the_losses_of_the_whole_batch(tiny, inputs, tmp_path, capsys):
    for size in (1, 3, 4):  # 3 leaves a smaller rest
        finetune.main([*command(tiny, inputs, tmp_path / str(size)), "--device", "cpu", "--steps", "4",
                       "--micro-batch-size", str(size)])
    capsys.readouterr()
    one, three, four = (torch.tensor(losses(tmp_path / name)) for name in ("1", "3", "4"))
    assert one[0] - one[-1] > 0.05  # the weights have moved
    assert_close(one, four, atol=1e-4, rtol=0)
    assert_close(three, four, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes, said", [
    (["--model", "nowhere"], "nowhere"),
    (["--data", "nowhere.txt"], "nowhere.txt"),
    (["--rope", "nowhere.json"], "nowhere.json"),
    (["--len", "100000", "--rope", "none"], "no document fills one segment of 100000 tokens"),
    (["--mix", "64", "100"], f"--mix 100: --len {LENGTH} must be a multiple of it"),
    (["--mix", "1"], "--mix 1: "),
    (["--warmup", "-1"], "--warmup must be 0 or more"),
    (["--rope", "yarn", "--mix", str(WINDOW)], f"--mix {WINDOW} is within the model's window of {WINDOW} tokens, but"),
])
def test_a_users_mistake_is_one_line_and_exit_code_2(tiny, inputs, tmp_path, capsys, changes, said):
    assert said in complaint(finetune.main, capsys, *command(tiny, inputs, tmp_path / "out"), *changes)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("entry", ["64:x", "64:0", "64:-1", "64:", ":3", "-64"])
def test_an_entry_of_mix_that_makes_no_sense_is_refused(capsys, entry):
    with pytest.raises(SystemExit) as ended:
        finetune.parser().parse_args([f"--mix={entry}"])
    assert ended.value.code == 2 and f"{entry} is no LEN or LEN:TIMES" in capsys.readouterr().err


def test_a_rope_json_for_another_head_dim_is_one_line_and_exit_code_2(tiny, inputs, tmp_path):
    Rope.longrope([2.0] * 64, 10000.0, WINDOW, 2.0).save(tmp_path / "rope.json")
    done = run_script("finetune.py", *command(tiny, inputs, tmp_path / "out"), "--rope", tmp_path / "rope.json")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "64 factors are for head_dim 128" in done.stderr and f"head_dim {HEAD_DIM}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_without_bos_and_eos_is_the_users_mistake(tiny, inputs, tmp_path, capsys):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tiny / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    said = complaint(finetune.main, capsys, *command(tiny, inputs, tmp_path / "out"), "--model", tmp_path)
    assert "eos_token_id" in said
