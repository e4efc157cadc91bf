"""LongRoPE (arXiv 2402.13753) around a Llama written from scratch: everything but the search and the training.

    $ python search.py                                    # find rescale factors for the bundled model at 8x its window
    $ python eval_ppl.py --rope none pi ntk yarn out/search-8192/rope.json --len 1024 8192

    from longrope import load_model
    model = load_model("assets/model", rope="yarn", length=8192)
    logits = model(tokens)                                # (B, T) int64 -> (B, T, V)

The lesson comes first: rope, attention, Llama, generation, the measure. A line says where it ends, and plumbing begins.

Dimensions: B batch, T tokens, H query heads, K key/value heads, D head_dim, C model width, V vocabulary.
Rotary pair i = 0 .. D/2-1 joins the coordinates i and i + D/2 of a head ("split-half", as Hugging Face weights are).
"""
import argparse
import fcntl
import functools
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import repeat
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Rope: the subject. Everything LongRoPE changes in a model is the table of cosines and sines made here.


@dataclass(frozen=True)
class Factors:
    """One set of rescale factors. The angle of pair i at position n becomes (paper, eq. 3)

        n / (I(lambda_i, n_hat) * theta^(2i/D)),    I = 1 for n < n_hat, else lambda_i

    and cos and sin are multiplied by `attention_factor`, which sharpens attention over a longer window.
    """
    rescale_factors: tuple         # lambda_i, (D/2,); 1 leaves a pair alone, s is interpolation by s
    n_hat: int = 0                 # the first n_hat tokens keep lambda = 1
    attention_factor: float = 1.0

    def on(self, base):
        """These factors on top of `base`: the lambdas multiply, all else is as here."""
        product = np.multiply(base.rescale_factors, self.rescale_factors)
        return replace(self, rescale_factors=tuple(product.tolist()))


# The formulas that came before share their arguments: D/2, theta, the window L0, and s = L'/L0, L' the target.


def plain(pairs, rope_theta=None, window=None, scale=None):
    """RoPE as it is (arXiv 2104.09864)."""
    return Factors((1.0,) * pairs)


def pi(pairs, rope_theta, window, scale):
    """Position interpolation (arXiv 2306.15595): lambda_i = s, so no angle is beyond the trained ones, but the fast
    pairs, which tell neighbours apart, are blurred."""
    return Factors((float(scale),) * pairs)


def ntk(pairs, rope_theta, window, scale):
    """NTK-aware scaling: lambda_i = s^(2i/(D-2)), from 1 at the fastest pair to s at the slowest."""
    return Factors(tuple((scale ** (2 * np.arange(pairs) / (2 * pairs - 2))).tolist()))


def yarn(pairs, rope_theta, window, scale, beta_fast=32, beta_slow=1):
    """YaRN (arXiv 2309.00071): pairs that turn more than beta_fast times within the window stay as they are, those
    that turn less than beta_slow times are interpolated, between lies a linear ramp. Attention factor 0.1 ln s + 1.
    """
    def pair_turning(times):  # the (fractional) pair that makes `times` full turns within the window
        return 2 * pairs * math.log(window / (times * 2 * math.pi)) / (2 * math.log(rope_theta))
    low = max(math.floor(pair_turning(beta_fast)), 0)
    high = min(math.ceil(pair_turning(beta_slow)), 2 * pairs - 1)
    ramp = np.clip((np.arange(pairs) - low) / max(high - low, 0.001), 0, 1)  # 0 keep ... 1 interpolate
    return Factors(tuple((1 / ((1 - ramp) + ramp / scale)).tolist()), attention_factor=yarn_factor(scale))


FORMULAS = {"none": plain, "pi": pi, "ntk": ntk, "yarn": yarn}


def su_factor(scale, window):
    """sqrt(1 + ln s / ln L0), the attention factor of all released LongRoPE code and of Hugging Face's `longrope`."""
    return math.sqrt(1 + math.log(scale) / math.log(window)) if scale > 1 else 1.0


def yarn_factor(scale):
    """0.1 ln s + 1, YaRN's attention factor."""
    return 0.1 * math.log(scale) + 1 if scale > 1 else 1.0


def inv_freq_of(rescale_factors, rope_theta):
    """1 / (lambda_i * theta^(2i/D)), radians per token, (D/2,) float64."""
    pairs = len(rescale_factors)
    return 1.0 / (np.asarray(rescale_factors, dtype=np.float64) * rope_theta ** (np.arange(pairs) / pairs))


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding with two sets of factors: the long one is for windows of up to s L0 tokens, the short
    one for sequences of at most `short_max_length` tokens in total, since the long one costs those a little (paper,
    section 3.3)."""
    rope_theta: float                        # theta, the base
    original_max_position_embeddings: int    # L0, the window the model was trained on
    trained: Factors                         # what it was trained with; every extension multiplies onto it
    long: Factors
    scale: float = 1.0                       # s = L'/L0
    short: Factors | None = None             # None: the long set serves all lengths
    short_max_length: int = 0

    @property
    def target_length(self):
        """L' = s L0, in tokens."""
        return round(self.scale * self.original_max_position_embeddings)

    def at(self, length):
        """The set for a sequence of `length` tokens in total. It may not change while keys are in a cache, for those
        have been turned by it: so it is chosen by how long the sequence will become."""
        return self.short if self.short and length <= self.short_max_length else self.long

    def table(self, length, device="cpu", total_length=None):
        """cos and sin, (T, D/2) float32 each, for positions 0 .. length-1 of a sequence that will have `total_length`
        tokens, by default `length`.

        The angles are float64: in float32 the cosine is off by 0.0076 at 131072 positions and by 0.12 at 2M.
        """
        factors = self.at(total_length or length)
        rescaled, unscaled = (torch.from_numpy(inv_freq_of(lambdas, self.rope_theta)).to(device) for lambdas in
                              (factors.rescale_factors, np.ones(len(factors.rescale_factors))))  # (D/2,) each
        n = torch.arange(length, dtype=torch.float64, device=device)[:, None]  # positions, (T, 1)
        angles = n * rescaled  # (T, D/2)
        angles[:factors.n_hat] = n[:factors.n_hat] * unscaled
        return (angles.cos() * factors.attention_factor).float(), (angles.sin() * factors.attention_factor).float()


def rotate(x, cos, sin):
    """Turn each pair (i, i + D/2) of x (B, T, heads, D) by its angle, in float32. cos, sin (T, D/2)."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]  # the same for every head
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Attention: three functions (q, k, v) -> out. A block takes any of them.


def attention(q, k, v):
    """Causal softmax(q k^T / sqrt(D)) v. q (B, T, H, D); k, v (B, T, K, D), H a multiple of K -> (B, T, H, D).

    Fewer queries than keys are the last ones: a single query with a cache, or a chunk of a sequence with all before it.
    """
    queries, keys = q.shape[1], k.shape[1]
    assert queries <= keys, f"{queries} queries for {keys} keys"
    if queries > 1 and can_use_flash_attn_4(q):
        return flash_attn_4(q, k, v)[0]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # heads before tokens, as PyTorch wants them
    if q.is_cuda and q.dtype == torch.float32:  # where fewer key heads would cost T x T numbers
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    mask = None
    if 1 < queries < keys:  # is_causal would take them for the first ones
        with _disable_current_modes():  # selective checkpointing is one, and this no tensor to it
            mask = causal_lower_right(queries, keys)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=1 < queries == keys,
                                         enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


class Cache:
    """One layer's keys, already turned, and values: room for T tokens of one sequence, filled from the front."""

    def __init__(self, length, config, like):
        self.filled, shape = 0, (1, length, config.num_key_value_heads, config.head_dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)  # (1, T, K, D)

    def attend(self, q, k, v):
        """The next tokens' queries over the keys of all so far."""
        start, self.filled = self.filled, self.filled + k.shape[1]
        self.k[:, start:self.filled], self.v[:, start:self.filled] = k, v
        return attention(q, self.k[:, :self.filled], self.v[:, :self.filled])


class Context:
    """One sequence over the N processes of a group ("context parallel"). Of its 2N chunks process r has r and 2N-1-r,
    an equal share of causal attention's work, and gathers the keys and values of all."""

    def __init__(self, group):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def mine(self, x, dim):
        """This process's part of what all have whole. Its size in that dimension is a multiple of 2N."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Llama and its kin. Module and parameter names are Hugging Face's Llama's, so that weights load strictly.


@dataclass
class LlamaConfig:
    vocab_size: int
    hidden_size: int              # C
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int      # H
    num_key_value_heads: int      # K
    head_dim: int                 # D
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: Rope                    # what config.json says of it
    biased: tuple = ()            # the projections with a bias
    fused: dict | None = None     # projection: the name of the matrix that holds it, and others, in the checkpoint
    hf: dict | None = None        # config.json as it was read, so that saving keeps what we do not use


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; PyTorch's own does the sum in float32."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim, self.kv_heads = D, config.num_key_value_heads
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias="q_proj" in config.biased)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias="k_proj" in config.biased)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias="v_proj" in config.biased)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias="o_proj" in config.biased)

    def qkv(self, x, cos, sin, heads=None):
        """(B, T, C) -> queries (B, T, H, D) and keys (B, T, K, D), turned, and values (B, T, K, D); with a slice
        `heads` of those key heads alone and of the query heads that share them."""
        def rows(p):
            return p if p is None or not heads else p.unflatten(0, (self.kv_heads, -1))[heads].flatten(0, 1)
        q, k, v = (F.linear(x, rows(proj.weight), rows(proj.bias)).unflatten(-1, (-1, self.head_dim))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias="gate_proj" in config.biased)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias="up_proj" in config.biased)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias="down_proj" in config.biased)

    def hidden(self, x):
        return F.silu(self.gate_proj(x)) * self.up_proj(x)  # SwiGLU


IN_MLP = 2**29   # numbers in an MLP at a time: 1 GiB in bfloat16, and well below 2^31, where kernels become slow
AT_ONCE = 2**31  # attention kernels cannot count so many numbers in their queries or keys


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)
        self.chunk = max(1, IN_MLP // config.intermediate_size // 4096) * 4096  # tokens

    def before(self, x, cos, sin, heads=None):
        """What lies before attention, token by token."""
        return self.self_attn.qkv(self.input_layernorm(x), cos, sin, heads)

    def after(self, x, out):
        """What lies behind it: x with attention's part, and the MLP up to its last product. No backward pass needs that
        one's result, so it is left to `forward`, where activation checkpointing can stop before it."""
        x = x + self.self_attn.o_proj(out.flatten(2))
        return x, self.mlp.hidden(self.post_attention_layernorm(x))

    def forward(self, x, cos, sin, attend=attention, groups=(None,)):
        """(B, T, C) -> (B, T, C). groups: slices of the key heads, attended to one after another; None is all. Without
        gradients a long sequence goes through the MLP, 3.5 C wide in a Llama-3-8B, some tokens at a time."""
        out, some = [], max(1, self.chunk // x.shape[0])
        for heads in groups:
            n = x.shape[1] if heads is None else some
            parts = [self.before(*part, heads) for part in zip(x.split(n, 1), cos.split(n), sin.split(n))]
            out.append(attend(*(joined(pieces, 1) for pieces in zip(*parts))))
            del parts
        out = joined(out, 2)  # (B, T, H, D)

        def finish(x, out, into=None):  # a function, so that one chunk's `hidden` is freed before the next is made
            x, hidden = self.after(x, out)
            return torch.add(x, self.mlp.down_proj(hidden), out=into)
        training = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if training or x.shape[1] <= some:
            return finish(x, out)
        y = torch.empty_like(x)
        for parts in zip(*(t.split(some, 1) for t in (x, out, y))):
            finish(*parts)
        return y


def joined(pieces, dim):
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


class Llama(nn.Module):
    """`rope` is data, not a module: assign another Rope and the next forward pass uses it. With a `context` all its
    processes call with the same tokens, and each works on its part of them."""

    def __init__(self, config, rope=None):
        super().__init__()
        self.config, self.rope, self.context = config, rope or config.rope, None
        self.path = None  # the directory it was loaded from
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def unembedding(self):
        """The output matrix, (V, C): the input embedding again where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def window(self):
        """L0, in tokens, whatever the rope now is."""
        return self.config.rope.original_max_position_embeddings

    def hidden(self, tokens, table=None, attends=None):
        """(B, T) int64 -> (B, T, C), the states whose product with `unembedding` are the logits; with a context those
        of this process's tokens, (B, T/N, C). `generate` brings the rows of a longer table and caches.
        """
        cos, sin = table or self.rope.table(tokens.shape[1], tokens.device)  # once, passed down to every layer
        if context := self.context:
            tokens, cos, sin = context.mine(tokens, 1), context.mine(cos, 0), context.mine(sin, 0)
            attends = repeat(context.attend)
        groups = head_groups(self.config, tokens.numel(), context.size if context else 1)
        x = self.model.embed_tokens(tokens)
        for block, attend in zip(self.model.layers, attends or repeat(attention)):
            x = block(x, cos, sin, attend, groups)
        return self.model.norm(x)

    def forward(self, tokens):
        """(B, T) int64 -> logits (B, T, V). Whole logits of a long sequence are huge: `token_nll` works in chunks."""
        return F.linear(self.hidden(tokens), self.unembedding)


def head_groups(config, tokens, processes=1):
    """Slices of the key heads, as a rule one None for all, so that neither the queries that share them nor their keys,
    gathered from all `processes` of a context, are `AT_ONCE` numbers. Raises UserError where those of one head are."""
    heads = config.num_key_value_heads
    numbers = tokens * config.head_dim * max(config.num_attention_heads // heads, processes)  # of one key head
    if numbers >= AT_ONCE:
        raise UserError(f"{tokens} tokens are too many for this model: the keys of one head, or the queries that share "
                        f"them, are {numbers} numbers, and attention kernels cannot count {AT_ONCE}")
    step = (AT_ONCE - 1) // numbers
    return [None] if step >= heads else [slice(first, first + step) for first in range(0, heads, step)]


@torch.inference_mode()
def generate(model, tokens, count, length=None, stop=()):
    """Greedy decoding: the list of at most `count` tokens after tokens (T,), ending before a token of `stop`.

    The set of factors is that for `length` tokens, by default all there will be, and the table is made once for all:
    keys in a cache cannot be turned anew when the sequence grows over the original window.
    """
    total, new = len(tokens) + count, []
    if model.context or len(head_groups(model.config, len(tokens))) > 1:
        raise UserError("generating keeps all keys and heads in one process: give fewer tokens, no --context-parallel")
    tokens = tokens.to(model.unembedding.device)
    cos, sin = model.rope.table(total, tokens.device, length)
    caches = [Cache(total, model.config, model.unembedding) for _ in model.model.layers]
    while len(new) < count:
        now = slice(caches[0].filled, caches[0].filled + len(tokens))  # the whole prompt, then one token at a time
        last = model.hidden(tokens[None], (cos[now], sin[now]), [cache.attend for cache in caches])[0, -1]
        tokens = F.linear(last, model.unembedding).argmax().view(1)
        if tokens.item() in stop:
            break
        new.append(tokens.item())
    return new


# ---------------------------------------------------------------------------------------------------------------------
# The measure: perplexity = exp(total NLL / total tokens). Search, evaluators and fine-tuning all come through here.


def token_nll(hidden, unembedding, targets, chunk=4096):
    """-log p of each target. hidden (N, C), targets (N,) -> (N,) float32.

    Logits exist for `chunk` tokens at a time; when gradients are wanted they are computed again in the backward pass.
    """
    def of_chunk(h, t):
        return F.cross_entropy(F.linear(h, unembedding).float(), t, reduction="none")
    parts = zip(hidden.split(chunk), targets.split(chunk))
    if torch.is_grad_enabled() and hidden.requires_grad:
        return torch.cat([checkpoint(of_chunk, h, t, use_reentrant=False) for h, t in parts])
    return torch.cat([of_chunk(h, t) for h, t in parts])


@torch.inference_mode()
def over_window(model, tokens, first=1, measure=token_nll):
    """measure(hidden, unembedding, targets) of tokens first .. T-1 of one window, each given all before it. tokens (T,)
    -> (T-first,) float64 on the CPU, the same on all processes of a context."""
    tokens = tokens.to(model.unembedding.device)
    hidden, place = model.hidden(tokens[None])[0], torch.arange(len(tokens), device=tokens.device)
    if model.context:
        place = model.context.mine(place, 0)
    found = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    for rows in ((place >= first - 1) & (place < len(tokens) - 1)).nonzero().flatten().split(4096):
        target = place[rows] + 1  # the token after
        found[target] = measure(hidden[rows], model.unembedding, tokens[target]).double()
    if model.context:  # a place is one process's; the others have 0 there
        dist.all_reduce(found, group=model.context.group)
    return found[first:].cpu()


def window_nll(model, tokens, first=1):
    """-log p of tokens first .. T-1 of one window. Raises UserError where it is not finite."""
    nll = over_window(model, tokens, first)
    if not nll.isfinite().all():
        raise UserError(f"the loss of {(~nll.isfinite()).sum()} of {len(nll)} tokens is not finite: weights or factors "
                        "are broken")
    return nll


def perplexity(nlls, tokens):
    """exp(total NLL / total tokens); None of no tokens."""
    mean = math.fsum(nlls) / tokens if tokens else None
    return mean if mean is None else math.exp(min(mean, 700))


# =====================================================================================================================
# Here the lesson ends. What follows is plumbing: kernels, files, ropes, checkpoints, documents, processes, arguments.

BUNDLED_MODEL = Path(__file__).resolve().parent / "assets" / "model"


class UserError(Exception):
    """Something the user can put right. `run` prints it as one line and exits with code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Kernels. flash-attn-4 is taken where it is installed (Hopper and newer), else PyTorch chooses between its own.

compiling = True  # --no-compile
has_flash_attn_4 = any(package.name == "flash-attn-4" for package in importlib.metadata.distributions())


def can_use_flash_attn_4(q):
    return (has_flash_attn_4 and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0
            and q.shape[-1] <= 128 and torch.cuda.get_device_capability(q.device) >= (9, 0))


def attention_kernel(model):
    """The name of the kernel of a whole window, for the record: kernels differ in their last bits."""
    w = model.unembedding.new_empty(1, model.config.head_dim)
    generation = f" sm_{''.join(map(str, torch.cuda.get_device_capability(w.device)))}" if w.is_cuda else ""
    return ("flash-attn-4" if can_use_flash_attn_4(w) else "pytorch") + generation


def compiled_on_gpus(method, *token_dims):
    """torch.compile for a method of Block, one graph for every layer, rope and length. token_dims: which dimension of
    each tensor is the tokens'. Decoding, a token at a time, and some heads at a time stay as they are."""
    compiled = torch.compile(method)

    @functools.wraps(method)
    def call(self, x, *others):
        if not is_compiled(x) or isinstance(others[-1], slice):
            return method(self, x, *others)
        for tensor, dim in zip((x, *others), token_dims):
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return compiled(self, x, *others)
    return call


def is_compiled(x):
    return compiling and x.is_cuda and x.shape[1] > 1


Block.before, Block.after = compiled_on_gpus(Block.before, 1, 0, 0), compiled_on_gpus(Block.after, 1, 1)
warnings.filterwarnings("ignore", "Argument aux_data")  # of flash-attn-4's compiler, at the first call


# A custom operator, so that selective checkpointing sees it as one. It returns the log-sum-exp too: that and the output
# are all its backward pass needs.
@torch.library.custom_op("longrope::flash_attn_4", mutates_args=())
def flash_attn_4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """flash-attn-4's causal attention of the last queries: the output (B, T, H, D) and the log-sum-exp (B, H, T)."""
    from flash_attn.cute.interface import _flash_attn_fwd  # here, as it takes seconds
    out, lse, *_ = _flash_attn_fwd(q, k, v, causal=True, return_lse=True)
    return out, lse


@torch.library.custom_op("longrope::flash_attn_4_backward", mutates_args=())
def flash_attn_4_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                          lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd
    dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, out, grad.contiguous(), lse, causal=True)
    return dq, dk, dv


flash_attn_4.register_autograd(
    lambda ctx, grad, _: flash_attn_4_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def reading(path):
    """Around the reading and parsing of what a user gave, and nothing else: a mistake becomes a UserError naming it."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # parsers raise almost any; strerror leaves out what OSError says of the path
        words = f"{e} is missing" if isinstance(e, KeyError) else getattr(e, "strerror", None) or str(e)
        raise UserError(f"{path}: {' '.join(words.split())[:300] or type(e).__name__}") from None


def read_json(path):
    with reading(path):
        return {**json.loads(Path(path).read_text(encoding="utf-8-sig"))}


@contextmanager
def whole_file(path):
    """A file appears whole or not at all: give out a name beside it, rename when it is written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


class Journal:
    """What a run has found so far, in a .jsonl file, from which the same command goes on where it was stopped.

    The first line, {"setup": ...}, holds what must agree; {"run": ...} records the rest, paths and machine, of each
    run; every other line is a result, in `rows`, flushed when it is written. A torn or garbled line is dropped, it
    alone. Only the first process has the file, and locks it. Raises UserError if another run has, or has another setup.
    """

    def __init__(self, path, setup, run):
        self.path, self.run, self.starts, rows = Path(path), run, [], []
        if rank() == 0:
            with reading(path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = open(self.path, "a+b")
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path}: another run is writing there; give another --out") from None
            except OSError:
                warn(f"{path}: no locks on this file system; see that no other run writes there")
            rows = self.read(json.loads(json.dumps(setup)))
        self.rows = spread(lambda _: rows, [None])[0]

    def read(self, setup):
        """The rows in the file. `starts`: the bytes before each."""
        lines, at, before, rows = [*open(self.path, "rb")], 0, None, []
        for line in lines:
            with suppress(ValueError, TypeError, RecursionError):
                entry = {**json.loads(line)}
                before = before or entry.get("setup")
                if not {"setup", "run"} & entry.keys():
                    rows.append(entry)
                    self.starts.append(at)
            at += len(line)
        if not before and not b'{"setup": '.startswith(b"".join(lines)[:10]):  # empty, or torn in its first line
            raise UserError(f"{self.path}: not a journal of this program; give another --out")
        if not before:
            self.file.truncate(0)
            self.put({"setup": setup})
        elif differs := [key for key in {**setup, **before} if before.get(key) != setup.get(key)]:
            raise UserError(f"{self.path} is of a run with another {', '.join(differs)}; give another --out")
        elif not lines[-1].endswith(b"\n"):
            self.file.write(b"\n")
        return rows

    def put(self, entry):
        self.file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        self.file.flush()

    def write(self, row):
        """Another result; all processes call with the same."""
        self.rows.append(row)
        if rank() == 0:
            if self.run:
                self.run = self.put({"run": self.run})
            self.put(row)

    def cut(self, count):
        """Keep the first `count` of the rows that were read."""
        if rank() == 0 and count < len(self.rows):
            self.file.truncate(self.starts[count])
        del self.rows[count:]


# ---------------------------------------------------------------------------------------------------------------------
# Ropes in files and on command lines

# Hugging Face's `rope_parameters` of longrope, which come first in rope.json
HF_KEYS = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "long_factor", "short_factor",
           "attention_factor")
ROPES = ("none, pi, ntk, yarn (yarn:16 fixes s, which is else the length over the model's window), model (its "
         "directory's rope.json, or else its config.json), config (config.json alone) or a rope.json (default: none pi "
         "ntk yarn, and model if it has a rope.json)")


def rope_to_dict(rope):
    """HF_KEYS, then what Hugging Face's format has no place for."""
    short = rope.short or rope.long
    return {
        "rope_type": "longrope", "rope_theta": rope.rope_theta, "factor": rope.scale,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "long_factor": list(rope.long.rescale_factors), "short_factor": list(short.rescale_factors),
        "attention_factor": rope.long.attention_factor,
        "long_n_hat": rope.long.n_hat, "short_n_hat": short.n_hat, "short_attention_factor": short.attention_factor,
        "short_max_length": rope.short_max_length or rope.original_max_position_embeddings,
        "trained_factor": list(rope.trained.rescale_factors),
    }


def rope_from_dict(d, trained=None):
    """The inverse of `rope_to_dict`. A plain Hugging Face dict has one attention factor for both sets, no n_hat, and
    does not say what the model was `trained` with: None is plain RoPE. Raises what `reading` tells in words."""
    d = {k: v for k, v in d.items() if v is not None}
    if d.get("rope_type", "longrope") != "longrope":
        raise ValueError("not of rope_type longrope")
    window, theta, scale = int(d["original_max_position_embeddings"]), float(d["rope_theta"]), float(d.get("factor", 1))
    factor = float(d["attention_factor"]) if "attention_factor" in d else su_factor(scale, window)
    pairs = len(d["long_factor"])

    def factors(name, attention_factor):
        found = Factors(tuple(map(float, d[f"{name}_factor"])), int(d.get(f"{name}_n_hat", 0)), float(attention_factor))
        if len(found.rescale_factors) != pairs:
            raise ValueError(f"long_factor has {pairs} factors, {name}_factor {len(found.rescale_factors)}")
        numbers = *found.rescale_factors, found.attention_factor, theta, scale, window
        if not all(math.isfinite(x) and x > 0 for x in numbers) or found.n_hat < 0:
            raise ValueError(f"{name}_factor: factors must be finite and above 0, n_hat 0 or more")
        return found
    trained = factors("trained", 1.0) if "trained_factor" in d else trained or plain(pairs)
    long, short = factors("long", factor), factors("short", d.get("short_attention_factor", factor))
    if short == long:
        return Rope(theta, window, trained, long, scale)
    return Rope(theta, window, trained, long, scale, short, int(d.get("short_max_length", window)))


def load_rope(path, trained=None):
    """The Rope in a rope.json. trained: for one that does not say it (see `rope_from_dict`). Raises UserError."""
    d = read_json(path)
    with reading(path):
        return rope_from_dict(d, trained)


def sha256_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def resolve_rope(rope, model, length=None):
    """A Rope from what `load_model` and the command lines accept (see there), checked against the model."""
    config = model.config.rope
    if rope is None:
        rope = model.path / "rope.json" if (model.path / "rope.json").exists() else "config"
    if rope == "config":
        return config
    name, _, fixed = str(rope).partition(":")
    if name in FORMULAS:
        if name != "none" and not (length or fixed):
            raise UserError(f"rope {rope}: for how many tokens? Give length, or s as in {rope}:8")
        try:
            scale = float(fixed) if fixed else max(1.0, (length or model.window) / model.window)
        except ValueError:
            scale = 0.0
        if not 1 <= scale < math.inf:
            raise UserError(f"rope {rope}: the number behind the colon is s, the extension, a number from 1 up")
        pairs = len(config.trained.rescale_factors)
        long = FORMULAS[name](pairs, config.rope_theta, model.window, scale).on(config.trained)
        return replace(config, long=long, scale=scale, short=None, short_max_length=0)
    if isinstance(rope, Rope):
        return fitting(rope, config, "rope")
    if not Path(rope).is_file():
        hint = "; a model's directory is for --model" if Path(rope).is_dir() else ""
        raise UserError(f"rope {rope}: not none, pi, ntk, yarn (yarn:16 fixes s) or config, nor a rope.json file{hint}")
    return fitting(load_rope(rope, config.trained), config, rope)


def fitting(rope, config, source):
    """`rope`, if it is for a model whose config.json describes the Rope `config`. Raises UserError."""
    for what, ours, theirs in (
            ("rope_theta", rope.rope_theta, config.rope_theta),
            ("original window", rope.original_max_position_embeddings, config.original_max_position_embeddings),
            ("number of factors", len(rope.long.rescale_factors), len(config.long.rescale_factors))):
        if not math.isclose(ours, theirs):
            raise UserError(f"{source}: its {what} is {ours:g}, this model's is {theirs:g}")
    return rope


def resolve_ropes(names, lengths, model):
    """{(name, length): Rope}, all at once: a mistake in any shows before the first is measured."""
    own = ["model"] if (model.path / "rope.json").exists() else []
    return {(name, length): resolve_rope(None if name == "model" else name, model, length)
            for length in lengths for name in dict.fromkeys(names or [*FORMULAS, *own])}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: Hugging Face directories (config.json, *.safetensors, tokenizer.json), with rope.json beside.

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
# model_type: the class it has in config.json, which projections have a bias, which are one matrix in the checkpoint
FAMILIES = {
    "llama": ("LlamaForCausalLM", (), {}),
    "mistral": ("MistralForCausalLM", (), {}),
    "qwen2": ("Qwen2ForCausalLM", QKV, {}),
    "phi3": ("Phi3ForCausalLM", (), dict.fromkeys(QKV, "qkv_proj") | dict.fromkeys(GATE_UP, "gate_up_proj")),
}
BESIDE = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
          "generation_config.json")


def read_config(d):
    """LlamaConfig of Hugging Face's config.json, of transformers 5 or 4. Raises what `reading` tells in words."""
    name = (d.get("architectures") or [d.get("model_type", "unknown")])[0]
    architecture, biased, fused = FAMILIES.get(family := d.get("model_type"), (None, (), {}))
    if not architecture or name not in (architecture, family):
        raise ValueError(f"{name} is not supported; supported: {', '.join(f[0] for f in FAMILIES.values())}")
    if d.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {d['hidden_act']} is not supported, only SwiGLU's silu")
    biased += (*QKV, "o_proj") * bool(d.get("attention_bias"))
    biased += (*GATE_UP, "down_proj") * bool(d.get("mlp_bias"))
    heads = d["num_attention_heads"]
    head_dim = d.get("head_dim") or d["hidden_size"] // heads
    sliding = d.get("sliding_window", 4096 if family == "mistral" else None)  # transformers' defaults
    if sliding and d.get("use_sliding_window", family != "qwen2"):
        warn(f"its own attention slides over the last {sliding} tokens; here every token attends to all before it")
    return LlamaConfig(
        **{k: d[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        num_attention_heads=heads, num_key_value_heads=d.get("num_key_value_heads") or heads, head_dim=head_dim,
        rms_norm_eps=d.get("rms_norm_eps", 1e-6), tie_word_embeddings=d.get("tie_word_embeddings", False),
        rope=rope_of_config(d, head_dim // 2), biased=biased, fused=fused, hf=d)


def rope_of_config(d, pairs):
    """The Rope that a config.json describes: what transformers does, where a Rope can say it exactly."""
    window = d["max_position_embeddings"]
    given = {k: v for k, v in (d.get("rope_scaling") or d.get("rope_parameters") or {}).items() if v is not None}
    given = {"rope_theta": d.get("rope_theta") or 10000.0, "original_max_position_embeddings": window} | given
    given |= {k: d[k] for k in ("original_max_position_embeddings",) if d.get(k)}
    kind = "longrope" if "long_factor" in given else given.get("rope_type", given.get("type", "default"))
    if (given.get("partial_rotary_factor") or d.get("partial_rotary_factor") or 1) != 1:
        kind = "partial rotary"
    theta, before = float(given["rope_theta"]), given["original_max_position_embeddings"]
    match kind:  # older Phi-3 calls longrope "su"
        case "longrope":
            rope = rope_from_dict({"factor": window / before} | given | {"rope_type": kind})
            if len(rope.long.rescale_factors) != pairs:
                raise ValueError(f"{len(rope.long.rescale_factors)} factors, head_dim {2 * pairs} needs {pairs}")
            return rope
        case "yarn" if not {"mscale", "mscale_all_dim", "truncate", "attention_factor"} & given.keys():
            scale, betas = float(given["factor"]), (given.get("beta_fast", 32), given.get("beta_slow", 1))
            return Rope(theta, before, plain(pairs), yarn(pairs, theta, before, scale, *betas), scale)
        case "default":
            trained = plain(pairs)
        case "linear":
            trained = pi(pairs, theta, window, given["factor"])
        case "llama3":  # YaRN's ramp over the turns within an earlier window, `before`
            low, high = given["low_freq_factor"], given["high_freq_factor"]
            keep = np.clip((before / (2 * math.pi) * inv_freq_of(np.ones(pairs), theta) - low) / (high - low), 0, 1)
            trained = Factors(tuple((1 / (keep + (1 - keep) / given["factor"])).tolist()))
        case _:
            raise ValueError(f"rope type {kind!r} is not supported; supported: default, linear, llama3, yarn without "
                             "options, longrope")
    return Rope(theta, window, trained, trained)


def load_model(path=BUNDLED_MODEL, rope=None, length=None, device=None, dtype=None):
    """The model in a Hugging Face directory or on the Hub, in eval mode.

    rope: None = what the directory says (its rope.json before its config), "config" = its config alone, a Rope, a path
    to a rope.json, or "none" | "pi" | "ntk" | "yarn" for `length` tokens. device: cuda if there is one, else cpu; meta
    reads no weights. dtype: bfloat16 on cuda, float32 on cpu. Raises UserError.
    """
    path = model_directory(path)
    with reading(f"device {device}"):
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        if device.index is not None:
            torch.cuda.set_device(device)  # kernels are chosen for, and started on, the current one
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    with reading(path / "config.json"):
        config = read_config(read_json(path / "config.json"))
    if (path / "rope.json").exists():
        said = fitting(load_rope(path / "rope.json", config.rope.trained), config.rope, path / "rope.json")
        config.rope = replace(config.rope, trained=said.trained)
    elif config.rope.scale != 1:
        warn(f"{path}: no rope.json says what it was trained with; taken to be plain RoPE, within the original window "
             f"of {config.rope.original_max_position_embeddings} tokens")
    with torch.device("meta"):
        model = Llama(config)
    state, parts = {}, stored_names(model)
    for file in weight_files(path) if device.type != "meta" else ():
        with reading(file):
            for name, tensor in load_file(file).items():
                ours = parts.get(name, [name])  # several where the checkpoint has one matrix for them
                rows = [model.get_parameter(n).shape[0] for n in ours] if len(ours) > 1 else len(tensor)
                state |= zip(ours, tensor.to(device, dtype).split(rows))
    unused = ("rotary_emb.inv_freq", *("lm_head.weight",) * config.tie_word_embeddings)  # of old Llamas; kept twice
    state = {name: tensor for name, tensor in state.items() if not name.endswith(unused)}
    with reading(path):  # missing, unexpected or wrongly shaped tensors
        model.load_state_dict(state, strict=device.type != "meta", assign=True)
    model.path = path
    model.rope = resolve_rope(rope, model, length)
    return model.requires_grad_(False).eval()


def model_directory(path):
    """A directory stays itself; NAME/REPO that is no directory is fetched from the Hub (the needed files only)."""
    path = Path(path)
    if path.is_dir():
        return path
    if len(path.parts) != 2 or path.is_absolute() or path.parts[0] in (".", ".."):
        raise UserError(f"model {path}: no such directory")
    from huggingface_hub import snapshot_download  # only here, so that everything else works without it
    with reading(f"model {path}: no such directory, and the Hub says"):
        return Path(snapshot_download(str(path), allow_patterns=[
            *BESIDE, "config.json", "rope.json", "model*.safetensors", "model.safetensors.index.json"]))


def stored_names(model):
    """{name in the checkpoint: our names of its parts, from the first row on}. Only a fused matrix has several."""
    names = {}
    for ours in model.state_dict():
        *before, module, kind = ours.split(".")
        names.setdefault(".".join((*before, model.config.fused.get(module, module), kind)), []).append(ours)
    return names


def weight_files(path):
    """The safetensors files of a directory."""
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    if (index := path / "model.safetensors.index.json").exists():
        with reading(index):
            files = [path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if not files:
        raise UserError(f"{path}: no .safetensors file (other formats are not read, since they can run code)")
    return files


def save_model(model, path, dtype=torch.bfloat16):
    """Write a Hugging Face directory that transformers loads as it is."""
    save_config(model, path, dtype)
    save_weights(model, path, model.state_dict(), dtype)


def save_weights(model, path, state, dtype=torch.bfloat16):
    """model.safetensors alone. `state`: the model's state_dict, gathered where each process has a part only."""
    state = {name: torch.cat([state[part].detach().to("cpu", dtype) for part in parts])
             for name, parts in stored_names(model).items()}
    with whole_file(Path(path) / "model.safetensors") as part:
        save_file(state, part, metadata={"format": "pt"})
        part.chmod(0o644)  # it makes them readable by their owner alone


def save_config(model, path, dtype=None):
    """All of that but the weights: the rope goes into config.json, in transformers 4's words and in 5's, and with what
    those have no place for into rope.json; the tokenizer is copied from where the model came from. dtype: None is that
    of the weights there. Attention is full here, so no sliding window is written, nor code's names."""
    path, rope, d, config = Path(path), model.rope, rope_to_dict(model.rope), dict(model.config.hf)
    for key in ("auto_map", "layer_types", "use_sliding_window", *(("torch_dtype",) if dtype else ())):
        config.pop(key, None)
    config |= {"sliding_window": None} | ({"dtype": str(dtype).removeprefix("torch.")} if dtype else {})
    if rope != model.config.rope:  # or else config.json says it already
        parameters, window = {k: d[k] for k in HF_KEYS}, rope.original_max_position_embeddings
        said = rope_to_dict(rope_from_dict(parameters, rope.trained))
        if lost := [f"{k} {v:.4g} (transformers will take {said[k]:.4g})" for k, v in d.items() if v != said[k]]:
            warn(f"{path}: config.json has no place for {', '.join(lost)}; rope.json beside it, which this program "
                 "reads, has")
        parameters |= {"short_mscale": d["short_attention_factor"], "long_mscale": d["attention_factor"]}  # for vLLM
        unscaled = rope.long == plain(len(rope.long.rescale_factors)) and not rope.short
        config |= {"rope_theta": rope.rope_theta, "rope_scaling": None if unscaled else parameters,
                   "rope_parameters": {"rope_type": "default", "rope_theta": rope.rope_theta} if unscaled else
                   parameters, "max_position_embeddings": window if unscaled else rope.target_length,
                   "original_max_position_embeddings": window}  # Phi3 looks for it here
    write_json(path / "config.json", config)
    write_json(path / "rope.json", d)
    for file in {file for name in BESIDE for file in model.path.glob(name)} if model.path not in (None, path) else ():
        with whole_file(path / file.name) as part:
            part.write_bytes(file.read_bytes())


def load_tokenizer(path=BUNDLED_MODEL):
    """tokenizer.json of a model directory, as a `tokenizers.Tokenizer`. Raises UserError."""
    file = model_directory(path) / "tokenizer.json"
    with reading(file):
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    tokenizer.no_truncation()  # transformers ignores what the file says of these two
    tokenizer.no_padding()
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Documents: text -> tokens -> windows of exactly T tokens.


def read_documents(paths, min_characters=0, books=slice(5)):
    """Yield (name, text) from .txt files, directories of them and .jsonl(.gz) files with a "text" field, in the order
    given and, within a directory, of the names. No path: `books` of the bundled ten, joined where it takes several to
    reach `min_characters`. Raises UserError."""
    if not paths:
        names, text = [], ""
        for name, book in [*documents_in(BUNDLED_MODEL.parent / "books.jsonl.gz")][books]:
            names, text = [*names, name], text + book
            if len(text) >= min_characters:
                yield " + ".join(names), text
                names, text = [], ""
        if text:
            yield " + ".join(names), text
    for path in map(Path, paths):
        kinds = (".txt", ".jsonl", ".jsonl.gz")
        files = sorted(p for p in path.rglob("*") if p.name.endswith(kinds)) if path.is_dir() else [path]
        if not files:
            raise UserError(f"data {path}: no .txt or .jsonl file in it")
        for file in files:
            for name, text in documents_in(file):
                if "\ufffd" in text:
                    warn(f"{name}: has bytes that are not UTF-8, read as U+FFFD")
                yield name, text


def documents_in(file):
    """Yield (name, text) from one file."""
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        with reading(f"data {file}"):
            text = file.read_text(encoding="utf-8-sig", errors="replace")
        yield file.name, text
        return
    opened = gzip.open if file.suffix == ".gz" else open
    with reading(f"data {file}"), opened(file, "rt", encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            with reading(f"{file}, line {number}: not a JSON object with a \"text\" field"):
                record = json.loads(line)
                text = "" + record["text"]
            yield str(record.get("title", f"{file.name}:{number}")), text


def windows(documents, tokenizer, length, samples):
    """The first `length` tokens of each of the first `samples` documents that have so many -> [(name, tokens (T,))].

    A beginning-of-text token comes first if the tokenizer adds it by itself. Shorter documents are left out, with a
    line on stderr. Raises UserError if none is long enough.
    """
    found, short = [], {}
    for name, text in documents:
        characters = 8 * length  # encode a beginning only; books are far longer than most windows
        while len(tokens := tokenizer.encode(text[:characters]).ids) <= length + 16 and characters < len(text):
            characters *= 2  # the cut changes the last few tokens at most
        if len(tokens) < length:
            short[name] = len(tokens)
        else:
            found.append((name, torch.tensor(tokens[:length])))
        if len(found) == samples:
            break
    if not found:
        raise UserError(f"no document of {length} tokens: the longest of {len(short)} has "
                        f"{max(short.values(), default=0)}; give longer documents (--data) or a shorter --len")
    if short:
        warn(f"left out {len(short)} documents shorter than {length} tokens: {shorten(', '.join(short), 200)}")
    return found


def data_hash(tokens):
    """sha256 over the tokens of windows: what was measured, whatever files it came from."""
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tokens)).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Processes: those of torchrun. The first one prints and writes.


def join_processes(device=None):
    """Under torchrun: join its processes and take this one's GPU. Before `load_model`."""
    if "RANK" in os.environ and not dist.is_initialized():
        gpu = None
        if torch.cuda.is_available() and (device or "cuda").startswith("cuda"):
            gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(gpu)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=1),  # a window can take an hour
                                device_id=gpu)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def say(line, file=None):
    """A line on stdout, of the first process only, clear of the progress bar."""
    if rank() == 0:
        tqdm.write(line, file=file)


def warn(line):
    say(line, sys.stderr)


def spread(measure, items, together=1):
    """[measure(x) for x in items], dealt to torchrun's processes, `together` of them on one item. All of them get the
    whole list in the order of `items`, so sums over it do not depend on their number."""
    groups = world_size() // together
    mine = [measure(x) for x in items[rank() // together::groups]]
    parts = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, mine)
    return [parts[i % groups * together][i // groups] for i in range(len(items))]


def share_sequences(model, processes, lengths):
    """--context-parallel, once the lengths of the sequences are known. Raises UserError."""
    if world_size() % processes:
        raise UserError(f"--context-parallel {processes}: torchrun has {world_size()} processes, which is no multiple")
    for length in lengths if processes > 1 else ():
        if length % (2 * processes):
            raise UserError(f"--context-parallel {processes}: {length} tokens are no multiple of {2 * processes}")
    model.context = Context(dist.new_subgroups(processes)[0]) if processes > 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts share


def add_arguments(parser, data=True):
    parser.add_argument("--model", default=os.path.relpath(BUNDLED_MODEL),
                        help="Hugging Face directory or Hub id (default: the bundled model)")
    if data:
        parser.add_argument("--data", nargs="+", default=[], metavar="PATH", help=".txt files, directories of them, or "
                            ".jsonl(.gz) with a \"text\" field (default: five of the ten books in assets)")
    parser.add_argument("--context-parallel", type=natural, default=1, metavar="N",
                        help="processes of torchrun that work on one sequence (default: 1; in "
                        "finetune.py as few as let --batch-size be dealt evenly)")
    parser.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"],
                        help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false",
                        help="do without torch.compile on cuda, which needs a C compiler")
    parser.add_argument("--seed", type=whole, default=0, metavar="N", help="of everything random (default: 0)")


def whole(text, least=0):
    """argparse's type of numbers 0, 1, 2, ..."""
    if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r} is not {least}, {least + 1}, {least + 2}, ...")
    return int(text)


natural = functools.partial(whole, least=1)


def begin(args):
    """What all scripts start with: processes, and the model with its config's own rope."""
    global compiling
    join_processes(args.device)
    compiling = args.compile
    return load_model(args.model, "config", None, args.device, args.dtype)


def describe(model, tokenizer):
    """What must agree, among other things, for two runs to be parts of one."""
    w, sample = model.unembedding, hashlib.sha256()
    for p in model.parameters():  # a little of every tensor: quick, and any training changes it
        sample.update(p.flatten()[:1024].double().cpu().numpy().tobytes())
    return {"weights_sha256": sample.hexdigest(), "tokenizer_sha256": sha256_of(tokenizer.to_str()),
            "dtype": str(w.dtype).removeprefix("torch."), "kernel": attention_kernel(model),
            "compiled": bool(compiling and w.is_cuda)}


def recorded(args, **more):
    """What need not agree, for the record: arguments, versions and machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    return {"arguments": arguments, "python": platform.python_version(), "torch": torch.__version__,
            "device": device, "processes": world_size(), **more}


def forward_flops(model, length):
    """Floating-point operations of one forward pass over a window of `length` tokens: 2 for each weight and token, and
    causal attention's two matrix products, 2 * 2 * T^2/2 * H * D in each layer."""
    c = model.config
    matrices = sum(p.numel() for block in model.model.layers for p in block.parameters()) + model.unembedding.numel()
    return 2 * matrices * length + 2 * length**2 * c.num_attention_heads * c.head_dim * c.num_hidden_layers


def utilisation(flops, seconds, device):
    """Model FLOP utilisation of all processes' GPUs, None if their peak (bfloat16, dense, data sheets) is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
    return next((flops / seconds / (peak * world_size()) for gpu, peak in peaks.items() if gpu in name), None)


def warm_up(model, length):
    """Let libraries start and kernels compile, which no measurement should pay for. On a GPU long sequences have
    kernels of their own, so the pass is over up to 65536 of `length` tokens."""
    step = 2 * model.context.size if model.context else 2
    window_nll(model, torch.zeros(min(length, 65536 if model.unembedding.is_cuda else 32) // step * step, dtype=int))


def run(main, remedy="lower --len"):
    """main() with mistakes of the user's, and running out of memory, told in one line and exit code 2."""
    try:
        main()
    except (Exception, KeyboardInterrupt) as e:
        memory = isinstance(e, RuntimeError) and re.search(r"tried to allocate [\d.]+ \w+", str(e), re.IGNORECASE)
        if not (memory or isinstance(e, (UserError, OSError, SafetensorError, KeyboardInterrupt))):  # a full disk
            raise
        line = "stopped; the same command goes on" if isinstance(e, KeyboardInterrupt) else e
        line = f"out of memory, {memory[0]}: {remedy}" if memory else line  # a CPU's is a plain RuntimeError
        with suppress(OSError):  # a pipe that Ctrl-C closed, too
            tqdm.write(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)  # clear of the progress bar
        sys.exit(1 if isinstance(e, KeyboardInterrupt) else 2)
    if dist.is_initialized():
        dist.barrier()  # none tears its connections down while another still writes
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # all is written; gloo's threads sometimes abort when the interpreter takes them down
