"""finetune.py over several processes, on CPUs with gloo: sharded (FSDP2), one sequence over several, stop and go on."""
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, WINDOW, processes, prose, random_factors, random_tokens, read_lines, save_tiny, signalling
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import finetune
import longrope
from longrope import Rope, load_model, run

LENGTH, STEPS = 2 * WINDOW, 5


def one_of(number, count, port, work, arguments):
    """Process `number` of `count`, as torchrun starts it."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(1)
    work(*arguments)


def spawn(count, work, *arguments, code=0):
    """work(*arguments) in `count` processes, each of which must end with exit code `code`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = [processes.Process(target=one_of, args=(i, count, port, work, arguments)) for i in range(count)]
    for p in started:
        p.start()
    for p in started:
        p.join(100)
    ended = [p.exitcode for p in started]  # None where it hangs
    for p in started:
        p.kill()
    assert ended == [code] * count


def train(arguments, at=None, number=signal.SIGKILL, to=(0, 1)):
    """finetune.py, with a signal to the processes `to` at the beginning of step `at`, which is fatal by default."""
    finetune.batch_of = signalling(at, number, ranks=to)
    run(lambda: finetune.main(arguments))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A repetitive text, a rope with n_hat = 0, and a deeper model with an odd number of heads."""
    path = tmp_path_factory.mktemp("inputs")
    (path / "text.txt").write_text(prose(3, 60) * 30)
    Rope.longrope(random_factors(1, 2), 10000.0, WINDOW, 2.0).save(path / "rope.json")
    save_tiny(path / "odd", hidden_size=96, num_hidden_layers=3, num_attention_heads=3,
              num_key_value_heads=1,
              tie_word_embeddings=False)
    return path


def command(tiny, inputs, out, *more):
    return [str(x) for x in (
        "--model", tiny, "--rope", inputs / "rope.json", "--data", inputs / "text.txt", "--len", LENGTH,
        "--steps", STEPS, "--lr", 1e-2, "--warmup", 1, "--batch-size", 4, "--save-every", 2, "--device", "cpu",
        "--out", out, *more)]


@pytest.fixture(scope="module")
def alone(tiny, inputs, tmp_path_factory):
    """--out of one process that nothing disturbed."""
    out = tmp_path_factory.mktemp("alone")
    finetune.main(command(tiny, inputs, out))
    return out


@pytest.fixture(scope="module")
def mixed(tiny, inputs, tmp_path_factory):
    """The same of segments cut by chance."""
    out = tmp_path_factory.mktemp("mixed")
    finetune.main(command(tiny, inputs, out, "--mix", LENGTH // 2, LENGTH // 4))
    assert len(set(column(out, "len").tolist())) > 1
    return out


def column(out, name):
    log = read_lines(out / "log.jsonl")
    assert [line["step"] for line in log] == list(range(STEPS))
    return torch.tensor([line[name] for line in log], dtype=torch.float64)


def assert_same_run(out, alone):
    for name in ("loss", "grad_norm"):
        assert_close(column(out, name), column(alone, name), rtol=1e-5, atol=0)
    one, two = (load_model(path, device="cpu").state_dict() for path in (alone, out))
    for name in one:
        assert_close(two[name], one[name], rtol=2**-7, atol=1e-4)  # written as bfloat16
    assert (out / "rope.json").read_text() == (alone / "rope.json").read_text()


@pytest.mark.parametrize("more", [("--micro-batch-size", 2), ("--context-parallel", 2)])
def test_two_processes_train_as_one(tiny, inputs, tmp_path, alone, more):
    spawn(2, train, command(tiny, inputs, tmp_path, *more))
    assert column(alone, "loss")[-1] < 0.5 * column(alone, "loss")[0]
    assert_same_run(tmp_path, alone)


def test_four_processes_two_to_a_sequence_train_as_one(tiny, inputs, tmp_path, alone):
    spawn(4, train, command(tiny, inputs, tmp_path, "--context-parallel", 2, "--checkpointing"))
    assert_same_run(tmp_path, alone)


@pytest.mark.parametrize("count, more", [
    (2, ("--micro-batch-size", 2)), (4, ("--context-parallel", 2)),
    (2, ("--context-parallel", 2, "--micro-batch-size", 2, "--checkpointing"))])
def test_several_processes_cut_segments_alike(tiny, inputs, tmp_path, mixed, count, more):
    spawn(count, train, command(tiny, inputs, tmp_path, "--mix", LENGTH // 2, LENGTH // 4, *more))
    assert_same_run(tmp_path, mixed)


def test_more_processes_than_segments_share_a_sequence(tiny, inputs, tmp_path):
    finetune.main(command(tiny, inputs, tmp_path / "1", "--batch-size", 1))
    spawn(2, train, command(tiny, inputs, tmp_path / "2", "--batch-size", 1))
    assert_same_run(tmp_path / "2", tmp_path / "1")


def test_the_result_has_the_same_loss_in_transformers(alone, inputs):
    ours, hf = load_model(alone, device="cpu"), AutoModelForCausalLM.from_pretrained(alone, dtype=torch.float32)
    assert ours.rope == Rope.load(inputs / "rope.json") and ours.rope.n_hat == 0
    tokens = random_tokens(LENGTH)
    with torch.no_grad():
        loss = finetune.loss_of(ours, tokens, torch.float32) / (LENGTH - 1)
        assert loss.item() == pytest.approx(hf(tokens, labels=tokens).loss.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients and dtypes


def batch(rows=2):
    return torch.cat([random_tokens(96, seed) for seed in range(rows)])


def context_gradients(path, rope, checkpointing, out):
    """The gradients of one sequence over all processes: loss_of gives each a part, backward sums over the gathers."""
    dist.init_process_group("gloo")
    model = load_model(path, rope, device="cpu")
    model.requires_grad_(True)
    if checkpointing:
        finetune.recompute(model)
    loss = finetune.loss_of(model, batch(), torch.float32, finetune.Context(dist.group.WORLD))
    loss.backward()
    for x in (loss := loss.detach(), *(p.grad for p in model.parameters())):
        dist.all_reduce(x)
    if dist.get_rank() == 0:
        torch.save({"loss": loss, **{name: p.grad for name, p in model.named_parameters()}}, out)
    dist.destroy_process_group()


@pytest.mark.parametrize("count, checkpointing", [(2, False), (3, True)])
def test_gradients_of_a_sequence_over_several_processes_are_those_of_one(inputs, tmp_path, count, checkpointing):
    """96 tokens are more than the window of 64, a process's share of them is less: the whole decides for the long set,
    and n_hat is counted from the first token of the whole."""
    rope = Rope.longrope(random_factors(1, 2), 10000.0, WINDOW, 2.0, n_hat=20)
    spawn(count, context_gradients, inputs / "odd", rope, checkpointing, tmp_path / "gradients")
    model = load_model(inputs / "odd", rope, device="cpu").requires_grad_(True)
    logits = model(batch())[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch()[:, 1:].flatten(), reduction="sum")
    loss.backward()
    found = torch.load(tmp_path / "gradients")
    assert_close(found.pop("loss"), loss.detach(), rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        assert_close(found[name], p.grad, rtol=1e-4, atol=1e-4 * p.grad.abs().max().item(), msg=name)


def look_into_bfloat16(arguments, out):
    """What a block is given and what the optimizer holds, of a run in bfloat16."""
    seen, forward, clip = {}, longrope.Block.forward, torch.nn.utils.clip_grad_norm_

    def looking(self, x, cos, sin, cache=None):
        seen.update(x=x.dtype, cos=cos.dtype, weight=self.mlp.up_proj.weight.dtype)
        return forward(self, x, cos, sin, cache)

    def clipping(parameters, largest):
        parameters = list(parameters)
        seen.update(master={p.dtype for p in parameters}, gradient={p.grad.dtype for p in parameters})
        if longrope.rank() == 0:  # here, since the process ends with the run
            torch.save(seen, out)
        return clip(parameters, largest)
    longrope.Block.forward, torch.nn.utils.clip_grad_norm_ = looking, clipping
    train(arguments)


def test_bfloat16_computes_on_float32_masters_gradients_and_tables(tiny, inputs, tmp_path, alone):
    spawn(2, look_into_bfloat16, command(tiny, inputs, tmp_path, "--dtype", "bfloat16"), tmp_path / "seen")
    assert torch.load(tmp_path / "seen") == {
        "x": torch.bfloat16, "weight": torch.bfloat16, "cos": torch.float32,
        "master": {torch.float32}, "gradient": {torch.float32}}
    loss = column(tmp_path, "loss")
    assert_close(loss, column(alone, "loss"), rtol=0.02, atol=0)
    assert not torch.equal(loss, column(alone, "loss"))


# ---------------------------------------------------------------------------------------------------------------------
# Stop and go on


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_killed_run_goes_on_with_another_number_of_processes(tiny, inputs, tmp_path, alone, before, after):
    arguments = command(tiny, inputs, tmp_path)
    spawn(before, train, arguments, 3, code=-signal.SIGKILL)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    spawn(after, train, [*arguments, "--resume"])
    assert_same_run(tmp_path, alone)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(tiny, inputs, tmp_path, alone):
    arguments = command(tiny, inputs, tmp_path)
    spawn(2, train, arguments, 2, signal.SIGTERM, (1,), code=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    spawn(2, train, [*arguments, "--resume"])
    assert_same_run(tmp_path, alone)


def test_torchrun_ends_cleanly(tiny, inputs, tmp_path, alone):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(ROOT / "finetune.py"), *command(tiny, inputs, tmp_path)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu" in done.stdout and done.stdout.count("wrote") == 1
    assert not any(word in done.stderr for word in ("Traceback", "terminate", "Error", "Warning")), done.stderr
    assert_same_run(tmp_path, alone)


@pytest.mark.parametrize("more, said", [
    (("--batch-size", 3, "--context-parallel", 1), "cannot share --batch-size 3 evenly"),
    (("--context-parallel", 3), "cannot share"),
    (("--context-parallel", 2, "--len", 126), "126 tokens are no multiple of 4"),
    (("--context-parallel", 2, "--mix", 2), "--mix 2: "),
])
def test_what_the_processes_cannot_share_is_the_users_mistake(tiny, inputs, tmp_path, monkeypatch, more, said):
    monkeypatch.setattr(finetune, "world_size", lambda: 2)
    with pytest.raises(finetune.UserError, match=said):
        finetune.main(command(tiny, inputs, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
