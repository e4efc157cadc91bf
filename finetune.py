"""Fine-tune a model under LongRoPE factors: a plain training loop, documents packed into segments of --len tokens.

    $ python finetune.py                                  # 20 steps of the bundled model at 8 times its window
    $ torchrun --nproc-per-node 8 finetune.py --model DIR --rope rope.json --len 131072 --data books/ --steps 400

Under torchrun the model is sharded over all processes (FSDP2), on CPUs too; --context-parallel 4 spreads every sequence
over 4 of them. Ctrl-C, or a scheduler's SIGTERM, lets the step in flight end and writes a checkpoint; the same command
goes on from the last one, on any number of processes. The result, in --out, is a Hugging Face directory with rope.json
beside; log.jsonl has a line a step. The paper: LLaMA2 --steps 400 --batch-size 32, Mistral --steps 400 --batch-size 64
--lr 1e-6 --schedule constant --len 16384.
"""
import argparse
import functools
import hashlib
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
from functools import partial
from pathlib import Path

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
from longrope import (BUNDLED_MODEL, Journal, UserError, add_arguments, barrier, describe, forward_flops,
                      join_processes, load_model, load_tokenizer, natural, rank, read_documents, recorded,
                      resolve_rope, rope_to_dict, run, save_config, save_weights, say, share_sequences, spread,
                      token_nll, utilisation, whole, whole_file, world_size)

# ---------------------------------------------------------------------------------------------------------------------
# Data


def segments(documents, tokenizer, length, bos, eos):
    """Cut documents into segments of exactly `length` tokens, each bookended by BOS and EOS (paper, section 4.1).

    What fills no segment of its own is joined to the next document, EOS and BOS between, so short documents are packed.
    Yields (n, length) int32. Raises UserError if there is none.
    """
    body, rest, found = length - 2, np.empty(0, np.int32), 0
    for _, text in documents:
        # a long text is encoded in pieces, all cores at once; the seam between two pieces costs a token or two
        pieces = [text[i:i + 100_000] for i in range(0, len(text), 100_000)]
        encoded = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        between = [eos, bos] if len(rest) and encoded else []
        tokens = np.concatenate([rest, between, *(e.ids for e in encoded)]).astype(np.int32)
        count = len(tokens) // body
        inner, rest = tokens[:count * body].reshape(count, body), tokens[count * body:]
        found += count
        yield np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (bos, eos)))
    if not found:
        raise UserError(f"all documents together are {len(rest)} tokens, too few for a segment of {length}: give more "
                        "(--data) or a shorter --len")


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
    with BOS and EOS in place of each one's first and last token. Pieces within the original window are trained under
    the short set, so that it is not forgotten (LongRoPE2's mixed context window training, arXiv 2502.20082)."""
    whole_length, found = data.shape[1], []
    for at in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(at, len(data))
        length, rows = reading_order(len(data), epoch, batch_size, seed, (whole_length, *mix))[place]
        found.append(data.view(-1, length)[rows])
    batch = torch.cat(found).long()
    if batch.shape[1] < whole_length:
        batch[:, 0], batch[:, -1] = data[0, 0], data[0, -1]
    return batch


# ---------------------------------------------------------------------------------------------------------------------
# The model over several processes. One sequence over several of them is Context in longrope.py.


def recompute(model):
    """Activation checkpointing: all but attention's output is computed again in the backward pass."""
    keep = partial(create_selective_checkpoint_contexts, [
        torch.ops.longrope.flash_attn_4.default,  # what `attention` comes down to
        *(getattr(torch.ops.aten, f"_{name}").default for name in (
            "scaled_dot_product_cudnn_attention", "scaled_dot_product_flash_attention", "efficient_attention_forward",
            "scaled_dot_product_efficient_attention", "scaled_dot_product_flash_attention_for_cpu"))])
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


def loss_of(model, tokens, compute_dtype):
    """Summed -log p of tokens 1 .. T-1 of each row, or of the part of them that is this process's. tokens (B, T)."""
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)  # nothing follows the last token, which cross_entropy skips
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
    return peak * (1 - (step - warmup) / max(1, steps - warmup)) if schedule == "linear" else peak


def train_step(model, optimizer, batch, micro_batch_size, compute_dtype, device):
    """One optimizer step on a batch (B, T) that all processes have -> (loss a token, gradient norm)."""
    together = model.context.size if model.context else 1
    mine = batch[rank() // together::world_size() // together]  # those of this process's group
    total = torch.zeros((), device=device)
    for tokens in mine.split(micro_batch_size):
        loss = loss_of(model, tokens.to(device), compute_dtype) / (len(batch) * (batch.shape[1] - 1))
        (loss * world_size()).backward()  # FSDP takes the mean over processes; gradients add up over micro-batches
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if dist.is_initialized():
        dist.all_reduce(total)
        norm = norm.full_tensor()
    if not (total + norm).isfinite():
        raise UserError(f"the loss is {total.item()}, its gradient's norm {norm.item()}: lower --lr; the last "
                        "checkpoint is whole")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total.item(), norm.item()


def train(model, data, device, args, journal, asked):
    """The training loop: fp32 master weights, bf16 compute on a GPU. `data` (N, T) segments. Returns how many steps are
    done, fewer than --steps only if `asked` was no longer empty after one; that step then has a checkpoint."""
    compute_dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model.requires_grad_(True).train()
    if args.checkpointing:
        recompute(model)
    if dist.is_initialized():
        shard(model, device, compute_dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=device.type == "cuda")
    start = load_checkpoint(args.out, model, optimizer)
    journal.cut(start)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="train", unit="step", smoothing=0.05,
               disable=rank() > 0)
    for step in bar:
        begun = time.perf_counter()
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
        batch = batch_of(data, step, args.batch_size, args.seed, args.mix)  # the same on all processes
        pieces, length = batch.shape
        loss, norm = train_step(model, optimizer, batch, args.micro_batch_size * args.len // length, compute_dtype,
                                device)
        flops = 3 * forward_flops(model, length) * pieces  # backward is twice forward
        line = {"step": step, "len": length, "loss": loss, "lr": lr, "grad_norm": norm}
        line |= speed(batch.numel(), flops, time.perf_counter() - begun, device)
        journal.write(line)
        stop = any(spread(lambda _: len(asked), range(world_size())))
        if stop or (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(args.out, model, optimizer, step + 1)
        if stop:
            return step + 1
        bar.set_postfix({k: f"{line[k]:.4g}" for k in line if k not in ("step", "len", "lr")})
    return args.steps


# =====================================================================================================================
# Here the lesson ends. What follows is plumbing: the segments' file, signals, checkpoints, the result, arguments.


def segments_file(read, source, tokenizer, length, bos, eos, out):
    """The segments of the documents that read() yields, (N, length). They are tokenised once, by the first process, to
    a memory-mapped file in `out` that has their hash in its name."""
    path = out / f"segments-{source[:16]}.bin"
    if rank() == 0 and not path.exists():
        for old in out.glob("segments-*.bin*"):
            old.unlink()
        with whole_file(path) as part, open(part, "wb") as file:
            for found in segments(read(), tokenizer, length, bos, eos):
                found.tofile(file)
    barrier()
    # mode c, copy on write: torch wants memory that could be written to
    return torch.from_numpy(np.memmap(path, np.int32, mode="c").reshape(-1, length))


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


def speed(tokens, flops, seconds, device):
    """Tokens per second, model FLOP utilisation if the GPU's peak is known, and the most memory used so far."""
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mfu = utilisation(flops, seconds, device)
    return {"tokens_per_s": round(tokens / seconds), **({"mfu": round(mfu, 4)} if mfu else {}),
            "peak_gib": round(peak / 2**30, 2)}


def checkpoints(out):
    """The whole checkpoints in `out`, {step: directory}, the latest last."""
    found = {int(path.name[11:]): path for path in out.glob("checkpoint-*") if path.name[11:].isdecimal()}
    return dict(sorted(found.items()))


def remove(paths):
    """Checkpoints lose their names first, so that none is taken for whole while it goes."""
    for path in paths:
        shutil.rmtree(path.replace(path.with_suffix(".part")), ignore_errors=True)


@contextmanager
def checkpoint_errors(what):
    try:
        yield
    except CheckpointException as e:  # around what any of the processes met
        raise UserError(f"{what}: {' '.join(str(next(iter(e.failures.values()))[0]).split())[:300]}") from None


def save_checkpoint(out, model, optimizer, step):
    """All processes write their parts into one directory, which gets its name when it is whole."""
    older, path = checkpoints(out), out / f"checkpoint-{step}"
    part = path.with_suffix(".part")
    if rank() == 0:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    barrier()
    with checkpoint_errors(f"{path} cannot be written"):
        dcp.save(dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer))), checkpoint_id=part)
    if rank() == 0:
        part.rename(path)
        remove(older.values())
    barrier()


def load_checkpoint(out, model, optimizer):
    """Put model and optimizer back as they were; returns the next step, 0 without a checkpoint."""
    if not (found := checkpoints(out)):
        return 0
    step, path = found.popitem()
    state = dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer)))
    with checkpoint_errors(f"{path} cannot be read; delete it to go on without"):
        dcp.load(state, checkpoint_id=path)
    states.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    say(f"going on at step {step}")
    return step


def save_gathered(model, out):
    """The Hugging Face directory of a model that may be sharded, written by the first process."""
    whole_state = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = states.get_model_state_dict(model, options=whole_state)
    if rank() == 0:
        save_weights(model, out, state)
    barrier()


def plot_loss(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    for length in (lengths := sorted({row["len"] for row in rows})):
        mine = [row for row in rows if row["len"] == length]
        ax.plot([row["step"] for row in mine], [row["loss"] for row in mine], lw=1, label=f"{length} tokens")
    if len(lengths) > 1:
        ax.legend()
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=str(path.parent))
    fig.savefig(path, dpi=120)
    plt.close(fig)


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
    p.set_defaults(context_parallel=None)
    p.add_argument("--rope", help="rope.json, or none, pi, ntk, yarn, of which yarn:16 fixes s (default: what the "
                   "model's directory says; for the bundled model out/search-LEN/rope.json or else, at 8 times its "
                   "window, assets/rope.json)")
    p.add_argument("--len", type=natural, help="tokens in a segment (default: 8 times the model's window)")
    p.add_argument("--mix", type=mixed, nargs="+", default=[], metavar="LEN[:TIMES]",
                   help="each step is of whole segments or of as many tokens in pieces of one of these lengths, which "
                   "must divide --len, from anywhere in the data; whole and each length count once, 8192:5 five "
                   "times, and that is how likely they are. Pieces that the short set serves are trained under it, so "
                   "that the window is not forgotten (default: all are left whole)")
    p.add_argument("--steps", type=natural, default=20, help="optimizer steps (default: 20)")
    p.add_argument("--lr", type=float, default=2e-5, help="peak learning rate (default: 2e-5)")
    p.add_argument("--schedule", choices=["linear", "constant"], default="linear",
                   help="decay of the learning rate after the warm-up (default: linear)")
    p.add_argument("--warmup", type=whole, help="steps of linear warm-up (default: 20, at most a quarter of --steps; "
                   "ours, the paper gives none)")
    p.add_argument("--batch-size", type=natural, help="segments in a step, over all processes (default: 32, on CPUs 1)")
    p.add_argument("--micro-batch-size", type=natural, default=1, help="segments on a device at a time (default: 1)")
    p.add_argument("--checkpointing", action=argparse.BooleanOptionalAction,
                   help="compute activations, but attention's output, again in the backward pass (default: when "
                   "tokens on a device x layers x width exceed 5e8, where keeping them takes some 25 GiB)")
    p.add_argument("--save-every", type=natural, default=50, help="steps between checkpoints (default: 50)")
    p.add_argument("--out", type=Path, help="directory of the result (default: out/finetune-LEN)")
    return p


def complete(args, model, device):
    """Fill in what was not given and refuse what cannot work. -> the rope"""
    config, target = model.config, 8 * model.window
    args.len = args.len or target
    args.batch_size = args.batch_size or (1 if device.type == "cpu" else 32)
    args.warmup = min(20, args.steps // 4) if args.warmup is None else args.warmup
    args.out = args.out or Path(f"out/finetune-{args.len}")
    args.mix = [length for entry in args.mix for length in entry]
    if not 0 < args.lr < 1 or args.dtype == "float16":
        raise UserError("--lr must be above 0 and below 1, --dtype bfloat16 or float32, as gradients vanish in float16")
    for length in (args.len, *args.mix):
        if length < 4 or args.len % length:
            raise UserError(f"--mix {length}: --len {args.len} must be a multiple of it, and both at least 4")
    if args.context_parallel is None:
        args.context_parallel = world_size() // math.gcd(world_size(), args.batch_size)
    share_sequences(model, args.context_parallel, (args.len, *args.mix))
    groups = world_size() // args.context_parallel
    if args.batch_size % groups:
        raise UserError(f"{world_size()} processes, {args.context_parallel} to a sequence, cannot share --batch-size "
                        f"{args.batch_size} evenly")
    if args.checkpointing is None:
        tokens = min(args.micro_batch_size, args.batch_size // groups) * args.len // args.context_parallel
        args.checkpointing = tokens * config.num_hidden_layers * config.hidden_size > 5e8
    if not args.rope and Path(args.model).resolve() == BUNDLED_MODEL:
        searched = [Path(f"out/search-{args.len}/rope.json"), BUNDLED_MODEL.parent / "rope.json"]
        args.rope = next((str(path) for path in searched[:1 + (args.len == target)] if path.is_file()), None)
    rope = resolve_rope(args.rope, model, args.len)
    if args.len > rope.target_length:  # --rope none reaches any
        raise UserError(f"--len {args.len}: {args.rope or 'the model'} reaches {rope.target_length} tokens; search "
                        f"factors (search.py --len {args.len}) and give --rope, or --rope none to go without")
    if args.mix and min(args.mix) <= model.window and max(rope.long.rescale_factors) > 1 and not rope.short:
        raise UserError(f"--mix {min(args.mix)} is within the model's window of {model.window} tokens, but these "
                        "factors have no short set to train it under: give a rope.json that search.py wrote")
    return rope


def bookends(model):
    """(BOS, EOS) of config.json: the first of a list, EOS for both where the family has no BOS. Raises UserError."""
    bos, eos = (v[0] if isinstance(v, list) else v for v in map(model.config.hf.get, ("bos_token_id", "eos_token_id")))
    if eos is None:
        raise UserError(f"{model.path}: config.json names no eos_token_id to end segments with")
    if bos is None:
        say("config.json names no bos_token_id: segments begin with EOS, too")
    return eos if bos is None else bos, eos


def main(argv=None):
    args = parser().parse_args(argv)
    join_processes(args.device)
    longrope.compiling = args.compile
    # where the model is sharded no device has to hold all of it, and one process alone reads it (see shard)
    model = load_model(args.model, "config", None, ("meta" if rank() else "cpu") if dist.is_initialized() else
                       args.device, torch.float32)
    device = model.unembedding.device
    if dist.is_initialized():
        nccl = dist.get_backend() == "nccl"
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    model.rope, out = complete(args, model, device), args.out
    tokenizer, (bos, eos) = load_tokenizer(args.model), bookends(model)
    factors = model.rope.at(args.len).rescale_factors
    read = partial(read_documents, args.data, 0, slice(5, None))
    say(f"fine-tuning {args.model} on segments of {args.len} tokens of {' '.join(args.data) or 'five books in assets'}"
        f"\nrope {args.rope or 'of the model'}, factors {min(factors):.2f} to {max(factors):.2f}; {args.steps} steps "
        f"of {args.batch_size} segments, lr {args.lr:g} {args.schedule} after {args.warmup} steps of warm-up"
        f"\n{world_size()} processes on {device.type}, {args.context_parallel} to a sequence, activation checkpointing "
        f"{'on' if args.checkpointing else 'off'}; the result goes to {out}")
    source = hashlib.sha256(f"{args.len} {bos} {eos} {tokenizer.to_str()}".encode())
    for _, text in read():
        source.update(hashlib.sha256(text.encode(errors="replace")).digest())
    same = ("len", "mix", "seed", "batch_size", "steps", "lr", "schedule", "warmup")
    setup = {key: getattr(args, key) for key in same} | {
        "dtype": args.dtype, "rope": rope_to_dict(model.rope), "data_sha256": source.hexdigest()}
    if rank() == 0:
        setup |= {"weights_sha256": describe(model, tokenizer)["weights_sha256"]}
        if list(out.glob("*.safetensors")) and not (out / "log.jsonl").is_file():
            raise UserError(f"--out {out}: has the weights of something else; give another directory")
    journal = Journal(out / "log.jsonl", setup, recorded(args, checkpointing=args.checkpointing))
    if journal.rows and "result" in journal.rows[-1]:
        remove(sorted(out.glob("checkpoint-*")) if rank() == 0 else ())
        return say(f"{out} is whole: this run has come to its end")
    if rank() == 0:
        save_config(model, out, torch.bfloat16)  # what cannot be written shows before the training
    data = segments_file(read, source.hexdigest(), tokenizer, args.len, bos, eos, out)
    say(f"{len(data)} segments")
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process is well
    begun = time.perf_counter()
    with asked_to_stop() as asked:
        done = train(model, data, device, args, journal, asked)
        if done < args.steps:
            with suppress(OSError):
                say(f"stopped at step {done}; the same command goes on")
            barrier()
            sys.exit(1)
        save_gathered(model, out)
        if rank() == 0:
            plot_loss(journal.rows, out / "loss.png")
        journal.write({"result": "model.safetensors", "segments": len(data),
                       "seconds": round(time.perf_counter() - begun, 1)})
        if rank() == 0:
            remove(sorted(out.glob("checkpoint-*")))
        say(f"wrote {out}, in it log.jsonl and loss.png")


if __name__ == "__main__":
    run(main, "lower --len or --micro-batch-size, set --checkpointing, or raise --context-parallel")
