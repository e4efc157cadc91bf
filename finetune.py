"""Fine-tune a model under LongRoPE factors: a plain training loop, documents cut into segments of --len tokens.

    $ python finetune.py --rope out/search-8192/rope.json --steps 20
    $ python finetune.py --model DIR --rope rope.json --len 131072 --data books/ --steps 400 --resume

The result, in --out, is a Hugging Face directory with rope.json beside; log.jsonl has a line a step.
"""
import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from longrope import (
    UserError,
    add_arguments,
    load_model,
    load_tokenizer,
    read_documents,
    resolve_rope,
    run,
    save_model,
    token_nll,
    versions,
    whole_file,
    write_json,
)


def segments(documents, tokenizer, length, bos, eos):
    """Cut documents into segments of exactly `length` tokens, each bookended by BOS and EOS (paper, section 4.1).

    The rest of a document that fills no segment is left out. -> (N, length) int32. Raises UserError if there is none.
    """
    found, tokens_read, body = [], 0, length - 2
    for _, text in documents:
        # a long text is encoded in pieces, all cores at once; the seam between two pieces costs a token or two
        pieces = [text[i:i + 100_000] for i in range(0, len(text), 100_000)]
        encoded = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        tokens = np.concatenate([np.array(e.ids, dtype=np.int32) for e in encoded] or [np.empty(0, np.int32)])
        tokens_read += len(tokens)
        if whole := len(tokens) // body:
            inner = tokens[:whole * body].reshape(whole, body)
            found.append(np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (bos, eos))))
    if not found:
        raise UserError(f"no document fills one segment of {length} tokens ({tokens_read} tokens in all): lower --len")
    return torch.from_numpy(np.concatenate(found))


def batch_of(data, step, batch_size, seed):
    """The segments of step `step`: every epoch is a permutation of all segments, drawn from the seed and the epoch."""
    picked = []
    for at in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(at, len(data))
        if not picked or place == 0:
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        picked.append(order[place])
    return data[torch.stack(picked)].long()


def learning_rate(step, steps, peak, warmup, schedule):
    """Linear warm-up from 0 to `peak`, then linear or cosine decay to 0, or constant."""
    if step < warmup:
        return peak * (step + 1) / warmup
    left = 1 - (step - warmup) / max(1, steps - warmup)  # 1 ... 0
    return peak * {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[schedule]


def loss_of(model, tokens, compute_dtype):
    """Summed -log p of tokens 1 .. T-1 of each row. tokens (B, T)."""
    with torch.autocast(tokens.device.type, compute_dtype, enabled=compute_dtype != torch.float32):
        hidden = model.hidden(tokens)[:, :-1]
        return token_nll(hidden.flatten(0, 1), model.unembedding, tokens[:, 1:].flatten()).sum()


def train(model, data, args, out):
    """The training loop: fp32 master weights, bf16 compute on a GPU. `data` (N, T) segments."""
    device = model.unembedding.device
    compute_dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": args.weight_decay},
                                   {"params": rest, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    start = load_checkpoint(out, model, optimizer) if args.resume else 0
    model.requires_grad_(True).train()
    if device.type == "cuda":
        for block in model.model.layers:
            block.compile()
    targets = args.batch_size * (data.shape[1] - 1)  # predicted tokens in a step
    log = open_log(out / "log.jsonl", start)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc="train", unit="step", smoothing=0.05)
    for step in bar:
        begun = time.perf_counter()
        lr = learning_rate(step, args.steps, args.lr, args.warmup, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=device)
        for tokens in batch_of(data, step, args.batch_size, args.seed).split(args.micro_batch_size):
            loss = loss_of(model, tokens.to(device), compute_dtype) / targets
            loss.backward()  # gradients add up over the micro-batches
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        line = {"step": step, "loss": total.item(), "lr": lr, "grad_norm": norm.item()}
        line["tokens_per_s"] = round(args.batch_size * data.shape[1] / (time.perf_counter() - begun))
        log.write(json.dumps(line) + "\n")
        log.flush()
        bar.set_postfix(loss=f"{line['loss']:.4f}", tokens_per_s=line["tokens_per_s"])
        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            save_checkpoint(out, model, optimizer, step + 1)
    log.close()
    model.requires_grad_(False).eval()


def open_log(path, start):
    """log.jsonl, cut back to the steps before `start`."""
    lines = path.read_text().splitlines()[:start] if start else []
    with whole_file(path) as part:
        part.write_text("".join(line + "\n" for line in lines))
    return open(path, "a")


def save_checkpoint(out, model, optimizer, step):
    with whole_file(out / "checkpoint.pt") as part:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, part)


def load_checkpoint(out, model, optimizer):
    """Put model and optimizer back as they were; returns the next step. Without a checkpoint it starts at 0."""
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location=model.unembedding.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"resumed at step {state['step']}")
    return state["step"]


def plot_loss(log, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    fig, ax = plt.subplots(figsize=(7, 4))
    ax.plot([line["step"] for line in lines], [line["loss"] for line in lines], lw=1)
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=str(path.parent))
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(p)
    p.add_argument("--rope", help="rope.json, or none, pi, ntk, yarn (default: what the model's directory says)")
    p.add_argument("--len", type=int, help="tokens in a segment (default: 8 times the model's window)")
    p.add_argument("--steps", type=int, default=400, help="optimizer steps (default: 400)")
    p.add_argument("--lr", type=float, default=2e-5, help="peak learning rate (default: 2e-5)")
    p.add_argument("--schedule", choices=["linear", "cosine", "constant"], default="linear",
                   help="decay of the learning rate after the warm-up (default: linear)")
    p.add_argument("--warmup", type=int, default=20, help="steps of linear warm-up (default: 20)")
    p.add_argument("--batch-size", type=int, default=32, help="segments in a step (default: 32)")
    p.add_argument("--micro-batch-size", type=int, default=1, help="segments on the device at a time (default: 1)")
    p.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (default: 1.0)")
    p.add_argument("--weight-decay", type=float, default=0.0, help="on matrices, not on norms (default: 0)")
    p.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: 50)")
    p.add_argument("--out", type=Path, help="directory of the result (default: out/finetune-LEN)")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    for name in ("steps", "batch_size", "micro_batch_size", "save_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    model = load_model(args.model, "config", None, args.device, torch.float32)
    length = args.len or 8 * model.window
    if length < 4:
        raise UserError(f"--len {length}: a segment is BOS, text and EOS, at least 4 tokens")
    model.rope = resolve_rope(args.rope, model, length)
    out = args.out or Path(f"out/finetune-{length}")
    bos, eos = (model.config.hf.get(k) for k in ("bos_token_id", "eos_token_id"))
    if not (isinstance(bos, int) and isinstance(eos, int)):
        raise UserError(f"{args.model}: config.json names no bos_token_id and eos_token_id to bookend segments with")
    data = segments(read_documents(args.data, 5 * length), load_tokenizer(args.model), length, bos, eos)
    print(f"{len(data)} segments of {length} tokens, {args.steps} steps of {args.batch_size}; rope factors "
          f"{min(model.rope.at(length).rescale_factors):.2f} to {max(model.rope.at(length).rescale_factors):.2f}")
    begun = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    train(model, data, args, out)
    save_model(model, out)
    plot_loss(out / "log.jsonl", out / "loss.png")
    write_json(out / "run.json", {"arguments": {k: str(v) for k, v in vars(args).items()}, "segments": len(data),
                                  "seconds": round(time.perf_counter() - begun, 1), **versions()})
    (out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
