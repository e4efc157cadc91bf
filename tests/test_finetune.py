"""finetune.py: segments, the order of the data, the schedule, a run, and runs killed, stopped or in trouble."""
import errno
import gc
import itertools
import os
import re
import shutil
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (BOS, EOS, HEAD_DIM, VOCAB, WINDOW, assert_same_logits, complaint, edit_config, make_rope,
                      processes, prose, random_factors, random_tokens, read_lines, run_script, save_tiny, signalling)
from safetensors import SafetensorError
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import finetune
import longrope
from finetune import batch_of, learning_rate, reading_order, segments, step_length
from longrope import (Factors, UserError, load_model, load_rope, load_tokenizer, plain, read_documents, resolve_rope,
                      rope_to_dict, write_json)

LENGTH, STEPS, LAST = 2 * WINDOW, 15, "checkpoint-15"


# ---------------------------------------------------------------------------------------------------------------------
# Data and schedule


def cut(documents, tokenizer, length):
    return torch.from_numpy(np.concatenate(list(segments(iter(documents), tokenizer, length, BOS, EOS))))


@pytest.mark.parametrize("length", [16, 100, 333])
def test_documents_fill_segments_in_order_and_only_the_last_rest_is_lost(tiny, length):
    """Most are shorter than a segment, some longer; EOS and BOS stand between two that share one."""
    tokenizer, body, stream = load_tokenizer(tiny), length - 2, []
    ids = tokenizer.encode(prose(99, 400), add_special_tokens=False).ids[:2 * body]  # no rest, so nothing between
    documents = [("whole", tokenizer.decode(ids)), *((str(i), prose(i, 150 if i % 7 == 0 else 5)) for i in range(150))]
    for _, text in documents:
        stream += [EOS, BOS] * (len(stream) % body > 0) + tokenizer.encode(text, add_special_tokens=False).ids
    found = cut(documents, tokenizer, length)
    assert found.tolist() == [[BOS, *stream[i:i + body], EOS] for i in range(0, len(stream) - body + 1, body)]
    assert found.shape[1] == length and len(found) > 5


def test_a_long_document_loses_nothing_where_it_is_encoded_in_pieces(tiny):
    tokenizer, text = load_tokenizer(tiny), prose(5, 45_000)
    tokens = cut([("long", text)], tokenizer, 64)[:, 1:-1].flatten().tolist()
    kept = tokenizer.decode(tokens)
    assert not {BOS, EOS} & {*tokens}
    assert text.startswith(kept) and len(text) - len(kept) < 64 * 10 and len(text) > 200_000


def test_too_little_text_for_one_segment_is_the_users_mistake(tiny):
    tokenizer, documents = load_tokenizer(tiny), [("a", prose(5, 30)), ("b", prose(6, 30))]
    tokens = sum(len(tokenizer.encode(text).ids) + 1 for _, text in documents)  # BOS and EOS of each
    assert cut(documents, tokenizer, tokens).shape == (1, tokens)
    for few in (documents, [("a", "")], []):
        with pytest.raises(UserError, match="too few for a segment"):
            cut(few, tokenizer, tokens + 1)


def test_every_epoch_has_an_order_of_its_own():
    data = torch.arange(10)[:, None]
    order = torch.cat([batch_of(data, step, 4, seed=1) for step in range(10)]).flatten()
    assert len({tuple(epoch) for epoch in order.view(4, 10).tolist()}) == 4
    assert torch.equal(batch_of(data, 7, 4, seed=1).flatten(), order[28:32])  # a run that goes on sees the same data
    assert not torch.equal(batch_of(data, 7, 4, seed=2).flatten(), order[28:32])
    assert torch.equal(batch_of(data, 0, 25, seed=1).flatten()[:10], order[:10])  # more than an epoch in a step


@pytest.mark.parametrize("count, batch_size", [(12, 3), (10, 4), (3, 7)])  # steps may end in another epoch, or span it
def test_an_epoch_reads_every_row_once_whatever_it_is_cut_to(count, batch_size):
    data = torch.arange(count * 64)
    for epoch, lengths in itertools.product(range(50), [(64,), (64, 8, 8, 16, 64)]):
        rows = reading_order(count, epoch, batch_size, 1, lengths)
        drawn = [step_length((epoch * count + place) // batch_size, 1, lengths) for place in range(count)]
        tokens = torch.cat([data.view(-1, length)[rows[place]].flatten() for place, length in enumerate(drawn)])
        assert torch.equal(tokens.sort().values, data)


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
        alike = [len((batch[:, 1] // 64).unique()) for batch in epoch if batch.shape[1] == 8]
        assert len(alike) < 2 or min(alike) > 3  # each has pieces of more segments than its three
        several += len(alike) > 1
    assert several > 20


def test_text_is_tokenised_once(tiny, books, tmp_path, monkeypatch):
    tokenizer, calls = load_tokenizer(tiny), []
    monkeypatch.setattr(finetune, "segments", lambda *given: [calls.append(1), segments(*given)][1])

    def of(source, length):
        return finetune.segments_file(lambda: read_documents([books]), source, tokenizer, length, BOS, EOS, tmp_path)
    first, again = of("a" * 64, 64), of("a" * 64, 64)
    assert torch.equal(first, again) and torch.equal(first, cut(read_documents([books]), tokenizer, 64))
    assert len(calls) == 1 and of("b" * 64, 32).shape[1] == 32 and len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == [f"segments-{'b' * 16}.bin"]  # the other is gone


def test_the_learning_rate_warms_up_to_its_peak_and_decays_to_nothing():
    for schedule, middle, late in (("linear", 1.5, 0.03), ("constant", 3.0, 3.0)):
        found = [learning_rate(step, 110, 3.0, 10, schedule) for step in (0, 4, 9, 10, 60, 109)]
        assert found == pytest.approx([0.3, 1.5, 3.0, 3.0, middle, late])
    assert learning_rate(0, 10, 1.0, 0, "linear") == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A repetitive text, easily learned, and a searched-looking rope with n_hat."""
    path = tmp_path_factory.mktemp("inputs")
    (path / "text.txt").write_text(prose(3, 60) * 60)
    write_json(path / "rope.json", rope_to_dict(make_rope(random_factors(1, 2), 2.0, n_hat=2)))
    return path


@pytest.fixture(scope="module")
def command(tiny, inputs):
    """Arguments of a run with steps of whole segments and of pieces within the window, and two micro-batches a step."""
    return lambda out, *more: [str(x) for x in (
        "--model", tiny, "--rope", inputs / "rope.json", "--data", inputs / "text.txt", "--len", LENGTH, "--mix",
        WINDOW, "--steps", STEPS, "--lr", 1e-2, "--warmup", 3, "--batch-size", 4, "--micro-batch-size", 3,
        "--save-every", 4, "--device", "cpu", "--out", out, *more)]


@pytest.fixture(scope="module")
def finetuned(command, tmp_path_factory):
    """--out of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("finetuned") / "out"
    done = run_script("finetune.py", *command(out))
    assert done.returncode == 0 and f"segments of {LENGTH} tokens" in done.stdout.splitlines()[0], done.stderr
    return out


def steps(out):
    rows = [row for row in read_lines(out / "log.jsonl") if "step" in row]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return rows


def saved(out):
    return sorted(path.name for path in out.iterdir() if path.name.startswith("checkpoint") or path.suffix == ".part")


def assert_same_result(out, other):
    assert len(steps(out)) == STEPS and all(a["loss"] == b["loss"] for a, b in zip(steps(out), steps(other)))
    one, two = (load_model(path, device="cpu") for path in (out, other))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters())) and one.rope == two.rope
    assert saved(out) == [] and "result" in read_lines(out / "log.jsonl")[-1]


def test_the_loss_goes_down_on_a_repetitive_text(finetuned):
    log = steps(finetuned)
    assert len(log) == STEPS and {row["len"] for row in log} == {LENGTH, WINDOW}
    assert log[0]["loss"] > 5 and sum(row["loss"] for row in log[-3:]) / 3 < 0.7 * log[0]["loss"]
    assert all(row["grad_norm"] > 0 and row["tokens_per_s"] > 0 for row in log)
    assert [row["lr"] for row in log] == [learning_rate(step, STEPS, 1e-2, 3, "linear") for step in range(STEPS)]
    assert saved(finetuned) == [] and (finetuned / "loss.png").exists()


def test_pieces_within_the_window_are_trained_under_the_short_set(tiny, inputs, command, tmp_path):
    """With next to no learning rate every step's loss is that of the model as it was, on pieces of its length."""
    rope = replace(load_rope(inputs / "rope.json"), short=Factors(random_factors(4, 2)))
    write_json(tmp_path / "rope.json", rope_to_dict(rope))
    finetune.main(command(tmp_path / "out", "--rope", tmp_path / "rope.json", "--lr", 1e-30,
                          "--mix", f"{WINDOW}:2", WINDOW // 2))
    data = cut(read_documents([inputs / "text.txt"]), load_tokenizer(tiny), LENGTH)
    log, model = steps(tmp_path / "out"), load_model(tiny, rope, device="cpu")
    assert {row["len"] for row in log} == {LENGTH, WINDOW, WINDOW // 2}
    for row in log:
        pieces = batch_of(data, row["step"], 4, 0, (WINDOW, WINDOW, WINDOW // 2))
        assert pieces.shape == (4 * LENGTH // row["len"], row["len"])
        logits = model(pieces)[:, :-1]  # long or short by the pieces' length
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), pieces[:, 1:].flatten())
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert load_rope(tmp_path / "out" / "rope.json") == rope


def test_the_result_loads_in_transformers_and_has_learned(finetuned, tiny, inputs):
    hf, info = AutoModelForCausalLM.from_pretrained(finetuned, dtype=torch.float32, output_loading_info=True)
    rope, ours = load_rope(inputs / "rope.json"), load_model(finetuned, device="cpu")
    assert not any(info.values()) and ours.rope == rope and hf.config.max_position_embeddings == LENGTH
    assert hf.config.rope_parameters["long_factor"] == list(rope.long.rescale_factors)
    ours.rope = replace(rope, long=replace(rope.long, n_hat=0))  # transformers cannot express n_hat
    assert_same_logits(ours, hf.eval(), LENGTH)
    ids = torch.tensor([load_tokenizer(tiny).encode((inputs / "text.txt").read_text()).ids[:LENGTH]])
    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(tiny).eval()(ids, labels=ids).loss
        assert hf(ids, labels=ids).loss < 0.7 * before


@pytest.mark.parametrize("changes, first, last", [({"bos_token_id": None}, EOS, EOS),
                                                  ({"bos_token_id": [7, 8], "eos_token_id": [5, EOS]}, 7, 5)])
def test_segments_begin_and_end_with_what_the_config_names(tiny, command, tmp_path, capsys, changes, first, last):
    edit_config(shutil.copytree(tiny, model := tmp_path / "model"), **changes)
    finetune.main(command(tmp_path / "out", "--model", model, "--steps", 1))
    assert ("segments begin with EOS" in capsys.readouterr().out) == (first == EOS)
    data = np.fromfile(next((tmp_path / "out").glob("segments-*.bin")), np.int32).reshape(-1, LENGTH)
    assert (data[:, 0] == first).all() and (data[:, -1] == last).all()
    edit_config(model, eos_token_id=None)
    assert "eos_token_id" in complaint(finetune.main, capsys, *command(tmp_path / "other", "--model", model))


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are killed, stopped or in trouble: the same command goes on


def killed(arguments, module, name, call):
    """kill -9 in place of this call of a function, counted from 1."""
    function, calls = getattr(sys.modules[module], name), iter(range(1, 10**6))

    def kill(*given, **more):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*given, **more)
    setattr(sys.modules[module], name, kill)
    finetune.main(arguments)


def stopped_without_a_terminal(arguments):
    """SIGINT in step 5, where stdout and stderr are pipes that Ctrl-C closed, as with | tee."""
    def closing(data, step, *rest):
        for number in (1, 2) if step == 5 else ():
            os.dup2(pipe, number)
        return stopping(data, step, *rest)
    read, pipe = os.pipe()
    os.close(read)
    stopping, finetune.batch_of = signalling(5, signal.SIGINT), closing
    finetune.main(arguments)


def exit_code(work, *arguments):
    (process := processes.Process(target=work, args=arguments)).start()
    process.join(100)
    return process.exitcode


def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(finetuned, command, tmp_path, capsys):
    """The log is ahead of the last checkpoint then, and cut back to it. Each run begins where the one before got to."""
    for call, count, found in (
            (("finetune", "batch_of", 4), 3, []), (("finetune", "batch_of", 11), 10, ["checkpoint-8"]),
            (("shutil", "rmtree", 1), 12, ["checkpoint-12", "checkpoint-8.part"]),  # while checkpoint-8 goes
            (("longrope", "save_file", 1), STEPS, [LAST]),  # while the result is written
            (("finetune", "plot_loss", 1), STEPS, [LAST]),  # when it is, before its row in the log
            (("shutil", "rmtree", 1), STEPS, [])):  # while the last checkpoint goes
        assert exit_code(killed, command(tmp_path), *call) == -signal.SIGKILL
        assert len(steps(tmp_path)) == count and set(found) <= set(saved(tmp_path))
    assert saved(tmp_path)
    finetune.main(command(tmp_path))
    assert "is whole" in capsys.readouterr().out
    assert_same_result(tmp_path, finetuned)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM] * 2, [signal.SIGINT, signal.SIGTERM], [signal.SIGHUP] * 2])
def test_a_signal_ends_the_run_in_a_checkpoint_after_the_step(
        finetuned, command, tmp_path, capfd, monkeypatch, numbers):
    def handler(number, frame):  # nohup, say, ignores a closed terminal, and then so do we
        raise AssertionError
    before = signal.signal(numbers[0], handler)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="1"):
        patch.setattr(finetune, "batch_of", signalling(5, *numbers))
        finetune.main(command(tmp_path))
    gc.collect()  # the traceback, and with it the lock of the log
    said = capfd.readouterr()
    assert "stopped at step 6" in said.out and said.err.count("stopping when") == 1
    assert saved(tmp_path) == ["checkpoint-6"] and len(steps(tmp_path)) == 6
    dcp_to_torch_save(tmp_path / "checkpoint-6", tmp_path / "step-6.pt")
    trained = torch.load(tmp_path / "step-6.pt", weights_only=True)["model"]
    found = load_model(tmp_path, device="cpu").state_dict()
    assert trained.keys() == found.keys()
    assert all(torch.equal(found[key].bfloat16(), weight.bfloat16()) for key, weight in trained.items())
    finetune.main(command(tmp_path))
    assert "going on at step 6" in capfd.readouterr().out and signal.signal(numbers[0], before) == handler
    assert_same_result(tmp_path, finetuned)


def test_a_second_ctrl_c_stops_at_once(command, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "batch_of", signalling(5, signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        finetune.main(command(tmp_path))
    assert saved(tmp_path) == ["checkpoint-4"]


def test_a_signal_in_the_last_step_or_while_the_result_is_written_changes_nothing(
        finetuned, command, tmp_path, monkeypatch):
    def save_weights(*given, **more):
        assert saved(tmp_path) == [LAST]  # until the result is whole
        os.kill(os.getpid(), signal.SIGTERM)
        save(*given, **more)
    save = finetune.save_weights
    monkeypatch.setattr(finetune, "save_weights", save_weights)
    monkeypatch.setattr(finetune, "batch_of", signalling(STEPS - 1, signal.SIGTERM))
    finetune.main(command(tmp_path))
    assert_same_result(tmp_path, finetuned)


def test_a_checkpoint_is_written_where_ctrl_c_closed_the_terminals_pipe(command, tmp_path):
    exit_code(stopped_without_a_terminal, command(tmp_path))
    assert saved(tmp_path) == ["checkpoint-6"]


def trouble(arguments, capsys):
    """The only line on stderr, but for the progress bar and a warning, of a run that must end with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        longrope.run(lambda: finetune.main(arguments), "lower --micro-batch-size")
    gc.collect()
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.strip() and "%|" not in line and "has no place" not in line]
    assert len(lines) == 1, said
    return lines[0]


def failing(function, after, error=None):
    """After so many calls `error` is raised, or without one the loss is not finite."""
    calls = iter(range(10**6))

    def call(*given, **more):
        if next(calls) < after:
            return function(*given, **more)
        if error:
            raise type(error)(*error.args)  # a new one, without the traceback of the last
        return function(*given, **more) * torch.nan
    return call


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where, name, after, error, said, found", [
    (finetune, "loss_of", 10, None, "the loss is nan", ["checkpoint-4"]),  # two calls a step
    (finetune, "loss_of", 10, torch.OutOfMemoryError("Tried to allocate 2.00 GiB."),
     "out of memory, Tried to allocate 2.00 GiB: lower --micro-batch-size", ["checkpoint-4"]),
    (torch, "save", 0, FULL, "No space left", ["checkpoint-4.part"]),
    (longrope, "save_file", 0, SafetensorError("I/O error: No space left on device"), "No space left", [LAST]),
    (finetune, "plot_loss", 0, FULL, "No space left", [LAST]),
])
def test_trouble_is_one_line_and_leaves_what_the_same_command_goes_on_from(
        finetuned, command, tmp_path, capsys, monkeypatch, where, name, after, error, said, found):
    with monkeypatch.context() as patch:
        patch.setattr(where, name, failing(getattr(where, name), after, error))
        assert said in trouble(command(tmp_path), capsys)
    assert saved(tmp_path) == found and len(steps(tmp_path)) == {"loss_of": 5, "save": 4}.get(name, STEPS)
    finetune.main(command(tmp_path))
    assert_same_result(tmp_path, finetuned)


@pytest.fixture
def stopped(command, tmp_path, monkeypatch, capsys):
    """--out of a run that ended in its fifth step, with a checkpoint of four."""
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "loss_of", failing(finetune.loss_of, 8, OSError("stop")))
        trouble(command(tmp_path / "stopped"), capsys)
    return tmp_path / "stopped"


def test_another_setup_is_refused_and_what_differs_named(stopped, tiny, command, tmp_path, capsys):
    other, before = tmp_path / "other", (stopped / "log.jsonl").read_bytes()
    save_tiny(other, initializer_range=0.2)
    shutil.copy(tiny / "tokenizer.json", other)
    (other / "text.txt").write_text(prose(4, 60) * 60)
    write_json(tmp_path / "rope.json", rope_to_dict(make_rope(random_factors(2, 2), 2.0)))
    for flag, value, differs in (
            ("model", other, "weights_sha256"), ("data", other / "text.txt", "data_sha256"), ("seed", 1, "seed"),
            ("len", WINDOW, "len, rope, data_sha256"), ("batch-size", 2, "batch_size"), ("lr", 1e-5, "lr"),
            ("rope", tmp_path / "rope.json", "rope"), ("schedule", "constant", "schedule"), ("steps", 40, "steps"),
            ("warmup", 4, "warmup"), ("mix", WINDOW // 2, "mix"), ("dtype", "bfloat16", "dtype")):
        none = ["--rope", "none"] * (flag == "len")  # whose short set would be said to be trained
        line = trouble(command(stopped, f"--{flag}", value, *none), capsys)
        assert f"another {differs}; give another --out" in line
    assert (stopped / "log.jsonl").read_bytes() == before and saved(stopped) == ["checkpoint-4"]


@pytest.mark.parametrize("file", [".metadata", "*.distcp"])
@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 900), lambda file: file.write_bytes(bytes(10**6)),
                                    os.unlink], ids=["torn", "overwritten", "lost"])
def test_a_damaged_checkpoint_is_one_line(stopped, command, capsys, file, damage):
    damage(next((stopped / "checkpoint-4").glob(file)))
    assert str(stopped / "checkpoint-4") in trouble(command(stopped), capsys)
    assert len(steps(stopped)) == 4


def test_a_step_stands_in_the_log_once_also_behind_a_garbled_line(command, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "loss_of", failing(finetune.loss_of, 10, OSError("stop")))
        trouble(command(tmp_path), capsys)  # in its sixth step, with a checkpoint of four
    log = tmp_path / "log.jsonl"
    log.write_text(re.sub(r'{"step": 1,.*', '{"step": ', log.read_text()))
    finetune.main(command(tmp_path))
    assert re.findall(r'"step": (\d+),', log.read_text()) == [str(step) for step in range(STEPS) if step != 1]


def test_the_second_of_two_runs_in_one_directory_is_refused(finetuned, command, tmp_path, capsys, monkeypatch):
    def second(data, step, *rest):
        assert step != 2 or "another run is writing there" in trouble(command(tmp_path), capsys)
        return batch_of(data, step, *rest)
    monkeypatch.setattr(finetune, "batch_of", second)
    finetune.main(command(tmp_path))
    assert_same_result(tmp_path, finetuned)


def test_neither_a_whole_run_nor_weights_of_something_else_are_written_over(
        finetuned, tiny, command, tmp_path, capsys):
    def contents(path):
        return {file.name: file.read_bytes() for file in path.iterdir()}
    before, own = contents(finetuned), shutil.copytree(tiny, tmp_path / "own")
    finetune.main(command(finetuned))
    assert "is whole" in capsys.readouterr().out and contents(finetuned) == before
    for model in (tiny, own):
        said = complaint(finetune.main, capsys, *command(own, "--model", model))
        assert "of something else; give another --out" in said
    assert contents(own) == contents(tiny)
    gone = shutil.copytree(finetuned, tmp_path / "gone")
    (gone / "model.safetensors").unlink()
    assert "model.safetensors is gone" in complaint(finetune.main, capsys, *command(gone))


def test_a_checkpoint_whose_log_is_gone_is_not_gone_on_from(stopped, command, capsys):
    for file in stopped.iterdir():
        if file.is_file():
            file.unlink()
    assert "has checkpoint-4 of something else" in trouble(command(stopped, "--lr", 1e-5), capsys)
    assert saved(stopped) == ["checkpoint-4"]


@pytest.mark.parametrize("changes, said", [
    (["--model", "nowhere"], "nowhere"), (["--data", "nowhere.txt"], "nowhere.txt"),
    (["--rope", "nowhere.json"], "nowhere.json"), (["--lr", "0"], "--lr 0: "),
    (["--dtype", "float16"], "invalid choice: 'float16'"), (["--mix", "1"], "--mix 1: give at least 4"),
    (["--len", "6400", "--rope", "none"], "too few for a segment of 6400"),
    (["--mix", "64", "100"], f"--len {LENGTH} --mix 100: "),
])
def test_a_users_mistake_is_one_line_and_exit_code_2(command, tmp_path, capsys, changes, said):
    assert said in complaint(finetune.main, capsys, *command(tmp_path / "out", *changes))
    assert not list(tmp_path.rglob("*.part"))


def test_an_entry_of_mix_that_makes_no_sense_is_refused():
    for entry in ("64:x", "64:0", "64:-1", "64:", ":3", "-64", "64:1:2"):
        with pytest.raises(UserError, match="argument --mix: .* is not a number from 1 to"):
            finetune.parser().parse_args([f"--mix={entry}"])


# ---------------------------------------------------------------------------------------------------------------------
# Defaults and memory


def completed(model, *given):
    args = finetune.parser().parse_args([str(x) for x in given])
    return finetune.complete(args, model, torch.device("cpu")), args


def test_factors_for_the_bundled_model_are_found_where_its_search_left_them(bundled, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    committed, model = bundled.path.parent / "rope.json", bundled.model
    for given in ((), ("--len", 8192)):
        rope, args = completed(model, *given)
        assert rope == load_rope(committed) and args.rope == str(committed) and args.len == 8192
    for given, said in ((("--len", 2048), "the model reaches 1024 tokens; give a shorter --len"),
                        (("--len", 16384, "--rope", committed), "rope.json reaches 8192 tokens; give"),
                        (("--rope", "yarn:4"), "--len 8192: yarn:4 reaches 4096 tokens")):
        with pytest.raises(UserError, match=said):
            completed(model, *given)
    never = tmp_path / "never.json"  # serves no length under its short set
    write_json(never, rope_to_dict(replace(load_rope(committed), short_max_length=0)))
    assert completed(model, "--len", 2048, "--rope", never, "--mix", 1024)[0].at(1024) == load_rope(committed).long
    assert "--mix 1024: trained under the long set, as no short one serves" in capsys.readouterr().err
    longrope.warn.cache_clear()
    assert completed(model, "--len", 2048, "--rope", "yarn:2", "--mix", 1024)[0].at(1024).attention_factor > 1
    assert "--mix 1024: trained under the long set" in capsys.readouterr().err
    assert completed(model, "--len", 2048, "--rope", "none", "--mix", 1024)[0].long == plain(HEAD_DIM // 2)
    assert completed(model, "--len", 1024)[0] == model.config.rope
    assert not capsys.readouterr().err
    assert completed(model, "--len", 1024, "--rope", committed)[0].short
    assert "--len 1024: trained under the short set, which serves up to 1024 tokens" in capsys.readouterr().err
    searched = resolve_rope("yarn:2", model)
    write_json(tmp_path / "out" / "search-2048" / "rope.json", rope_to_dict(searched))
    rope, args = completed(model, "--len", 2048)
    assert rope == searched and args.rope == "out/search-2048/rope.json"


def test_checkpointing_is_on_where_activations_are_large(tiny_model):
    def on(*given):
        return completed(tiny_model, "--rope", "none", "--len", *given)[1].checkpointing
    # 5e8 / 2 layers / width 128 = 1953125 tokens
    assert not on(1000000) and on(2000000) and on(1000000, "--micro-batch-size", 2, "--batch-size", 2)
    assert on(1000000, "--checkpointing") and not on(2000000, "--no-checkpointing")


class CountAttention(TorchDispatchMode):
    forward = backward = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        attention, backward = "_scaled_dot_product" in str(op), "backward" in str(op)
        self.forward, self.backward = self.forward + (attention > backward), self.backward + (attention and backward)
        return op(*args, **(kwargs or {}))


def test_checkpointing_computes_all_again_but_attention(tiny, tiny_rope):
    """Without a kept output attention would run twice in each of the two layers."""
    gradients, bytes_kept = [], []
    for recompute in (False, True):
        model, kept = load_model(tiny, tiny_rope, device="cpu").requires_grad_(True), {}
        if recompute:
            finetune.recompute(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
            finetune.loss_of(model, random_tokens(LENGTH), torch.float32)
        bytes_kept.append(sum(x.nbytes for x in kept.values()))
        with CountAttention() as attention:
            finetune.loss_of(model, random_tokens(LENGTH), torch.float32).backward()
        assert (attention.forward, attention.backward) == (2, 2)
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients))
    assert bytes_kept[1] < 0.7 * bytes_kept[0], bytes_kept
