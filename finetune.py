"""Fine-tune a model under LongRoPE factors: a plain training loop, documents cut into segments of --len tokens.

    $ python finetune.py                                  # 20 steps of the bundled model at 8 times its window
    $ torchrun --nproc-per-node 8 finetune.py --model DIR --rope rope.json --len 131072 --data books/ --recipe llama2

Under torchrun the model is sharded over all processes (FSDP2), on CPUs too; --context-parallel 4 spreads every sequence
over 4 of them. Ctrl-C, or a scheduler's SIGTERM, lets the step in flight end and writes a checkpoint; --resume goes on
from the last one, on any number of processes. The result, in --out, is a Hugging Face directory with rope.json beside;
log.jsonl has a line a step.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as states
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

from longrope import (
    BUNDLED_MODEL,
    UserError,
    add_arguments,
    attention,
    barrier,
    compile_blocks,
    forward_flops,
    is_installed,
    join_processes,
    load_model,
    load_tokenizer,
    rank,
    read_documents,
    read_json,
    resolve_rope,
    run,
    save_model,
    say,
    spread,
    token_nll,
    use_attention,
    utilisation,
    versions,
    weights_hash,
    whole_file,
    world_size,
    write_json,
)

RECIPES = {  # of the paper, section 4.1; None: a short run, of a size for the machine
    None: {"lr": 2e-5, "schedule": "linear", "steps": 20},
    "llama2": {"lr": 2e-5, "schedule": "linear", "steps": 400, "batch_size": 32},
    "mistral": {"lr": 1e-6, "schedule": "constant", "steps": 400, "batch_size": 64, "len": 16384},
}
REMEDY = "lower --len or --micro-batch-size, set --checkpointing, or raise --context-parallel"  # out of memory


# ---------------------------------------------------------------------------------------------------------------------
# Data


def segments(documents, tokenizer, length, bos, eos):
    """Cut documents into segments of exactly `length` tokens, each bookended by BOS and EOS (paper, section 4.1).

    The rest of a document that fills no segment is left out. Yields (n, length) int32, n segments of one document.
    Raises UserError if there is none.
    """
    found, tokens_read, body = 0, 0, length - 2
    for _, text in documents:
        # a long text is encoded in pieces, all cores at once; the seam between two pieces costs a token or two
        pieces = [text[i:i + 100_000] for i in range(0, len(text), 100_000)]
        encoded = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        tokens = np.concatenate([np.array(e.ids, dtype=np.int32) for e in encoded] or [np.empty(0, np.int32)])
        tokens_read += len(tokens)
        if whole := len(tokens) // body:
            found += whole
            inner = tokens[:whole * body].reshape(whole, body)
            yield np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (bos, eos)))
    if not found:
        raise UserError(f"no document fills one segment of {length} tokens ({tokens_read} tokens in all): "
                        "give longer documents (--data) or a shorter --len")


def tokenised(read, tokenizer, length, bos, eos, out):
    """The segments of the documents that read() yields, (N, length), and the hash of their source. They are tokenised
    once, by the first process, to a memory-mapped file in `out` that has the hash in its name."""
    source = hashlib.sha256(f"{length} {bos} {eos} {tokenizer.to_str()}".encode())
    for _, text in read():
        source.update(hashlib.sha256(text.encode(errors="replace")).digest())
    path = out / f"segments-{source.hexdigest()[:16]}.bin"
    if rank() == 0 and not path.exists():
        for old in out.glob("segments-*.bin*"):
            old.unlink()
        with whole_file(path) as part, open(part, "wb") as file:
            for found in segments(read(), tokenizer, length, bos, eos):
                found.tofile(file)
    barrier()
    # mode c, copy on write: torch wants memory that could be written to
    return torch.from_numpy(np.memmap(path, np.int32, mode="c").reshape(-1, length)), source.hexdigest()


@functools.lru_cache(2)  # a step may end one epoch and begin the next
def reading_order(count, epoch, batch_size, seed, lengths):
    """For each of an epoch's `count` places: (length, rows), to be read as data.view(-1, length)[rows].

    An epoch is a permutation of all segments, drawn from the seed and the epoch, and each step draws its length from
    `lengths`, whose first is that of a whole segment. The segments of all of the epoch's steps of a shorter length are
    cut, and the pieces shuffled, for neighbours are alike.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator)
    steps = torch.arange(epoch * count, (epoch + 1) * count) // batch_size  # that of each place
    drawn = [random.Random(f"{seed} {step}").choice(lengths) for step in range(steps[0], steps[-1] + 1)]
    length_at = torch.tensor(drawn)[steps - steps[0]]
    found = [None] * count
    for length in sorted(set(lengths)):
        places, pieces = (length_at == length).nonzero().flatten(), lengths[0] // length
        rows = (order[places, None] * pieces + torch.arange(pieces)).flatten()
        if pieces > 1:
            rows = rows[torch.randperm(len(rows), generator=generator)]
        for place, of_place in zip(places.tolist(), rows.split(pieces)):
            found[place] = length, of_place
    return found


def batch_of(data, step, batch_size, seed, mix=()):
    """The tokens of step `step`, (B, T): segments of `data` (N, T) or, as long altogether, pieces of a length of `mix`,
    with BOS and EOS in place of each one's first and last token."""
    whole, found = data.shape[1], []
    for at in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(at, len(data))
        length, rows = reading_order(len(data), epoch, batch_size, seed, (whole, *mix))[place]
        found.append(data.view(-1, length)[rows])
    batch = torch.cat(found).long()
    if batch.shape[1] < whole:
        batch[:, 0], batch[:, -1] = data[0, 0], data[0, -1]
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# The model over several processes


class Context:
    """One sequence over the N processes of a group. Of its 2N chunks process r has r and 2N-1-r, an equal share of
    causal attention's work, and gathers the keys and values of all. `attend` stands where a cache's does."""

    def __init__(self, group):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def mine(self, x, dim):
        chunks = x.chunk(2 * self.size, dim)
        return torch.cat((chunks[self.rank], chunks[-1 - self.rank]), dim)

    def attend(self, q, k, v):
        gather = getattr(funcol, "all_gather_single_autograd", None) or funcol.all_gather_tensor_autograd  # torch 2.11
        kv = gather(torch.stack((k, v)), 0, self.group)  # (2N, B, 2n, K, D), n tokens in a chunk
        if kv.requires_grad:  # the gradient arrives permuted; the collective would send its memory as it lies
            kv.register_hook(torch.Tensor.contiguous)
        front, back = kv.unflatten(0, (self.size, 2)).chunk(2, dim=3)  # chunks 0 .. N-1 and 2N-1 .. N
        k, v = torch.cat((front, back.flip(0))).movedim(0, 2).flatten(2, 3)  # (2, B, T, K, D)
        n = q.shape[1] // 2
        ends = (self.rank + 1) * n, (2 * self.size - self.rank) * n
        return torch.cat([attention(part, k[:, :end], v[:, :end]) for part, end in zip(q.split(n, dim=1), ends)], 1)


def attention_ops():
    """What `attention` comes down to: each returns output and log-sum-exp, all its backward pass needs."""
    found = [torch.ops.longrope.flash_attn_4.default, *(
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in
        ("cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu"))]
    if is_installed("flash-attn"):
        import flash_attn  # noqa: F401, it registers the operator
        found.append(torch.ops.flash_attn._flash_attn_forward.default)
    return found


def recompute(model):
    """Activation checkpointing: all but attention's output is computed again in the backward pass."""
    keep = partial(create_selective_checkpoint_contexts, attention_ops())
    for block in model.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=keep)


def shard(model, device, compute_dtype):
    """FSDP2: fp32 masters and gradient reduction, each block's weights gathered in compute_dtype when they are used.

    Only the first process has read the weights; the others' lie on the meta device until each is sent its shards.
    """
    weights = model.state_dict() if rank() == 0 else {}
    model.to("meta")
    options = {"mesh": init_device_mesh(device.type, (world_size(),)), "mp_policy": MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)}  # cos and sin stay float32
    for block in model.model.layers:
        fully_shard(block, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "hidden")
    model.to_empty(device=device)
    states.set_model_state_dict(model, weights, options=states.StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))


def loss_of(model, tokens, compute_dtype, context=None):
    """Summed -log p of tokens 1 .. T-1 of each row, or of the part of them that is this process's. tokens (B, T)."""
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)  # nothing follows the last token, which cross_entropy skips
    cos, sin = model.rope.table(tokens.shape[1], tokens.device)  # short or long by the length of the whole
    if context:
        tokens, targets, cos, sin = (context.mine(x, dim) for x, dim in ((tokens, 1), (targets, 1), (cos, 0), (sin, 0)))
    autocast = compute_dtype != torch.float32 and not dist.is_initialized()  # FSDP hands out weights in compute_dtype
    with torch.autocast(tokens.device.type, compute_dtype, enabled=autocast):
        hidden = model.hidden(tokens, (cos, sin), [context] * len(model.model.layers))
        return token_nll(hidden.flatten(0, 1), model.unembedding, targets.flatten()).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step, steps, peak, warmup, schedule):
    """Linear warm-up from 0 to `peak`, then linear or cosine decay to 0, or constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)  # 1 ... 0
    return peak * {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[schedule]


@contextmanager
def asked_to_stop():
    """Gives out a list, empty until Ctrl-C or SIGTERM, which then only adds to it; a second Ctrl-C stops at once."""
    asked = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked and rank() == 0:
            with suppress(OSError):  # of a pipe that Ctrl-C closed, too
                os.write(2, b"\nstopping when this step is done, with a checkpoint; Ctrl-C again stops at once\n")
        asked.append(number)
    with ExitStack() as restore:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                restore.callback(signal.signal, number, signal.signal(number, ask))
        yield asked


def train(model, data, device, args, out, identity, asked):
    """The training loop: fp32 master weights, bf16 compute on a GPU. `data` (N, T) segments. Returns how many steps are
    done, fewer than --steps only if `asked` was no longer empty after one; that step then has a checkpoint."""
    compute_dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model.requires_grad_(True).train()
    if args.checkpointing:
        recompute(model)
    if device.type == "cuda" if args.compile is None else args.compile:
        compile_blocks(model)
    if dist.is_initialized():
        shard(model, device, compute_dtype)
    context = Context(dist.new_subgroups(args.context_parallel)[0]) if args.context_parallel > 1 else None
    group, groups = rank() // args.context_parallel, world_size() // args.context_parallel
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": args.weight_decay},
                                   {"params": rest, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    start = load_checkpoint(out, model, optimizer) if args.resume else 0
    log = open_log(out / "log.jsonl", start)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="train", unit="step", smoothing=0.05,
               disable=rank() > 0)
    for step in bar:
        begun = time.perf_counter()
        lr = learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
        for parameters in optimizer.param_groups:
            parameters["lr"] = lr
        batch = batch_of(data, step, args.batch_size, args.seed, args.mix)  # the same on all processes
        pieces, length = batch.shape
        predicted, flops = pieces * (length - 1), 3 * forward_flops(model, length) * pieces  # backward is twice forward
        total = torch.zeros((), device=device)
        for tokens in batch[group::groups].split(args.micro_batch_size * args.len // length):
            # under the short set where it serves this length
            loss = loss_of(model, tokens.to(device), compute_dtype, context) / predicted
            (loss * world_size()).backward()  # FSDP takes the mean over processes; gradients add up over micro-batches
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stop = torch.tensor(len(asked), device=device)  # of any process
        if dist.is_initialized():
            dist.all_reduce(total)
            dist.all_reduce(stop)
            norm = norm.full_tensor()
        line = {"step": step, "len": length, "loss": total.item(), "lr": lr, "grad_norm": norm.item()}
        line |= speed(args.batch_size * args.len, flops, time.perf_counter() - begun, device)
        log.write(json.dumps(line) + "\n")
        log.flush()
        if (stop or (step + 1) % args.save_every == 0) and step + 1 < args.steps:
            save_checkpoint(out, model, optimizer, step + 1, identity)
        if stop:
            break
        bar.set_postfix({k: f"{line[k]:.4g}" for k in line if k not in ("step", "len", "lr")})
    log.close()
    return step + 1


def speed(tokens, flops, seconds, device):
    """Tokens per second, model FLOP utilisation if the GPU's peak is known, and the most memory used so far."""
    line = {"tokens_per_s": round(tokens / seconds)}
    if device.type != "cuda":
        return line | {"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}  # of KiB
    if mfu := utilisation(flops, seconds, device):
        line["mfu"] = round(mfu, 4)
    return line | {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}


def open_log(path, start):
    """log.jsonl, cut back to the steps before `start`; nothing for all processes but the first."""
    if rank() > 0:
        return open(os.devnull, "w")
    lines = path.read_text().splitlines()[:start] if start else []
    with whole_file(path) as part:
        part.write_text("".join(line + "\n" for line in lines))
    return open(path, "a")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: all processes write their parts into one directory, which gets its name when it is whole


def checkpoints(out):
    """The whole checkpoints in `out`, the latest last."""
    found = [path for path in out.glob("checkpoint-*") if path.suffix != ".part"]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def save_checkpoint(out, model, optimizer, step, identity):
    older, path = checkpoints(out), out / f"checkpoint-{step}"
    part = path.with_suffix(".part")
    if rank() == 0:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    barrier()
    dcp.save(dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer))), checkpoint_id=part)
    if rank() == 0:
        write_json(part / "run.json", {"step": step, "segments_read": step * identity["batch_size"], **identity})
        part.rename(path)
        for old in older:
            shutil.rmtree(old)
    barrier()


def load_checkpoint(out, model, optimizer):
    """Put model and optimizer back as they were; returns the next step. Without a checkpoint it starts at 0."""
    if not (found := checkpoints(out)):
        return 0
    saved = read_json(found[-1] / "run.json")
    state = dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer)))
    dcp.load(state, checkpoint_id=found[-1])
    states.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    say(f"resumed at step {saved['step']}")
    return saved["step"]


def is_over(out, resume, identity):
    """Has the run that is to be resumed come to its end? Refuses to go on from a checkpoint of something else, and to
    start over where one is."""
    if not (found := checkpoints(out)):
        ended = read_json(out / "run.json").get("setup") if (out / "run.json").is_file() else None
        if resume and ended == identity:
            say(f"{out} is whole: this run came to its end; without --resume it starts anew")
            return True
        if ended:
            say(f"{out} has the model of an earlier run, which will be replaced")
        return False
    if not resume:
        raise UserError(f"{found[-1]} is of a run that did not end: --resume goes on with it; or delete it")
    saved = read_json(found[-1] / "run.json")
    if other := [k for k in identity if saved.get(k) != identity[k]]:
        raise UserError(f"{found[-1]} is of a run with another {', '.join(other)}: it cannot go on with this one")
    return False


def plot_loss(log, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    fig, ax = plt.subplots(figsize=(7, 4))
    for length in (lengths := sorted({line["len"] for line in lines})):
        mine = [line for line in lines if line["len"] == length]
        ax.plot([line["step"] for line in mine], [line["loss"] for line in mine], lw=1, label=f"{length} tokens")
    if len(lengths) > 1:
        ax.legend()
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=str(path.parent))
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def save_gathered(model, out):
    """The Hugging Face directory of a model that may be sharded, written by the first process."""
    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = states.get_model_state_dict(model, options=whole)
    if rank() == 0:
        save_model(model, out, state=state)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def mixed(entry):
    """An entry of --mix: "8192" -> [8192], "8192:3" -> [8192, 8192, 8192]."""
    if not (found := re.fullmatch(r"(\d+)(?::([1-9]\d*))?", entry)):
        raise argparse.ArgumentTypeError(f"{entry} is no LEN or LEN:TIMES")
    return [int(found[1])] * int(found[2] or 1)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(p)
    p.add_argument("--rope", help="rope.json, or none, pi, ntk, yarn, of which yarn:16 fixes s (default: what the "
                   "model's directory says; for the bundled model out/search-LEN/rope.json or else, at 8 times its "
                   "window, assets/rope.json)")
    p.add_argument("--len", type=int, help="tokens in a segment (default: 8 times the model's window)")
    p.add_argument("--mix", type=mixed, nargs="+", default=[], metavar="LEN[:TIMES]",
                   help="each step is of whole segments or of as many tokens in pieces of one of these lengths, which "
                   "must divide --len, from anywhere in the data; whole and each length count once, 8192:5 five "
                   "times, and that is how likely they are. Pieces that the short set serves, those within the "
                   "original window as a rule, are trained under it, so that the window is not forgotten (LongRoPE2's "
                   "mixed context window training) (default: all are left whole)")
    p.add_argument("--recipe", choices=["llama2", "mistral"],
                   help="the paper's values: lr 2e-5 with linear decay, batch 32, 400 steps | lr 1e-6 constant, "
                   "batch 64, 400 steps, segments of 16384 tokens under the long factors; other flags override them")
    p.add_argument("--steps", type=int, help="optimizer steps (default: 20)")
    p.add_argument("--lr", type=float, help="peak learning rate (default: 2e-5)")
    p.add_argument("--schedule", choices=["linear", "cosine", "constant"],
                   help="decay of the learning rate after the warm-up (default: linear)")
    p.add_argument("--warmup", type=int, help="steps of linear warm-up (default: 20, at most a quarter of --steps; "
                   "ours, the paper gives none)")
    p.add_argument("--batch-size", type=int, help="segments in a step, over all processes (default: 32, on CPUs 1)")
    p.add_argument("--micro-batch-size", type=int, default=1, help="segments on a device at a time (default: 1)")
    p.add_argument("--context-parallel", type=int, metavar="N", help="processes that share one sequence (default: as "
                   "few as let --batch-size be dealt evenly, so 1 unless there are more processes than segments)")
    p.add_argument("--checkpointing", action=argparse.BooleanOptionalAction,
                   help="compute activations, but attention's output, again in the backward pass (default: when "
                   "tokens on a device x layers x width exceed 5e8, where keeping them takes some 25 GiB)")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (default: 1.0; ours)")
    p.add_argument("--weight-decay", type=float, default=0.0, help="on matrices, not on norms (default: 0)")
    p.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: 50)")
    p.add_argument("--out", type=Path, help="directory of the result (default: out/finetune-LEN)")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return p


def complete(args, model, device):
    """Fill in what was not given and refuse what cannot work. -> the rope"""
    config, target = model.config, 8 * model.window if args.len is None else args.len
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.len is None:
        args.len = target
    args.batch_size = args.batch_size if args.batch_size is not None else 1 if device.type == "cpu" else 32
    args.warmup = min(20, args.steps // 4) if args.warmup is None else args.warmup
    args.out = args.out or Path(f"out/finetune-{args.len}")
    args.mix = [length for entry in args.mix for length in entry]
    if args.context_parallel is None:
        args.context_parallel = world_size() // math.gcd(world_size(), max(1, args.batch_size))
    for name in ("steps", "batch_size", "micro_batch_size", "context_parallel", "save_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if args.warmup < 0:
        raise UserError("--warmup must be 0 or more")
    if args.dtype == "float16":
        raise UserError("--dtype float16: gradients would vanish in it; take bfloat16 or float32")
    if args.len < 4:
        raise UserError(f"--len {args.len}: a segment is BOS, text and EOS, at least 4 tokens")
    for length in args.mix:
        if length < 4 or args.len % length:
            raise UserError(f"--mix {length}: --len {args.len} must be a multiple of it, and it at least 4")
    groups, rest = divmod(world_size(), args.context_parallel)
    if rest or args.batch_size % groups:
        raise UserError(f"{world_size()} processes, {args.context_parallel} to a sequence, cannot share --batch-size "
                        f"{args.batch_size} evenly")
    for length in (args.len, *args.mix) if args.context_parallel > 1 else ():
        if length % (2 * args.context_parallel):
            raise UserError(f"{length} tokens are no multiple of {2 * args.context_parallel}, as --context-parallel "
                            f"{args.context_parallel} needs")
    if args.checkpointing is None:
        tokens = min(args.micro_batch_size, args.batch_size // groups) * args.len // args.context_parallel
        args.checkpointing = tokens * config.num_hidden_layers * config.hidden_size > 5e8
    searched = [Path(f"out/search-{target}/rope.json")] + [BUNDLED_MODEL.parent / "rope.json"] * (
        target == 8 * model.window)
    if not args.rope and Path(args.model).resolve() == BUNDLED_MODEL:
        args.rope = next((str(path) for path in searched if path.is_file()), None)
    rope = resolve_rope(args.rope, model, max(target, args.len))
    reach = round(rope.scale * model.window)
    if args.len > reach:  # --rope none reaches any
        raise UserError(f"--len {args.len}: {args.rope or 'the model'} reaches {reach} tokens, its s being "
                        f"{rope.scale:g}; search factors (search.py --len {args.len}) and give --rope, or --rope none "
                        "to go without")
    if args.mix and min(args.mix) <= model.window and max(rope.rescale_factors) > 1 and not rope.short:
        raise UserError(f"--mix {min(args.mix)} is within the model's window of {model.window} tokens, but these "
                        "factors have no short set to train it under: give a rope.json that search.py wrote")
    return rope


def main(argv=None):
    args = parser().parse_args(argv)
    join_processes(args.device)
    use_attention(args.attention)
    # where the model is sharded no device has to hold all of it, and one process alone reads it (see shard)
    model = load_model(args.model, "config", None, ("meta" if rank() else "cpu") if dist.is_initialized() else
                       args.device, torch.float32, args.sliding_window, compile=False)
    device = model.unembedding.device
    if dist.is_initialized():
        nccl = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    rope, out = complete(args, model, device), args.out
    bos, eos = (model.config.hf.get(k) for k in ("bos_token_id", "eos_token_id"))
    if not (isinstance(bos, int) and isinstance(eos, int)):
        raise UserError(f"{args.model}: config.json names no bos_token_id and eos_token_id to bookend segments with")
    # the paper trains Mistral on segments that are shorter than the window, but under the long factors
    model.rope = replace(rope, short=None, short_max_length=0) if args.recipe == "mistral" else rope
    factors = model.rope.at(args.len).rescale_factors
    tokenizer = load_tokenizer(args.model)
    shorter = dict.fromkeys(str(n) for n in args.mix if n < args.len)
    cut = f", whole or cut to {' or '.join(shorter)}," if shorter else ""
    say(f"fine-tuning {args.model} on segments of {args.len} tokens{cut} of "
        f"{' '.join(args.data) or 'the standard library'}"
        f"\nrope {args.rope or 'of the model'}, factors {min(factors):.2f} to {max(factors):.2f}; {args.steps} steps "
        f"of {args.batch_size} segments, lr {args.lr:g} {args.schedule} after {args.warmup} steps of warm-up"
        f"\n{world_size()} processes on {device.type}, {args.context_parallel} to a sequence, activation checkpointing "
        f"{'on' if args.checkpointing else 'off'}; the result goes to {out}")
    out.mkdir(parents=True, exist_ok=True)
    read = partial(read_documents, args.data, 5 * args.len)
    data, source = tokenised(read, tokenizer, args.len, bos, eos, out)
    say(f"{len(data)} segments")
    identity = {"model": spread(weights_hash, [model])[0],  # the first process has the weights
                "data": source, "rope": hashlib.sha256(repr(model.rope).encode()).hexdigest()}
    identity |= {key: getattr(args, key) for key in ("len", "mix", "seed", "batch_size", "steps", "lr", "schedule",
                                                     "warmup", "clip", "weight_decay", "dtype")}
    if is_over(out, args.resume, identity):
        return
    barrier()
    begun = time.perf_counter()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process is well
    with asked_to_stop() as asked:
        done = train(model, data, device, args, out, identity, asked)
        if done < args.steps:
            with suppress(OSError):
                say(f"stopped at step {done}; the same command with --resume goes on")
            barrier()
            sys.exit(1)
        model.rope = rope
        save_gathered(model, out)
        if rank() == 0:
            plot_loss(out / "log.jsonl", out / "loss.png")
            write_json(out / "run.json", {"arguments": {k: str(v) for k, v in vars(args).items()}, "setup": identity,
                                          "segments": len(data), "processes": world_size(),
                                          "seconds": round(time.perf_counter() - begun, 1), **versions()})
            for path in out.glob("checkpoint-*"):
                shutil.rmtree(path)
            say(f"wrote {out}, in it log.jsonl and loss.png")
        barrier()


if __name__ == "__main__":
    run(main, REMEDY)
