"""finetune.py over several processes, on CPUs with gloo: sharded (FSDP2), one sequence over several, stop and go on."""
import os
import signal
import socket
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from conftest import (ROOT, WINDOW, make_rope, processes, prose, random_factors, random_tokens, read_lines, save_tiny,
                      signalling)
from torch.testing import assert_close

import finetune
import longrope
from longrope import load_model, rope_to_dict, run, write_json

LENGTH, STEPS = 2 * WINDOW, 5


def one_of(number, count, port, work, arguments):
    """Process `number` of `count`, as torchrun starts it."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # a line of PyTorch's for each process
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
    """A repetitive text, a rope, and a deeper model with an odd number of heads."""
    path = tmp_path_factory.mktemp("inputs")
    (path / "text.txt").write_text(prose(3, 60) * 30)
    write_json(path / "rope.json", rope_to_dict(make_rope(random_factors(1, 2), 2.0)))
    save_tiny(path / "odd", hidden_size=96, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
              tie_word_embeddings=False)
    return path


@pytest.fixture(scope="module")
def command(tiny, inputs):
    """Arguments of a run in which some steps are of whole segments and some of pieces."""
    return lambda out, *more: [str(x) for x in (
        "--model", tiny, "--rope", inputs / "rope.json", "--data", inputs / "text.txt", "--len", LENGTH, "--mix",
        LENGTH // 2, LENGTH // 4, "--steps", STEPS, "--lr", 1e-2, "--warmup", 1, "--batch-size", 4, "--save-every", 2,
        "--device", "cpu", "--out", out, *more)]


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """--out of one process that nothing disturbed."""
    out = tmp_path_factory.mktemp("alone")
    finetune.main(command(out))
    assert len(set(column(out, "len").tolist())) > 1 and column(out, "loss")[-1] < 0.5 * column(out, "loss")[0]
    return out


def column(out, name):
    log = [row for row in read_lines(out / "log.jsonl") if "step" in row]
    assert [row["step"] for row in log] == list(range(STEPS))
    return torch.tensor([row[name] for row in log], dtype=torch.float64)


def checkpoints(out):
    return [path.name for path in out.glob("checkpoint-*")]


def assert_same_run(out, alone):
    for name in ("loss", "grad_norm"):
        assert_close(column(out, name), column(alone, name), rtol=1e-5, atol=0)
    one, two = (load_model(path, device="cpu").state_dict() for path in (alone, out))
    for name in one:
        assert_close(two[name], one[name], rtol=2**-7, atol=1e-4)  # written as bfloat16
    assert (out / "rope.json").read_text() == (alone / "rope.json").read_text() and not checkpoints(out)


def test_several_processes_train_as_one(command, tmp_path, alone):
    """Two to a sequence; test_torchrun_ends_cleanly is without sharing."""
    spawn(4, train, command(tmp_path, "--context-parallel", 2, "--checkpointing"))
    assert_same_run(tmp_path, alone)


def test_more_processes_than_segments_share_a_sequence(command, tmp_path):
    finetune.main(command(tmp_path / "1", "--batch-size", 1))
    spawn(2, train, command(tmp_path / "2", "--batch-size", 1))
    assert_same_run(tmp_path / "2", tmp_path / "1")
    assert read_lines(tmp_path / "2" / "log.jsonl")[1]["run"]["arguments"]["context_parallel"] == 2


@pytest.mark.parametrize("count, batch, together", [(8, 4, 2), (8, 12, 2), (8, 3, 8), (6, 4, 3), (4, 8, 1)])
def test_as_few_processes_as_can_share_a_sequence(tiny_model, monkeypatch, count, batch, together):
    monkeypatch.setattr(finetune, "world_size", lambda: count)
    monkeypatch.setattr(finetune, "share_sequences", lambda *given: None)
    args = finetune.parser().parse_args(["--rope", "none", "--batch-size", str(batch)])
    finetune.complete(args, tiny_model, torch.device("cpu"))
    assert args.context_parallel == together


@pytest.mark.parametrize("more, said", [
    (("--batch-size", 3, "--context-parallel", 1), "cannot share --batch-size 3 evenly"),
    (("--context-parallel", 3), "--context-parallel 3: there are 2 processes"),
    (("--context-parallel", 2, "--len", 126, "--mix", 126), "126 tokens are no multiple of 4"),
    (("--context-parallel", 2, "--len", 120, "--mix", 30), "30 tokens are no multiple of 4")])
def test_what_the_processes_cannot_share_is_the_users_mistake(command, tmp_path, monkeypatch, more, said):
    for module in (finetune, longrope):
        monkeypatch.setattr(module, "world_size", lambda: 2)
    with pytest.raises(longrope.UserError, match=said):
        finetune.main(command(tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Gradients and dtypes

TOKENS = torch.cat([random_tokens(96, seed) for seed in (0, 1)])


def context_gradients(path, rope, groups, out):
    """The gradients of one sequence over all processes: loss_of gives each a part, backward sums over the gathers."""
    dist.init_process_group("gloo")
    longrope.AT_ONCE //= 2**17 if groups > 1 else 1
    model = load_model(path, rope, device="cpu").requires_grad_(True)
    longrope.share_sequences(model, dist.get_world_size(), [96])
    assert len(longrope.head_groups(model.config, TOKENS.numel() // dist.get_world_size(), 2)) == groups
    if groups == 1:  # activation checkpointing in one of the two
        finetune.recompute(model)
    loss = finetune.loss_of(model, TOKENS, torch.float32)
    loss.backward()
    for x in (loss := loss.detach(), *(p.grad for p in model.parameters())):
        dist.all_reduce(x)
    if dist.get_rank() == 0:
        torch.save({"loss": loss, **{name: p.grad for name, p in model.named_parameters()}}, out)
    dist.destroy_process_group()


@pytest.mark.parametrize("count, name, groups", [(2, "tiny", 2), (3, "odd", 1)])
def test_gradients_of_a_sequence_over_several_processes_are_those_of_one(tiny, inputs, tmp_path, count, name, groups):
    """96 tokens are more than the window of 64, a process's share of them is less: the whole decides for the long set,
    and n_hat is counted from the first token of the whole."""
    rope, path = make_rope(random_factors(1, 2), 2.0, n_hat=20), {"tiny": tiny, "odd": inputs / "odd"}[name]
    spawn(count, context_gradients, path, rope, groups, tmp_path / "gradients")
    model = load_model(path, rope, device="cpu").requires_grad_(True)
    logits = model(TOKENS)[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:].flatten(), reduction="sum")
    loss.backward()
    found = torch.load(tmp_path / "gradients", weights_only=True)
    assert_close(found.pop("loss"), loss.detach(), rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        assert_close(found[name], p.grad, rtol=1e-5, atol=1e-5 * p.grad.abs().max().item(), msg=name)


def look_into_bfloat16(arguments, out):
    """What a block is given and what the optimizer holds, of a run in bfloat16."""
    seen, forward, clip = {}, longrope.Block.forward, torch.nn.utils.clip_grad_norm_

    def looking(self, x, cos, *rest):
        seen.update(x=x.dtype, cos=cos.dtype, weight=self.mlp.up_proj.weight.dtype)
        return forward(self, x, cos, *rest)

    def clipping(parameters, largest):
        parameters = list(parameters)
        seen.update(master={p.dtype for p in parameters}, gradient={p.grad.dtype for p in parameters})
        if longrope.rank() == 0:  # here, since the process ends with the run
            torch.save(seen, out)
        return clip(parameters, largest)
    longrope.Block.forward, torch.nn.utils.clip_grad_norm_ = looking, clipping
    train(arguments)


def test_bfloat16_computes_on_float32_masters_gradients_and_tables(command, tmp_path, alone):
    spawn(2, look_into_bfloat16, command(tmp_path, "--dtype", "bfloat16"), tmp_path / "seen")
    assert torch.load(tmp_path / "seen", weights_only=True) == {
        "x": torch.bfloat16, "weight": torch.bfloat16, "cos": torch.float32,
        "master": {torch.float32}, "gradient": {torch.float32}}
    loss = column(tmp_path, "loss")
    assert_close(loss, column(alone, "loss"), rtol=0.02, atol=0)
    assert not torch.equal(loss, column(alone, "loss"))


# ---------------------------------------------------------------------------------------------------------------------
# Stop and go on


def test_a_killed_run_goes_on_with_more_processes(command, tmp_path, alone):
    spawn(1, train, command(tmp_path), 3, code=-signal.SIGKILL)
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    spawn(2, train, command(tmp_path))
    assert_same_run(tmp_path, alone)


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_one_goes_on(command, tmp_path, alone):
    spawn(2, train, command(tmp_path), 2, signal.SIGTERM, (1,), code=1)
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    spawn(1, train, command(tmp_path))
    assert_same_run(tmp_path, alone)


def test_torchrun_ends_cleanly(command, tmp_path, alone):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(ROOT / "finetune.py"), *command(tmp_path, "--micro-batch-size", 2)],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu" in done.stdout and done.stdout.count("wrote") == 1
    assert not any(word in done.stderr for word in ("Traceback", "terminate", "Error", "Warning")), done.stderr
    assert_same_run(tmp_path, alone)
