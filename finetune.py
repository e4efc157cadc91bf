"""Fine-tune a model under LongRoPE factors: a plain training loop, documents packed into segments of --len tokens.

    $ python finetune.py                                  # 20 steps of the bundled model at 8 times its window
    $ torchrun --nproc-per-node 8 finetune.py --model DIR --rope rope.json --len 131072 --data books/train --steps 400

Under torchrun the model is sharded over all processes (FSDP2), on CPUs too. --out becomes a Hugging Face directory,
on Ctrl-C, SIGTERM or a closed terminal, too (torchrun waits for 30 s; in PyTorch 2.13 see --shutdown-timeout), then
with a checkpoint, from which the same command goes on, on any number of processes.
The paper: LLaMA2 --steps 400 --batch-size 32, Mistral also --batch-size 64 --lr 1e-6 --schedule constant --len 16384,
with "short_max_length": 0 in rope.json, as so short segments would be trained under the short set.
"""
import argparse
import functools
import hashlib
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as states
import torch.nn.functional as F
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

import longrope
from longrope import (BUNDLED_MODEL, NAMED, Journal, Parser, UserError, barrier, describe, forward_flops, in_vocabulary,
                      join_processes, load_model, load_tokenizer, natural, panels_of, rank, read_documents, recorded,
                      resolve_rope, rope_to_dict, run, save_config, save_weights, say, share_sequences, spread,
                      token_id, token_nll, utilisation, warn, whole, whole_file, world_size)

# ---------------------------------------------------------------------------------------------------------------------
# Data


def encode_all(texts, tokenizer):
    """Yield lists of (number of the text, token ids) for pieces of 100,000 characters, 64 for as many cores at once."""
    pieces = ((number, text[i:i + 100_000]) for number, text in enumerate(texts) for i in range(0, len(text), 100_000))
    while some := [*islice(pieces, 64)]:  # seams cost little
        encoded = tokenizer.encode_batch_fast([piece for _, piece in some], add_special_tokens=False)
        yield [(number, e.ids) for (number, _), e in zip(some, encoded)]


def segments(documents, tokenizer, length, bos, eos):
    """Cut documents into segments, each bookended by BOS and EOS (paper, section 4.1), yielded some at a time,
    (n, length) int32. What fills no segment is joined to the next document, EOS and BOS between."""
    body, rest, found, before = length - 2, np.empty(0, np.int32), 0, None
    for some in encode_all((text for _, text in documents), tokenizer):
        parts = [rest]
        for document, ids in some:
            parts += [[eos, bos]] * (document != before and sum(map(len, parts)) % body > 0) + [ids]
            before = document
        tokens = np.concatenate(parts).astype(np.int32)
        count = len(tokens) // body
        inner, rest = tokens[:count * body].reshape(count, body), tokens[count * body:]
        found += count
        yield np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (bos, eos)))
    if not found:
        raise UserError(f"{len(rest)} tokens in all documents, too few for a segment of {length}: give more --data or "
                        "a shorter --len")


def step_length(step, seed, lengths):
    return random.Random(f"{seed} {step}").choice(lengths)


@functools.lru_cache(2)  # a step may end one epoch and begin the next
def reading_order(count, epoch, batch_size, seed, lengths):
    """For each of an epoch's `count` places its rows of data.view(-1, length), length that of its step. An epoch is a
    permutation of all segments; those at places of less than lengths[0] tokens are cut, and the pieces shuffled."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(count, generator=generator)
    steps = torch.arange(epoch * count, (epoch + 1) * count) // batch_size  # that of each place
    length_at = torch.tensor([step_length(step, seed, lengths) for step in steps.tolist()])
    rows_at = {}
    for length in sorted(set(lengths)):
        places, pieces = (length_at == length).nonzero().flatten(), lengths[0] // length
        rows = (order[places, None] * pieces + torch.arange(pieces)).flatten()
        if pieces > 1:
            rows = rows[torch.randperm(len(rows), generator=generator)]
        rows_at.update(zip(places.tolist(), rows.split(pieces)))
    return rows_at


def batch_of(data, step, batch_size, seed, mix=()):
    """The tokens (B, T) of a step: segments of `data` (N, T) or, as many, pieces of a length of `mix`, BOS and EOS in
    place of each one's first and last. Pieces that the short set serves are trained under it (`Rope.at`), lest the
    window is forgotten (LongRoPE2's mixed context window training, arXiv 2502.20082)."""
    lengths = (data.shape[1], *mix)
    length = step_length(step, seed, lengths)
    places = (divmod(at, len(data)) for at in range(step * batch_size, (step + 1) * batch_size))
    rows = torch.cat([reading_order(len(data), epoch, batch_size, seed, lengths)[place] for epoch, place in places])
    batch = data.view(-1, length)[rows].long()
    if length < data.shape[1]:
        batch[:, 0], batch[:, -1] = data[0, 0], data[0, -1]
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# The model over several processes. A sequence over several is Context in longrope.py.


def recompute(model):
    """All but attention's output is computed again in the backward pass."""
    keep = partial(create_selective_checkpoint_contexts, [
        torch.ops.longrope.flash_attn_4.default,  # what `attention` comes down to
        *(getattr(torch.ops.aten, f"_{name}").default for name in (
            "scaled_dot_product_cudnn_attention", "scaled_dot_product_flash_attention", "efficient_attention_forward",
            "scaled_dot_product_efficient_attention", "scaled_dot_product_flash_attention_for_cpu"))])
    for block in model.model.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=keep)


def shard(model, device, compute_dtype):
    """FSDP2: fp32 masters and gradient reduction, each block's weights gathered in compute_dtype for use. The first
    process has read the weights and sends the others, whose model is on the meta device, their shards."""
    weights = model.state_dict() if rank() == 0 else {}
    model.to("meta")
    mesh = init_device_mesh(device.type, (world_size(),))
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)  # cos and sin stay float32
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "hidden")
    model.to_empty(device=device)
    broadcast = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    states.set_model_state_dict(model, weights, options=broadcast)


def loss_of(model, tokens, compute_dtype):
    """Summed -log p of tokens 1 .. T-1 of each row, of this process's part of them. tokens (B, T)."""
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)  # nothing follows the last
    targets = model.context.mine(targets, 1) if model.context else targets
    autocast = compute_dtype != torch.float32 and not dist.is_initialized()  # FSDP hands out weights in compute_dtype
    with torch.autocast(tokens.device.type, compute_dtype, enabled=autocast):
        hidden = model.hidden(tokens)
        return token_nll(hidden.flatten(0, 1), model.unembedding, targets.flatten()).sum()


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def learning_rate(step, steps, peak, warmup, schedule):
    """Linear warm-up from 0 to `peak`, then linear decay to 0, or constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 - (step - warmup) / (steps - warmup)) if schedule == "linear" else peak


def train_step(model, optimizer, batch, micro_batch_size, compute_dtype, device):
    """A step on a batch (B, T) that all processes have -> (loss a token, gradient norm)."""
    together = model.context.size if model.context else 1
    mine = batch[rank() // together::world_size() // together]  # those of this process's group
    total = torch.zeros((), device=device)
    for tokens in mine.split(micro_batch_size):
        loss = loss_of(model, tokens.to(device), compute_dtype) / (len(batch) * (batch.shape[1] - 1))
        (loss * world_size()).backward()  # FSDP takes the mean over processes
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if dist.is_initialized():
        dist.all_reduce(total)
        norm = norm.full_tensor()
    if not (total + norm).isfinite():
        raise UserError(f"the loss is {total.item()}, its gradient's norm {norm.item()}: lower --lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total.item(), norm.item()


def train(model, data, device, args, journal, asked):
    """fp32 master weights, bf16 compute on a GPU; data (N, T). Returns how many steps are done: fewer than --steps if
    `asked` is no longer empty after one."""
    compute_dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model.requires_grad_(True).train()
    if args.checkpointing:
        recompute(model)
    if dist.is_initialized():
        shard(model, device, compute_dtype)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
    start = load_checkpoint(args.out, model, optimizer)
    journal.cut(sum(row["step"] < start for row in journal.rows))
    bar = tqdm(range(start, args.steps), "train", args.steps, initial=start, smoothing=0.05, disable=rank() > 0)
    for step in bar:
        begun = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
        batch = batch_of(data, step, args.batch_size, args.seed, args.mix)  # the same on all processes
        pieces, length = batch.shape
        micro_batch_size = args.micro_batch_size * args.len // length
        loss, norm = train_step(model, optimizer, batch, micro_batch_size, compute_dtype, device)
        flops = 3 * forward_flops(model, length) * pieces  # backward is twice forward
        line = {"step": step, "len": length, "loss": loss, "lr": lr, "grad_norm": norm,
                **speed(batch.numel(), flops, time.perf_counter() - begun, device)}
        journal.write(line)
        stop = any(spread(lambda _: len(asked), range(world_size())))
        if stop or (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(args.out, model, optimizer, step + 1)
        if stop:
            return step + 1
        bar.set_postfix(loss=f"{loss:.4g}", tokens_per_s=line["tokens_per_s"])
    return args.steps


# =====================================================================================================================
# Here the lesson ends. What follows is plumbing: the segments' file, signals, checkpoints, arguments.


def segments_file(read, source, tokenizer, length, bos, eos, out):
    """The segments of read()'s documents, (N, length), tokenised once, to a memory-mapped file named by `source`."""
    path = out / f"segments-{source[:16]}.bin"
    if rank() == 0 and not path.exists():
        for old in out.glob("segments-*.bin*"):
            old.unlink()
        with whole_file(path) as part, open(part, "wb") as file:
            for found in segments(read(), tokenizer, length, bos, eos):
                found.tofile(file)
    barrier()
    return torch.from_file(str(path), size=path.stat().st_size // 4, dtype=torch.int32).view(-1, length)


@contextmanager
def asked_to_stop():
    """A list to which Ctrl-C, SIGTERM and a closed terminal now only add; a second Ctrl-C stops at once."""
    asked = []

    def ask(number, frame):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked and rank() == 0:
            with suppress(OSError):  # Ctrl-C may have closed the pipe
                os.write(2, b"\nstopping when this step is done; Ctrl-C again stops at once\n")
        asked.append(number)
    with ExitStack() as restore:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                restore.callback(signal.signal, number, signal.signal(number, ask))
        yield asked


def speed(tokens, flops, seconds, device):
    cuda, mfu = device.type == "cuda", utilisation(flops, seconds, device)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_s": round(tokens / seconds), **({"mfu": round(mfu, 4)} if mfu else {}),
            "peak_gib": round(peak / 2**30, 2)}


def remove_checkpoints(out, keep=None):
    """They lose their names first, so that none is taken for whole while it goes."""
    for path in sorted(out.glob("checkpoint-*")) if rank() == 0 else ():
        if path != keep and path.name[11:].removesuffix(".part").isdecimal():
            shutil.rmtree(path.replace(path.with_suffix(".part")), ignore_errors=True)


def checkpointed(act, path, model, optimizer):
    """By dcp.save or dcp.load."""
    state = states.get_state_dict(model, optimizer)
    try:
        act(dict(zip(("model", "optimizer"), state)), checkpoint_id=path)
    except CheckpointException as e:  # around what any of the processes met
        met = shorten(str(next(iter(e.failures.values()))[0]), 300)
        raise UserError(f"{path}: {met} (a damaged checkpoint may be deleted)") from None
    return state


def save_checkpoint(out, model, optimizer, step):
    """One directory of all processes, which gets its name when it is whole."""
    path = out / f"checkpoint-{step}"
    checkpointed(dcp.save, part := path.with_suffix(".part"), model, optimizer)
    if rank() == 0:
        part.rename(path)
    remove_checkpoints(out, keep=path)
    barrier()


def load_checkpoint(out, model, optimizer):
    """The next step, 0 without a checkpoint."""
    step = max((int(path.name[11:]) for path in out.glob("checkpoint-*") if path.name[11:].isdecimal()), default=0)
    if step:
        weights, moments = checkpointed(dcp.load, out / f"checkpoint-{step}", model, optimizer)
        states.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        say(f"going on at step {step}")
    return step


def plot_loss(rows, path):
    fig, (ax,) = panels_of(1, 5.2, 3.6)
    for length in sorted({row["len"] for row in rows}):
        mine = [row for row in rows if row["len"] == length]
        ax.plot([row["step"] for row in mine], [row["loss"] for row in mine], lw=1, label=f"{length} tokens")
    ax.legend()
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=str(path.parent))
    fig.savefig(path, dpi=120)


def mixed(entry):
    """An entry of --mix: "8192" -> [8192], "8192:3" -> [8192, 8192, 8192]."""
    length, colon, times = entry.partition(":")
    return [natural(length)] * (natural(times) if colon else 1)


def parser():
    p = Parser(__doc__, conflict_handler="resolve")  # its own --dtype
    p.set_defaults(context_parallel=None)
    p.add_argument("--dtype", choices=["bfloat16", "float32"], help="of what is computed; weights and optimizer are "
                   "float32, the model in --out bfloat16 (default: bfloat16 on cuda, float32 on cpu)")
    p.add_argument("--rope", help=f"{NAMED}, config (config.json alone) or a rope.json (default: the model's "
                   "own, for the bundled one out/search-LEN/rope.json or assets/rope.json)")
    p.add_argument("--len", type=natural, help="tokens in a segment (default: 8 times the model's window)")
    p.add_argument("--mix", type=mixed, nargs="+", default=[], metavar="LEN[:TIMES]",
                   help="each step is of whole segments or of pieces of one of these lengths, which divide --len, each "
                   "as likely, or TIMES times, as whole segments (--len itself adds to these); pieces that the short "
                   "set serves are trained under it, lest the window is forgotten (default: whole segments alone)")
    p.add_argument("--steps", type=natural, default=20, help="optimizer steps (default: 20)")
    p.add_argument("--lr", type=float, default=2e-5, help="peak learning rate (default: 2e-5)")
    p.add_argument("--schedule", choices=["linear", "constant"], default="linear", help="decay (default: linear)")
    p.add_argument("--warmup", type=whole, help="steps of linear warm-up (default: 20, at most a quarter of all)")
    p.add_argument("--batch-size", type=natural, help="segments in a step (default: 32, on CPUs 1)")
    p.add_argument("--micro-batch-size", type=natural, default=1, help="segments on a device at a time (default: 1)")
    p.add_argument("--checkpointing", action=argparse.BooleanOptionalAction,
                   help="compute all but attention again in the backward pass (default: if it saves over 25 GiB a GPU)")
    p.add_argument("--save-every", type=natural, default=50, help="steps between checkpoints, of 12 bytes a "
                   "parameter, two of them for a moment (default: 50)")
    p.add_argument("--out", type=Path, help="directory of the result (default: out/finetune-LEN)")
    return p


def complete(args, model, device):
    """Fill in what was not given and refuse what cannot work -> the rope"""
    target = 8 * model.window
    args.len = args.len or target
    args.batch_size = args.batch_size or (1 if device.type == "cpu" else 32)
    args.warmup = min(20, args.steps // 4) if args.warmup is None else args.warmup
    args.out = args.out or Path(f"out/finetune-{args.len}")
    args.mix = [length for entry in args.mix for length in entry]
    if not 0 < args.lr < 1:
        raise UserError(f"--lr {args.lr:g}: give a number above 0 and below 1")
    for length in (args.len, *args.mix):
        if length < 4 or args.len % length:
            raise UserError(f"--len {args.len}{f' --mix {length}' * (length != args.len)}: give at least 4, and what "
                            "divides --len")
    if args.context_parallel is None:
        args.context_parallel = world_size() // math.gcd(world_size(), args.batch_size)
    share_sequences(model, args.context_parallel, (args.len, *args.mix))
    if args.batch_size % (groups := world_size() // args.context_parallel):
        raise UserError(f"{groups} groups of processes cannot share --batch-size {args.batch_size} evenly")
    if args.checkpointing is None:
        tokens = min(args.micro_batch_size, args.batch_size // groups) * args.len // args.context_parallel
        args.checkpointing = tokens * model.config.num_hidden_layers * model.config.hidden_size > 5e8
    if not args.rope and Path(args.model).resolve() == BUNDLED_MODEL:
        searched = [Path(f"out/search-{args.len}/rope.json"), BUNDLED_MODEL.parent / "rope.json"]
        args.rope = next((str(path) for path in searched[:1 + (args.len == target)] if path.is_file()), None)
    rope = resolve_rope(args.rope, model, args.len)
    if args.len > rope.target_length:  # --rope none reaches any
        raise UserError(f"--len {args.len}: {args.rope or 'the model'} reaches {rope.target_length} tokens; give "
                        "a shorter --len, search factors (search.py) or give --rope none")
    if args.mix and min(args.mix) <= model.window and rope.at(min(args.mix)) == rope.long != rope.trained:
        warn(f"--mix {min(args.mix)}: trained under the long set, as no short one serves the window")
    if rope.at(args.len) != rope.long:
        warn(f"--len {args.len}: trained under the short set, which serves up to {rope.short_max_length} tokens; under "
             "the long one with \"short_max_length\": 0 in rope.json")
    return rope


def bookends(model):
    """(BOS, EOS) of config.json, EOS for both where the family has no BOS."""
    bos, eos = token_id(model, "bos_token_id"), token_id(model, "eos_token_id")
    if eos is None:
        raise UserError(f"{model.path}: config.json names no eos_token_id")
    if bos is None:
        say("config.json names no BOS: segments begin with EOS")
    return eos if bos is None else bos, eos


def load(args):
    """(model, device). A model to be sharded is read by one process, to the CPU."""
    join_processes(args.device)
    longrope.compiling = args.compile
    if not dist.is_initialized():
        model = load_model(args.model, "config", None, args.device, torch.float32)
        return model, model.unembedding.device
    nccl = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    return load_model(args.model, "config", None, "meta" if rank() else "cpu", torch.float32), device


def main(argv=None):
    args = parser().parse_args(argv)
    model, device = load(args)
    model.rope, out = complete(args, model, device), args.out
    tokenizer, (bos, eos) = load_tokenizer(model.path), bookends(model)
    read = partial(read_documents, args.data, 0, slice(5, None))
    say(f"fine-tuning {args.model} on segments of {args.len} tokens, rope {args.rope or 'of the model'}; {args.steps} "
        f"steps of {args.batch_size} segments, lr {args.lr:g}; {world_size()} processes on {device.type}, "
        f"{args.context_parallel} to a sequence; the result goes to {out}")
    source = hashlib.sha256(f"{args.len} {bos} {eos} {tokenizer.to_str()}".encode())
    for _, text in read():
        source.update(hashlib.sha256(text.encode(errors="replace")).digest())
    same = "len", "mix", "seed", "batch_size", "steps", "lr", "schedule", "warmup", "dtype"
    setup = {key: getattr(args, key) for key in same}
    setup |= {"rope": rope_to_dict(model.rope), "data_sha256": source.hexdigest()}
    if rank() == 0:
        setup["weights_sha256"] = describe(model, tokenizer)["weights_sha256"]
    makes = ["config.json", "rope.json"]
    makes += [path.name for kind in ("*.safetensors", "checkpoint-*") for path in out.glob(kind)]
    journal = Journal(out / "log.jsonl", setup, recorded(args), makes)
    if journal.rows and "result" in journal.rows[-1]:
        if not (out / "model.safetensors").exists():
            raise UserError(f"{out}: the run came to its end, but model.safetensors is gone; give another --out")
        remove_checkpoints(out)
        return say(f"{out} is whole: this run has come to its end")
    if rank() == 0:
        save_config(model, out, torch.bfloat16)  # trouble with writing shows now
    data = in_vocabulary(model, segments_file(read, source.hexdigest(), tokenizer, args.len, bos, eos, out))
    say(f"{len(data)} segments")
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    begun = time.perf_counter()
    with asked_to_stop() as asked:
        done = train(model, data, device, args, journal, asked)
        gathered = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = states.get_model_state_dict(model, options=gathered)
        if rank() == 0:
            save_weights(model, out, weights)
            plot_loss(journal.rows, out / "loss.png")
        barrier()
        if done < args.steps:
            with suppress(OSError):
                say(f"stopped at step {done}, whose model is in {out}; the same command goes on")
            sys.exit(1)
        seconds = round(time.perf_counter() - begun, 1)
        journal.write({"result": "model.safetensors", "segments": len(data), "seconds": seconds})
        remove_checkpoints(out)
        say(f"wrote {out}")


if __name__ == "__main__":
    run(main, "lower --len or --micro-batch-size, set --checkpointing, or start more processes")
