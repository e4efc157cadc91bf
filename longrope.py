"""LongRoPE (arXiv 2402.13753) around a Llama written from scratch: everything but the search and the training.

    $ python search.py                                    # find rescale factors for the bundled model at 8x its window
    $ python eval_ppl.py --rope none pi ntk yarn out/search-8192/rope.json --len 1024 8192

    from longrope import load_model
    model = load_model("assets/model", rope="yarn", length=8192)
    logits = model(tokens)                                # (B, T) int64 -> (B, T, V)

The lesson comes first: rope, attention, Llama, generation, the measure. A line says where plumbing begins.
Dimensions: B batch, T tokens, H query heads, K key/value heads, D head_dim, C model width, V vocabulary; N processes.
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
import re
import shutil
import sys
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from itertools import accumulate, chain, islice, repeat
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.distributed import _functional_collectives as functional
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

    and cos and sin are multiplied by `attention_factor`, which sharpens attention over a longer window."""
    rescale_factors: tuple         # lambda_i, (D/2,); 1 leaves a pair alone, s is interpolation by s
    n_hat: int = 0                 # the first n_hat tokens stay as they were trained, lambda = 1 as a rule
    attention_factor: float = 1.0

    def on(self, base):  # base's lambdas times these, all else as here
        return replace(self, rescale_factors=tuple(np.multiply(base.rescale_factors, self.rescale_factors).tolist()))

    def over(self, base):  # the inverse: what gives this `on` base
        return replace(self, rescale_factors=tuple(np.divide(self.rescale_factors, base.rescale_factors).tolist()))


# The formulas that came before share their arguments: D/2, theta, the window L, and s = L'/L, L' the target.
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


def yarn(pairs, rope_theta, window, scale, beta_fast=32, beta_slow=1, truncate=True):
    """YaRN (arXiv 2309.00071): pairs that turn more than beta_fast times within the window stay as they are, those
    that turn less than beta_slow times are interpolated; between, 1/lambda falls linearly (truncate: whole pairs)."""
    def pair_turning(times):  # the (fractional) pair that makes `times` full turns within the window
        return 2 * pairs * math.log(window / (times * 2 * math.pi)) / (2 * math.log(rope_theta))
    low, high = pair_turning(beta_fast), pair_turning(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)  # D - 1, as in YaRN's own code
    ramp = np.clip((np.arange(pairs) - low) / (high - low or 0.001), 0, 1)  # 0 keep ... 1 interpolate
    return Factors(tuple((1 / ((1 - ramp) + ramp / scale)).tolist()), attention_factor=yarn_factor(scale))


def yarn_su(pairs, rope_theta, window, scale):
    """YaRN's factors with LongRoPE's attention factor in place of its own."""
    return replace(yarn(pairs, rope_theta, window, scale), attention_factor=su_factor(scale, window))


FORMULAS = {"none": plain, "pi": pi, "ntk": ntk, "yarn": yarn, "yarn-su": yarn_su}


def su_factor(scale, window):
    """sqrt(1 + ln s / ln L), the attention factor of all released LongRoPE code and of Hugging Face's `longrope`."""
    return math.sqrt(1 + math.log(scale) / math.log(window)) if scale > 1 else 1.0


def yarn_factor(scale, mscale=1):
    """0.1 ln s + 1, YaRN's attention factor."""
    return 0.1 * mscale * math.log(scale) + 1 if scale > 1 else 1.0


def inv_freq_of(rescale_factors, rope_theta):
    """1 / (lambda_i * theta^(2i/D)), radians per token, (D/2,) float64."""
    pairs = len(rescale_factors)
    return 1.0 / (np.asarray(rescale_factors, dtype=np.float64) * rope_theta ** (np.arange(pairs) / pairs))


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding with two sets of factors: the long one for windows of up to s L tokens, the short one
    for sequences of at most `short_max_length` in total, which the long one would hurt (paper, section 3.3)."""
    rope_theta: float                        # theta, the base
    original_max_position_embeddings: int    # L, the window the model was trained on
    trained: Factors                         # plain RoPE or Llama-3.1's; first stages and short sets multiply onto it
    long: Factors
    scale: float = 1.0                       # s = L'/L
    short: Factors | None = None             # None: the long set serves all lengths
    short_max_length: int = 0

    def __post_init__(self):
        check_rope(self)  # that its numbers can be used (below, Ropes in files)

    @property
    def target_length(self):
        return round(self.scale * self.original_max_position_embeddings)  # L', in tokens

    def at(self, length):
        """The set for a sequence of `length` tokens in all: one from start to end, as cached keys have been turned."""
        return self.short if self.short and length <= self.short_max_length else self.long

    def table(self, length, device="cpu", total_length=None):
        """cos and sin, (T, D/2) float32 each, for positions 0 .. length-1 of a sequence of `total_length` in the end,
        by default `length`. From float32 angles cosines would be off by 0.0076 at 131072 positions, by 0.12 at 2M."""
        factors = self.at(total_length or length)
        rescaled = torch.from_numpy(inv_freq_of(factors.rescale_factors, self.rope_theta)).to(device)  # (D/2,)
        trained = torch.from_numpy(inv_freq_of(self.trained.rescale_factors, self.rope_theta)).to(device)
        n = torch.arange(length, dtype=torch.float64, device=device)[:, None]  # positions, (T, 1)
        angles = n * rescaled  # (T, D/2)
        angles[:factors.n_hat] = n[:factors.n_hat] * trained  # but the attention factor is theirs, too
        return (angles.cos() * factors.attention_factor).float(), (angles.sin() * factors.attention_factor).float()


def rotate(x, cos, sin):
    """Turn each pair (i, i + D/2) of x (B, T, heads, D) by its angle, in float32. cos, sin (T, D/2); if they are for
    fewer pairs, as in Phi-4-mini, only the first coordinates of a head are joined in pairs and turn."""
    turning = 2 * cos.shape[-1]
    a, b = x[..., :turning].float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]  # the same for every head
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., turning:].float()), dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Attention: functions (q, k, v) -> out, of which a block takes any: `attention`, and `attend` of Cache or Context.


def attention(q, k, v):
    """Causal softmax(q k^T / sqrt(D)) v. q (B, T, H, D); k, v (B, T, K, D), H a multiple of K -> (B, T, H, D). Fewer
    queries than keys are the last ones: a single one with a cache, or a chunk of a sequence with all before it."""
    queries, keys = q.shape[1], k.shape[1]
    assert queries <= keys, f"{queries} queries for {keys} keys"
    if queries > 1 and can_use_flash_attn_4(q):
        return flash_attn_4(q, k, v)[0]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # heads before tokens, as PyTorch wants them
    if q.is_cuda and q.dtype == torch.float32:  # where grouped heads would store T x T scores
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    mask = None
    if 1 < queries < keys:  # is_causal would take them for the first ones
        with _disable_current_modes():  # selective checkpointing is one, and cannot hold this kind of tensor
            mask = causal_lower_right(queries, keys)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=1 < queries == keys,
                                         enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


class Cache:
    """One layer's keys, already turned, and values: room for T tokens of one sequence, filled from the front."""

    def __init__(self, length, config, like):
        self.filled, shape = 0, (1, length, config.num_key_value_heads, config.head_dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)  # (1, T, K, D)

    def keep(self, k, v):
        start, self.filled = self.filled, self.filled + k.shape[1]
        self.k[:, start:self.filled], self.v[:, start:self.filled] = k, v

    def attend(self, q, k, v):  # the next tokens' queries over the keys of all so far
        self.keep(k, v)
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

    def attend(self, q, k, v, cache=None):
        kv = torch.stack((k, v))  # (2, B, 2n, K, D), n tokens in a chunk
        if torch.is_grad_enabled():
            kv = gather_with_gradient(kv, 0, self.group)  # (2N, B, 2n, K, D): keys, values of process 0, 1, ...
        else:
            kv, mine = kv.new_empty(2 * self.size, *kv.shape[1:]), kv
            gather(kv, mine, self.group)
        if kv.requires_grad:  # the gradient arrives permuted, and the collective sends memory as it lies
            kv.register_hook(torch.Tensor.contiguous)
        front, back = kv.unflatten(0, (self.size, 2)).chunk(2, dim=3)  # chunks 0 .. N-1, 2N-1 .. N, (N, 2, B, n, K, D)
        k, v = torch.cat((front, back.flip(0))).movedim(0, 2).flatten(2, 3)  # (2, B, T, K, D)
        if cache:
            cache.keep(k, v)
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
    biased: tuple                 # the projections with a bias
    qk_norm: bool                 # an RMSNorm on each head's queries and keys, as in Qwen3
    fused: dict                   # projection: the checkpoint's matrix that holds it and others
    hf: dict                      # config.json as it was read, so that saving keeps what we do not use


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.head_dim, self.kv_heads = D, config.num_key_value_heads
        self.q_proj = nn.Linear(C, config.num_attention_heads * D, bias="q_proj" in config.biased)
        self.k_proj = nn.Linear(C, config.num_key_value_heads * D, bias="k_proj" in config.biased)
        self.v_proj = nn.Linear(C, config.num_key_value_heads * D, bias="v_proj" in config.biased)
        self.o_proj = nn.Linear(config.num_attention_heads * D, C, bias="o_proj" in config.biased)
        self.q_norm, self.k_norm = (nn.RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
                                    for _ in range(2))

    def qkv(self, x, cos, sin, heads=None):
        """(B, T, C) -> queries (B, T, H, D) and keys (B, T, K, D), turned, and values (B, T, K, D); with a slice
        `heads` of those key heads alone and of the query heads that share them."""
        def rows(p):
            return p if p is None or not heads else p.unflatten(0, (self.kv_heads, -1))[heads].flatten(0, 1)
        q, k, v = (F.linear(x, rows(proj.weight), rows(proj.bias)).unflatten(-1, (-1, self.head_dim))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias="gate_proj" in config.biased)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias="up_proj" in config.biased)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias="down_proj" in config.biased)

    def hidden(self, x):
        return F.silu(self.gate_proj(x)) * self.up_proj(x)  # SwiGLU


IN_MLP = 2**29   # numbers in an MLP at a time: 1 GiB in bfloat16, well below the 2^31 from which kernels are slow
AT_ONCE = 2**31  # attention kernels cannot count so many numbers in their queries or keys


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)  # x / sqrt(mean(x^2) + eps) * weight
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.chunk = max(1, IN_MLP // config.intermediate_size // 4096) * 4096  # tokens

    def before(self, x, cos, sin, heads=None):
        """What lies before attention, token by token. On GPUs this and `after` are compiled (below, Kernels)."""
        return self.self_attn.qkv(self.input_layernorm(x), cos, sin, heads)

    def after(self, x, out):
        """What lies behind it: x with attention's part, and the MLP up to its last matrix product. No
        backward pass needs that product: it is left to `forward`, and activation checkpointing stops before it."""
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

    def __init__(self, config):
        super().__init__()
        self.config, self.rope, self.context = config, config.rope, None
        self.path, self.own_rope = None, None  # the directory it was read from, and the rope.json there
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def unembedding(self):
        """The output matrix, (V, C): the input embedding again where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def window(self):
        return self.config.rope.original_max_position_embeddings  # L, in tokens, whatever the rope now is

    def hidden(self, tokens, table=None, attends=None, keys=0):
        """(B, T) int64 -> (B, T, C), the states whose product with `unembedding` are the logits; with a context those
        of this process's tokens, (B, T/N, C). Who brings `attends`, a function for each layer, brings the tokens that
        are this process's and their rows of a table: `generate` with caches, eval_passkey.py to attend to more `keys`
        than there are tokens."""
        cos, sin = table or self.rope.table(tokens.shape[1], tokens.device)  # once, passed down to every layer
        if context := None if attends else self.context:
            tokens, cos, sin = context.mine(tokens, 1), context.mine(cos, 0), context.mine(sin, 0)
        attends = attends or repeat(context.attend if context else attention)
        groups = head_groups(self.config, max(tokens.numel(), keys), context.size if context else 1)
        x = self.model.embed_tokens(tokens)
        for block, attend in zip(self.model.layers, attends):
            x = block(x, cos, sin, attend, groups)
        return self.model.norm(x)

    def forward(self, tokens):
        """(B, T) int64 -> logits (B, T, V). Whole logits of a long sequence are huge: `token_nll` works in chunks."""
        return F.linear(self.hidden(tokens), self.unembedding)


@torch.inference_mode()
def generate(model, tokens, count, total_length=None, stop=()):
    """Greedy decoding: at most `count` tokens after tokens (T,), ending before a token of `stop`. The set of factors is
    that for `total_length` tokens, by default all there will be: keys in a cache cannot be turned anew. The processes
    of a context read the prompt together, but for its end; then each has all keys and goes on as if alone."""
    total, new, context = len(tokens) + count, [], model.context
    size = context.size if context else 1
    if len(head_groups(model.config, -(-len(tokens) // size), size)) > 1:
        raise UserError("generating attends to all heads at once: give fewer tokens")
    tokens = in_vocabulary(model, tokens).to(model.unembedding.device)
    cos, sin = model.rope.table(total, tokens.device, total_length)
    caches = [Cache(total, model.config, model.unembedding) for _ in model.model.layers]
    if context and (together := (len(tokens) - 1) // (2 * size) * 2 * size):
        attends = [functools.partial(context.attend, cache=cache) for cache in caches]
        mine, *table = (context.mine(x[:together], 0) for x in (tokens, cos, sin))
        model.hidden(mine[None], table, attends)
        tokens = tokens[together:]
    while len(new) < count:
        now = slice(caches[0].filled, caches[0].filled + len(tokens))  # (the rest of) the prompt, then one by one
        last = model.hidden(tokens[None], (cos[now], sin[now]), [cache.attend for cache in caches])[0, -1]
        tokens = F.linear(last, model.unembedding).argmax().view(1)
        if tokens.item() in stop:
            break
        new.append(tokens.item())
    return new


# ---------------------------------------------------------------------------------------------------------------------
# The measure: perplexity = exp(total NLL / total tokens). Search, evaluators and fine-tuning all come through here.


def token_nll(hidden, unembedding, targets, chunk=4096):
    """-log p of each target. hidden (n, C), targets (n,) -> (n,) float32. Logits exist for `chunk` tokens at a time,
    and are computed again in the backward pass."""
    def of_chunk(h, t):
        return F.cross_entropy(F.linear(h, unembedding).float(), t, reduction="none")
    parts = zip(hidden.split(chunk), targets.split(chunk))
    return torch.cat([checkpoint(of_chunk, h, t, use_reentrant=False) for h, t in parts])


@torch.inference_mode()
def over_window(model, tokens, first=1, measure=token_nll):
    """measure(hidden, unembedding, targets) of tokens first .. T-1 of one window, each given all before it. tokens (T,)
    -> (T-first,) float64 on the CPU, the same on all processes of a context."""
    tokens = in_vocabulary(model, tokens).to(model.unembedding.device)
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
    if broken := int((~nll.isfinite()).sum()):
        raise UserError(f"the loss of {broken} of {len(nll)} tokens is not finite: weights or factors are broken")
    return nll


def perplexity(nlls, tokens):
    """exp(total NLL / total tokens); None of no tokens."""
    return math.exp(min(math.fsum(nlls) / tokens, 700)) if tokens else None


# =====================================================================================================================
# Here the lesson ends. What follows is plumbing: kernels, files, ropes, checkpoints, documents, processes, arguments.

BUNDLED_MODEL = Path(__file__).resolve().parent / "assets" / "model"


class UserError(Exception):
    """Something the user can put right, which `run` prints in one line."""


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: flash-attn-4 where it is installed (Hopper and newer), else PyTorch's own.

compiling = True  # --no-compile
has_flash_attn_4 = any(package.name == "flash-attn-4" for package in importlib.metadata.distributions())


def can_use_flash_attn_4(q):
    return (has_flash_attn_4 and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0
            and q.shape[-1] <= 128 and torch.cuda.get_device_capability(q.device) >= (9, 0))


def attention_kernel(model):
    """For the record, as kernels differ in their last bits."""
    w = model.unembedding.new_empty(1, model.config.head_dim)
    generation = f" sm_{''.join(map(str, torch.cuda.get_device_capability(w.device)))}" if w.is_cuda else ""
    return ("flash-attn-4" if can_use_flash_attn_4(w) else "pytorch") + generation


def compiled_on_gpus(method, *token_dims):
    """torch.compile for a method of Block, one graph for every layer, rope and length. token_dims: each tensor's
    dimension of the tokens. Decoding, a token at a time, and some heads at a time stay as they are."""
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
gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the second of each in PyTorch 2.11
gather_with_gradient = (getattr(functional, "all_gather_single_autograd", None)
                        or functional.all_gather_tensor_autograd)


def head_groups(config, tokens, processes=1):
    """Slices of the key heads, as a rule one None for all, so that neither the queries that share them nor their keys,
    gathered from all `processes` of a context, are `AT_ONCE` numbers. Raises UserError."""
    heads = config.num_key_value_heads
    numbers = tokens * config.head_dim * max(config.num_attention_heads // heads, processes)  # of one key head
    if numbers >= AT_ONCE:
        raise UserError(f"{tokens} tokens are too many for a head: {numbers} numbers, kernels cannot count {AT_ONCE}")
    step = (AT_ONCE - 1) // numbers
    return [None] if step >= heads else [slice(first, first + step) for first in range(0, heads, step)]


# A custom operator, so that selective checkpointing sees it as one, with all that its backward pass needs.
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
    """Around the parsing of what a user gave, and nothing else: any mistake becomes a UserError naming it."""
    try:
        if isinstance(path, Path) and path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError("a pipe or a device, not a file")  # opening it would wait
        yield
    except (UserError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as e:  # parsers raise almost any, Rust's panic this; strerror leaves out what names the path
        words = f"{e} is missing" if isinstance(e, KeyError) else getattr(e, "strerror", None) or str(e)
        raise UserError(f"{path}: {' '.join(words.split())[:300] or type(e).__name__}") from None


def read_json(path):
    with reading(path):  # `number` refuses NaN and Infinity, which are no JSON
        return {**json.loads(Path(path).read_text(encoding="utf-8-sig"), parse_constant=number)}


@contextmanager
def whole_file(path):
    """A file appears whole or not at all: it has another name until it is written."""
    part = Path(f"{path}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


class Journal:
    """What a run has found so far, in a .jsonl file, from which the same command goes on where it was stopped. Its
    first line, {"setup": ...}, holds what must agree; {"run": ...} records the rest of each run; others are results, in
    `rows`. A torn or garbled line is dropped, it alone. Only the first process has the file, and locks it. A new one is
    refused beside files that the run `makes` and something else has made."""

    def __init__(self, path, setup, run, makes=()):
        self.path, self.run, self.starts, rows = Path(path), run, [], []
        if rank() == 0:
            there = self.path.parent
            if foreign := [name for name in makes if not self.path.exists() and (there / name).exists()]:
                raise UserError(f"{there} has {', '.join(foreign)} of something else; give another --out")
            with reading(path):
                there.mkdir(parents=True, exist_ok=True)
                self.file = open(self.path, "ab")
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path}: another run is writing there; give another --out") from None
            except OSError:
                warn(f"{path}: no locks on this file system; see that no other run writes it")
            rows = self.read(json.loads(json.dumps(setup)))
        self.rows = spread(lambda _: rows, [None])[0]

    def read(self, setup):
        """The rows in the file. `starts`: the bytes before each."""
        lines, before, rows = self.path.read_bytes().splitlines(keepends=True), None, []
        for at, line in zip(accumulate(map(len, lines), initial=0), lines):
            with suppress(ValueError, TypeError, RecursionError):
                entry = {**json.loads(line)}
                before = before or entry.get("setup")
                if not {"setup", "run"} & entry.keys():
                    rows.append(entry)
                    self.starts.append(at)
        differs = [key for key in {**setup, **before} if before.get(key) != setup.get(key)] if before else []
        if rows and differs:
            raise UserError(f"{self.path} is of a run with another {', '.join(differs)}; give another --out")
        if before and not differs:
            self.file.write(b"" if lines[-1].endswith(b"\n") else b"\n")
        elif not before and (rows or not b'{"setup": '.startswith(b"".join(lines)[:10])):  # not empty, nor torn there
            raise UserError(f"{self.path}: not a journal of this program; give another --out")
        else:  # new, or of a run that had no result
            self.file.truncate(0)
            self.put({"setup": setup})
        return rows

    def put(self, entry):
        self.file.write(json.dumps(entry, allow_nan=False).encode() + b"\n")
        self.file.flush()

    def write(self, row):  # all processes call with the same
        self.rows.append(row)
        if rank() == 0:
            if self.run:
                self.run = self.put({"run": self.run})
            self.put(row)

    def cut(self, count):  # to the first `count` of the rows that were read
        if rank() == 0 and count < len(self.rows):
            self.file.truncate(self.starts[count])
        del self.rows[count:]


# ---------------------------------------------------------------------------------------------------------------------
# Ropes in files and on command lines

NAMED = f"{', '.join(FORMULAS)} (yarn:16 fixes s, else length over window)"
ROPES = (f"{NAMED}, model (its rope.json, or else config.json), config (config.json alone) or a rope.json (default: "
         f"the first {len(FORMULAS)}, and model if it has a rope.json)")


def rope_to_dict(rope):
    """Hugging Face's seven keys, then what it has no place for."""
    short, window = rope.short or rope.long, rope.original_max_position_embeddings
    return {
        "rope_type": "longrope", "rope_theta": rope.rope_theta, "factor": rope.scale,
        "original_max_position_embeddings": window, "long_factor": list(rope.long.rescale_factors),
        "short_factor": list(short.rescale_factors), "attention_factor": rope.long.attention_factor,
        "long_n_hat": rope.long.n_hat, "short_n_hat": short.n_hat, "short_attention_factor": short.attention_factor,
        "short_max_length": rope.short_max_length if rope.short else window,
        "trained_factor": list(rope.trained.rescale_factors),
    }


def rope_from_dict(d, trained=None):
    """The inverse of `rope_to_dict`. trained: what the model was trained with, of a plain Hugging Face dict, which does
    not say; None is plain RoPE. Raises what `reading` tells in words."""
    d = {"rope_type": "longrope", "factor": 1} | stated(d)
    if d["rope_type"] != "longrope":
        raise ValueError("not of rope_type longrope")
    window, theta, scale = integer(d["original_max_position_embeddings"]), number(d["rope_theta"]), number(d["factor"])

    def factors(name, attention_factor):
        if not isinstance(lambdas := d[f"{name}_factor"], list):
            raise ValueError(f"{name}_factor is not a list")
        return Factors(tuple(number(x) for x in lambdas), integer(d.get(f"{name}_n_hat", 0)), number(attention_factor))
    factor = d["attention_factor"] if "attention_factor" in d else su_factor(scale, window)
    long, short = factors("long", factor), factors("short", d.get("short_attention_factor", factor))
    trained = factors("trained", 1.0) if "trained_factor" in d else trained or plain(len(long.rescale_factors))
    short = {} if short == long else {"short": short, "short_max_length": integer(d.get("short_max_length", window))}
    return Rope(theta, window, trained, long, scale, **short)


def number(x):
    if type(x) not in (int, float):
        raise ValueError(f"{x!r} is not a number")
    return float(x)


def integer(x):
    if not number(x).is_integer():
        raise ValueError(f"{x} is not a whole number")
    return int(x)


def check_rope(rope):
    """Raises ValueError where numbers of a Rope cannot be meant."""
    pairs, window = len(rope.trained.rescale_factors), rope.original_max_position_embeddings
    for name, f in (("trained", rope.trained), ("long", rope.long), ("short", rope.short or rope.long)):
        if len(f.rescale_factors) != pairs:
            raise ValueError(f"{name}_factor has {len(f.rescale_factors)} factors, needs {pairs}")
        if wrong := [x for x in f.rescale_factors if not 0.99 < x < 1e6]:  # published ones begin at 0.9978
            raise ValueError(f"{name}_factor: factors must be from 1 to a million, not {wrong[0]:g}")
        if not (0 <= f.n_hat < 2**40 and 0.01 < f.attention_factor < 100):
            raise ValueError(f"{name}: n_hat must be 0 or more, the attention factor between 0.01 and 100")
    if not (0 < window < 2**40 and 1 < rope.rope_theta < 1e15 and 0 < rope.scale < 1e6 and rope.short_max_length >= 0):
        raise ValueError("lengths and factor must be above 0, rope_theta above 1, all finite")


def stated(d):  # null is as good as nothing, but YaRN's truncate, which transformers then takes for false
    return {k: v for k, v in d.items() if v is not None or k == "truncate"}


def load_rope(path, trained=None):
    with reading(path):
        rope = rope_from_dict(read_json(path), trained)
    for factors in {rope.long, rope.short or rope.long}:
        if factors.rescale_factors != tuple(sorted(factors.rescale_factors)):
            warn(f"{path}: its factors are in no order, unlike the paper's")
    return rope


def token_id(model, name):
    """config.json's bos_token_id or eos_token_id, the first of a list, None if it has none. Raises UserError."""
    found = model.config.hf.get(name)
    found = found[0] if isinstance(found, list) and found else found
    if found is not None and not (type(found) is int and 0 <= found < model.config.vocab_size):
        raise UserError(f"{model.path / 'config.json'}: {name} {found!r} is none of the model's tokens")
    return found


def sha256_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def resolve_rope(rope, model, length=None):
    """A Rope from what `load_model` accepts (see there), checked against the model."""
    config = model.config.rope
    if rope is None or str(rope) in ("model", "config"):
        return (str(rope) != "config" and model.own_rope) or config
    name, _, fixed = str(rope).partition(":")
    if name not in FORMULAS:
        return fitting(rope, config, model.own_rope)
    with reading(f"rope {rope}"):
        if name != "none" and not (length or fixed):
            raise ValueError(f"for how many tokens? Give length, or s as in {rope}:8")
        scale = float(fixed or max(1, (length or model.window) / model.window))
        if not 1 <= scale < math.inf:
            raise ValueError("the number behind the colon is s, the extension, from 1 up")
        long = FORMULAS[name](len(config.long.rescale_factors), config.rope_theta, model.window, scale)
        return replace(config, long=long.on(config.trained), scale=scale, short=None, short_max_length=0)


def fitting(rope, config, own=None):
    """The Rope, or that in a file, if it is for a model whose config.json describes the Rope `config`, and which has
    `own` in its rope.json: an extended model's config.json does not say with what it was trained before."""
    if not isinstance(rope, Rope) and not Path(rope).is_file():
        raise UserError(f"rope {rope}: not {NAMED}, model, config or a rope.json file; a model's directory is for "
                        "--model")
    found = rope if isinstance(rope, Rope) else load_rope(rope, (own or config).trained)
    with reading("rope" if found is rope else rope):
        replace(found, trained=config.trained)  # which counts the factors
        for key in ("rope_theta", "original_max_position_embeddings"):
            if not math.isclose(ours := getattr(found, key), theirs := getattr(config, key)):
                raise ValueError(f"its {key} is {ours:g}, this model's is {theirs:g}")
        known = own or (config if config.scale == 1 else found)
        if not np.allclose(found.trained.rescale_factors, known.trained.rescale_factors):
            raise ValueError("it is for a model trained with other factors (trained_factor)")
    return found


def resolve_ropes(names, lengths, model):
    """{(name, length): Rope}: a mistake in any shows before the first is measured."""
    names = dict.fromkeys(names or [*FORMULAS, *["model"] * bool(model.own_rope)])
    files = {name: resolve_rope(name, model) for name in names if name.partition(":")[0] not in FORMULAS}  # read once
    return {(name, length): files.get(name) or resolve_rope(name, model, length)
            for length in lengths for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: Hugging Face directories (config.json, *.safetensors, tokenizer.json), with rope.json beside.

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False}
FAMILIES = {  # projections with a bias, those that are one matrix in the checkpoint, what a silent config.json means
    "LlamaForCausalLM": ((), {}, {"attention_bias": False, "mlp_bias": False}),
    "MistralForCausalLM": ((), {}, {"num_key_value_heads": 8, "sliding_window": 4096}),
    "Qwen2ForCausalLM": (QKV, {}, QWEN),
    "Qwen3ForCausalLM": ((), {}, QWEN | {"head_dim": 128, "attention_bias": False}),
    "Phi3ForCausalLM": ((), dict.fromkeys(QKV, "qkv_proj") | dict.fromkeys(GATE_UP, "gate_up_proj"),
                        {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}),  # Phi-4-mini, too
}
FORMER = {"su", "yarn"}  # names of longrope, in Phi-3's config.json
BESIDE = ("tokenizer*.*", "*_tokens*.json", "*.jinja", "additional_chat_templates/*.jinja", "vocab.json", "merges.txt",
          "generation_config.json")


def read_config(d):
    """LlamaConfig of a config.json of transformers 5 or 4. Raises what `reading` tells in words."""
    if (family := (d["architectures"] or [None])[0]) not in FAMILIES:
        raise ValueError(f"{family} is not supported; supported: {', '.join(FAMILIES)}")
    if "quantization_config" in stated(d):
        raise ValueError("quantised weights are not supported; take the unquantised checkpoint")
    biased, fused, silent = FAMILIES[family]
    if d.get("num_key_value_heads", silent) is None:
        silent = silent | {"num_key_value_heads": d["num_attention_heads"]}
    said = {"num_key_value_heads": d["num_attention_heads"], "head_dim": None, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False, "hidden_act": "silu"} | silent | stated(d)
    if said["hidden_act"] != "silu":
        raise ValueError(f"hidden_act {said['hidden_act']} is not supported, only SwiGLU's silu")
    names = [field.name for field in fields(LlamaConfig)[:9]]  # up to `rope`
    for name in names[:7]:
        if name == "head_dim" and not said[name]:
            said[name] = said["hidden_size"] // said["num_attention_heads"]
        if type(said[name]) is not int or not 0 < said[name] <= (999 if name == "num_hidden_layers" else 2**24):
            raise ValueError(f"{name} {said[name]!r} is not a size")
    head_dim = said["head_dim"]
    turning = int(head_dim * (part := number(said_of_rope(d)["partial_rotary_factor"])))  # dimensions of a head
    if not 0 < turning <= head_dim or turning % 2 or said["num_attention_heads"] % said["num_key_value_heads"]:
        raise ValueError(f"heads of {head_dim} dimensions, {turning} of them turning, {said['num_key_value_heads']} "
                         f"key heads for {said['num_attention_heads']}: that cannot be")
    if part != 1 and family != "Phi3ForCausalLM":
        raise ValueError(f"a partial_rotary_factor, {part}, is supported in Phi3ForCausalLM alone")
    if not 0 < number(said["rms_norm_eps"]) < 1:
        raise ValueError(f"rms_norm_eps {said['rms_norm_eps']} is not between 0 and 1")
    own = {key: said[key] for key in silent}  # a switch that the family has not is ignored, as in transformers
    biased += (*QKV, "o_proj") * bool(own.get("attention_bias")) + (*GATE_UP, "down_proj") * bool(own.get("mlp_bias"))
    sliding = (silent | d).get("sliding_window")  # null: none
    if sliding and family != "LlamaForCausalLM" and own.get("use_sliding_window", True) and (
            sliding < d["max_position_embeddings"]):
        warn(f"its own attention slides over the last {sliding} tokens; here every token attends to all before it")
    rope = rope_of_config(d, turning // 2)
    return LlamaConfig(*(said[name] for name in names), rope, biased, family == "Qwen3ForCausalLM", fused, hf=d)


def said_of_rope(d):
    """All that a config.json says of its rope; transformers prefers rope_scaling to rope_parameters, takes one whole,
    and prefers the original window that is said beside them (Phi-3)."""
    beside = {"rope_theta": 10000.0, "partial_rotary_factor": 1} | FAMILIES[d["architectures"][0]][2] | stated(d)
    window = {k: v for k, v in beside.items() if k == "original_max_position_embeddings"}
    top = {k: beside[k] for k in ("rope_theta", "partial_rotary_factor")}
    return top | stated(d.get("rope_scaling") or d.get("rope_parameters") or {}) | window


def rope_of_config(d, pairs):
    """The Rope that a config.json describes: what transformers does, where a Rope can say it exactly."""
    given, window = said_of_rope(d), integer(d["max_position_embeddings"])
    theta, before = number(given["rope_theta"]), integer(given.get("original_max_position_embeddings", window))
    Rope(theta, before, plain(pairs), plain(pairs))  # checks these numbers before they are used
    kind, factor = given.get("rope_type", given.get("type", "default")), given.get("factor", window / before)
    if d["architectures"][0] == "Phi3ForCausalLM" and kind in FORMER:
        kind = "longrope"  # its former names
    match kind:
        case "longrope":
            said = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": before}
            return rope_from_dict(given | said, plain(pairs))
        case "yarn":
            scale, ramp = number(factor), (given.get("beta_fast") or 32, given.get("beta_slow") or 1)
            long = yarn(pairs, theta, before, scale, *ramp, given.get("truncate", True))
            mscales = [given.get("mscale"), given.get("mscale_all_dim")]  # DeepSeek's
            attention = [yarn_factor(scale, m) for m in (mscales if all(mscales) else [1, 0])]  # one over the other
            attention = number(given.get("attention_factor", attention[0] / attention[1]))
            return Rope(theta, before, plain(pairs), replace(long, attention_factor=attention), scale)
        case "default":
            trained = plain(pairs)
        case "linear":
            trained = pi(pairs, theta, window, number(given["factor"]))
        case "llama3":  # YaRN's ramp over the turns within an earlier window
            low, high, factor = (number(given[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
            if not (0 < low < high and factor > 0):
                raise ValueError("low_freq_factor must be above 0 and below high_freq_factor, factor above 0")
            keep = np.clip((before / (2 * math.pi) * inv_freq_of(np.ones(pairs), theta) - low) / (high - low), 0, 1)
            trained = Factors(tuple((1 / (keep + (1 - keep) / factor)).tolist()))
        case other:
            raise ValueError(f"rope type {other!r} is not supported, but default, linear, llama3, yarn and longrope")
    return Rope(theta, window, trained, trained)


def load_model(path=BUNDLED_MODEL, rope=None, length=None, device=None, dtype=None):
    """The model in a Hugging Face directory or on the Hub, in eval mode. rope: None = its rope.json or else its config,
    "config" = its config alone, a Rope, a path to a rope.json, or one of FORMULAS for `length` tokens.
    device: meta reads no weights. dtype: bfloat16 on cuda, float32 on cpu. Raises UserError."""
    path = model_directory(path)
    with reading(f"device {device}"):
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # where kernels are started
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    with reading(path / "config.json"):
        config = read_config(read_json(path / "config.json"))
    own_rope = fitting(path / "rope.json", config.rope) if (path / "rope.json").exists() else None
    if own_rope:
        config.rope = replace(config.rope, trained=own_rope.trained)
    elif config.rope.scale != 1:
        warn(f"{path}: no rope.json says what it was trained with; a new extension starts from plain RoPE")
    with torch.device("meta"):
        model = Llama(config)
    state, parts = {}, stored_names(model)
    for file in weight_files(path) if device.type != "meta" else ():
        with reading(file):
            for name, tensor in load_file(file).items() if file.suffix != ".json" else ():
                if name.endswith("rotary_emb.inv_freq"):  # of old Llamas
                    continue
                ours = parts.get(name, [name])
                rows = [model.get_parameter(n).shape[0] for n in ours] if len(ours) > 1 else len(tensor)
                state |= zip(ours, tensor.to(device, dtype).split(rows))
    head = state.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    with reading(path):  # missing, unexpected or wrongly shaped tensors
        model.load_state_dict(state, strict=device.type != "meta", assign=True)
        if head is not None and not torch.equal(head, model.unembedding):
            raise ValueError("its lm_head is not the embedding, though config.json says tie_word_embeddings")
    model.path, model.own_rope = path, own_rope
    model.rope = resolve_rope(rope, model, length)
    return model.requires_grad_(False).eval()


def weight_files(path):
    """The files with weights, and behind them their index if they have one."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if not (whole.exists() or index.exists()):
        raise UserError(f"{path}: no model.safetensors (other kinds of weights must be converted)")
    if whole.exists():  # first, as in transformers
        return [whole]
    with reading(index):
        files = sorted(set(read_json(index)["weight_map"].values()))
        if outside := [file for file in files if Path(file).name != file]:
            raise ValueError(f"{outside[0]} is not in its directory")
    return [*map(path.joinpath, files), index]


def model_directory(path):
    """NAME/REPO that is no directory is fetched from the Hub, the needed files only."""
    if (found := Path(path)).is_dir():
        return found
    if len(found.parts) != 2 or str(path)[0] in "./":
        raise UserError(f"model {path}: no such directory")
    with reading(f"model {path}: no such directory, and the Hub says"):
        from huggingface_hub import snapshot_download  # here, so that all else works without it
        patterns = [*BESIDE, "config.json", "rope.json", "model*.safetensors*"]
        return Path(snapshot_download(str(path), allow_patterns=patterns))


def stored_names(model):
    """{name in the checkpoint: our names of its parts, of which only a fused matrix has several}."""
    names = {}
    for ours in model.state_dict():
        *before, module, kind = ours.split(".")
        names.setdefault(".".join((*before, model.config.fused.get(module, module), kind)), []).append(ours)
    return names


def save_model(model, path, dtype=torch.bfloat16):
    save_config(model, path, dtype)
    save_weights(model, path, model.state_dict(), dtype)


def save_weights(model, path, state, dtype=torch.bfloat16):
    """`state`: the model's state_dict, gathered where each process has a part only."""
    state = {name: torch.cat([state[part].detach().to("cpu", dtype) for part in parts])
             for name, parts in stored_names(model).items()}
    with whole_file(Path(path) / "model.safetensors") as part:
        save_file(state, part, metadata={"format": "pt"})
        shutil.copymode(Path(path) / "config.json", part)  # as any new file; save_file's are for their owner alone


def save_config(model, path, dtype=None):
    """A Hugging Face directory but for the weights: the rope goes into config.json, in transformers 4's words and in
    5's, and into rope.json, which has room for all of it. dtype: None is what the config said."""
    rope = model.rope if model.rope.short_max_length else replace(model.rope, short=None)  # as it then serves nothing
    path, d = Path(path), rope_to_dict(rope)
    dropped = ("auto_map", "layer_types", "use_sliding_window", *["torch_dtype"] * bool(dtype))
    config = {k: v for k, v in model.config.hf.items() if k not in dropped} | {"sliding_window": None}
    if dtype:
        config["dtype"] = str(dtype).removeprefix("torch.")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    parameters, window = {"rope_theta": rope.rope_theta} | scaling, rope.original_max_position_embeddings
    old = config["architectures"][0] == "Phi3ForCausalLM" and {*map(scaling.get, ("type", "rope_type"))} & FORMER
    if rope != model.config.rope or old:  # or else config.json says it in words of today
        scaling = parameters = dict([*d.items()][:7])
        said = rope_to_dict(rope_from_dict(parameters, rope.trained))
        if lost := [f"{k} {v:.4g} (transformers will take {said[k]:.4g})" for k, v in d.items() if v != said[k]]:
            warn(f"{path}: config.json has no place for {', '.join(lost)}; rope.json, which this program reads, has")
        parameters |= {"short_mscale": d["short_attention_factor"], "long_mscale": d["attention_factor"]}  # for vLLM
        config |= {"max_position_embeddings": rope.target_length, "original_max_position_embeddings": window}
        if config["architectures"][0] == "Phi3ForCausalLM" and d["attention_factor"] == su_factor(rope.scale, window):
            scaling = {"type": "longrope"} | {k: d[k] for k in ("short_factor", "long_factor")}  # for transformers 4
    if rope.long == plain(len(rope.long.rescale_factors)) and not rope.short and rope.scale <= 1:
        parameters, scaling = {"rope_type": "default", "rope_theta": rope.rope_theta}, None
        config["max_position_embeddings"] = window
    if (part := said_of_rope(model.config.hf)["partial_rotary_factor"]) != 1:
        config["partial_rotary_factor"] = parameters["partial_rotary_factor"] = part
    config |= {"rope_theta": rope.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}
    write_json(path / "config.json", config)
    write_json(path / "rope.json", d)
    for file in chain.from_iterable(map(model.path.glob, BESIDE)) if model.path not in (None, path) else ():
        if {model.path.resolve(), model.path.resolve().parent.parent / "blobs"} & {*file.resolve().parents}:
            copy_file(file, path / file.parent.relative_to(model.path))
        else:
            warn(f"{file}: a link out of its directory, not copied")  # someone else's could lead to a secret
    for name, key in (("tokenizer_config.json", "model_max_length"), ("generation_config.json", "max_length")):
        said = read_json(path / name) if (path / name).exists() else {}
        if type(limit := said.get(key)) is int and window <= limit < config["max_position_embeddings"]:
            write_json(path / name, said | {key: config["max_position_embeddings"]})  # it was the window


def copy_file(file, directory):
    with whole_file(directory / file.name) as part:
        shutil.copyfile(file, part)


def load_tokenizer(path=BUNDLED_MODEL):
    file = model_directory(path) / "tokenizer.json"
    with reading(file):
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    tokenizer.no_truncation()  # as transformers does
    tokenizer.no_padding()
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Documents: text -> tokens -> windows of exactly T tokens.


def read_documents(paths, min_characters=0, books=slice(5)):
    """Yield (name, text) from .txt and .jsonl(.gz) files and directories of them, these in the order of the names. No
    path: `books` of the bundled ten, joined where it takes several to reach `min_characters`. Raises UserError."""
    if not paths:
        found = [*documents_in(BUNDLED_MODEL.parent / "books.jsonl.gz")][books]
        together = math.ceil(max(1, min_characters) / len(found[0][1]))  # all are of one length
        for i in range(0, len(found), together):
            names, texts = zip(*found[i:i + together])
            yield " + ".join(names), "".join(texts)
    for path in map(Path, paths):
        if not path.exists() or "" in paths:
            raise UserError(f"data {path}: no such file or directory")
        found = [*files_in(path)]
        files = [file for file in found if file.name.lower().endswith((".txt", ".jsonl", ".jsonl.gz"))]
        if not files:
            raise UserError(f"data {path}: no .txt or .jsonl(.gz) file")
        if len(files) < len(found):
            others = ", ".join(file.name for file in found if file not in files)
            warn(f"data {path}: {len(found) - len(files)} files of other kinds are not read: {shorten(others, 200)}")
        for name, text in chain.from_iterable(map(documents_in, files)):
            if "\ufffd" in text:
                warn(f"{name}: has bytes that are not UTF-8, read as U+FFFD")
            yield name, text


def files_in(path, above=()):
    """The files of a directory, in the order of names, or the file itself: no hidden one, no directory in itself."""
    if path.is_dir() and path.resolve() not in above:
        for inner in sorted(path.iterdir()):
            if not inner.name.startswith("."):
                yield from files_in(inner, (*above, path.resolve()))
    elif path.is_file():
        yield path


def documents_in(file):
    opened = gzip.open if file.suffix.lower() == ".gz" else open
    with reading(f"data {file}"), opened(file, "rt", encoding="utf-8-sig", errors="replace") as lines:
        if file.name.lower().endswith(".txt"):
            text = lines.read()
            if "\0" in text:
                raise ValueError("has NUL characters: not a text in UTF-8")
            yield file.name, text
            return
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            with reading(f"{file}, line {number}: not a JSON object with a \"text\" field"):
                record = json.loads(line)
                text = ("" + record["text"]).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield str(record.get("title", f"{file.name}:{number}")), text


def windows(documents, tokenizer, length, samples, cut=True):
    """The first `length` tokens, with what the tokenizer puts in front, of each of the first `samples` documents that
    have so many -> [(name, tokens (T,))]; without `cut` all their tokens, nothing in front. Raises UserError."""
    short = []

    def first_tokens():
        for name, text in documents:
            characters = 8 * length if cut else len(text)  # to begin with: books are far longer than most windows
            while (len(tokens := tokenizer.encode(text[:characters], add_special_tokens=cut).ids) <= length + 16
                   and characters < len(text)):
                characters *= 2  # the cut changes the last few tokens at most
            if len(tokens) < length:
                short.append((len(tokens), name))
            else:
                yield name, torch.tensor(tokens[:length] if cut else tokens)
    found = [*islice(once(first_tokens()), samples)]
    if not found:
        raise UserError(f"no document of {length} tokens: the longest of {len(short)} has "
                        f"{max(short, default=[0])[0]}; give longer --data or a shorter --len")
    if short:
        names = shorten(", ".join(name for _, name in short), 200)
        warn(f"left out {len(short)} documents shorter than {length} tokens: {names}")
    return found


def once(named):
    """(name, tokens) without those whose tokens an earlier one has: what was searched on is not unseen."""
    seen = {}
    for name, tokens in named:
        if (key := data_hash([tokens])) in seen:
            warn(f"{name}: the same {len(tokens)} tokens as {seen[key]}, counts once")
        else:
            seen[key] = name
            yield name, tokens


def data_hash(tokens):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tokens)).hexdigest()


def in_vocabulary(model, tokens):
    """The tokens. Raises UserError where the model has no embedding for one."""
    if (highest := int(tokens.max())) >= model.config.vocab_size:
        raise UserError(f"token {highest}: the model has {model.config.vocab_size}; is tokenizer.json another model's?")
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Processes: those of torchrun. The first one prints and writes.


def join_processes(device=None):
    """Those of torchrun, and take this one's GPU. Before `load_model`."""
    if device == "meta":
        raise UserError("--device meta: it holds no numbers")
    if "RANK" in os.environ and not dist.is_initialized():
        if device not in (None, "cpu", "cuda") or device == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {device}: torchrun's processes take cuda, one each, where there is one, or cpu")
        gpu = None
        if torch.cuda.is_available() and device != "cpu":
            gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(gpu)
        long = timedelta(days=1)  # a window can take an hour
        dist.init_process_group("nccl" if gpu else "gloo", timeout=long, device_id=gpu)


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


@functools.cache  # once: finetune.py reads its documents twice
def warn(line):
    say(line, sys.stderr)


def spread(measure, items, together=1):
    """[measure(x) for x in items], dealt to torchrun's processes, `together` of them on one item. All get the whole
    list in its order, so sums over it do not depend on their number."""
    groups = world_size() // together
    mine = [measure(x) for x in items[rank() // together::groups]]
    parts = [mine] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, mine)
    return [parts[i % groups * together][i // groups] for i in range(len(items))]


def spread_in_rounds(measure, items, together=1):
    """Yield what `spread` lists, an item for each process at a time, so that each can be written down at once."""
    groups = world_size() // together
    for at in range(0, len(items), groups):
        yield from spread(measure, items[at:at + groups], together)


def measured(journal, model, ropes, tasks, measure, together=1):
    """Yield (name, length, rows) for each of `ropes`, {(name, length): Rope}: a row for each of `tasks`, dicts, of that
    length, with what measure(task) adds. None is measured twice: the journal has those of an equal rope and task."""
    def place(row):
        return tuple(row.get(key) for key in ("rope_sha256", *tasks[0]))

    def tokens(task):
        return task["length"] * task.get("windows", 1)
    known, written = {place(row): row for row in journal.rows}, {(row["rope"], place(row)) for row in journal.rows}
    todo = {(name, length): [{"rope": name, "scale": rope.scale, "rope_sha256": sha256_of(rope_to_dict(rope))} | task
                             for task in tasks if task["length"] == length] for (name, length), rope in ropes.items()}
    unknown = {place(task): tokens(task) for mine in todo.values() for task in mine if place(task) not in known}
    with tqdm(total=sum(unknown.values()), unit="token", unit_scale=True, disable=rank() > 0 or not unknown) as bar:
        for (name, length), model.rope in ropes.items():
            new = [task for task in todo[name, length] if place(task) not in known]
            for row in spread_in_rounds(lambda task: task | measure(task), new, together):
                known[place(row)] = row
                journal.write(row)
                bar.update(tokens(row))
            rows = [known[place(task)] for task in todo[name, length]]
            for row in rows:
                equal = row["rope"] != name and ropes.get((row["rope"], length)) == model.rope  # to another asked for
                if equal and (name, place(row)) not in written:
                    journal.write(row | {"rope": name})
            yield name, length, [row | {"rope": name} for row in rows]


def share_sequences(model, processes, lengths):
    """--context-parallel, for sequences of these lengths. Raises UserError."""
    if world_size() % processes:
        raise UserError(f"--context-parallel {processes}: there are {world_size()} processes, no multiple; start "
                        "it with torchrun --nproc-per-node")
    if odd := [length for length in lengths if processes > 1 and length % (2 * processes)]:
        raise UserError(f"--context-parallel {processes}: {odd[0]} tokens are no multiple of {2 * processes}")
    model.context = Context(dist.new_subgroups(processes)[0]) if processes > 1 else None


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts share


class Parser(argparse.ArgumentParser):
    """With a script's docstring and the arguments that all have. A mistake is one line."""

    def __init__(self, doc, data=True, **more):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **more)
        add = self.add_argument
        add("--model", default=os.path.relpath(BUNDLED_MODEL), help="directory or Hub id (default: the bundled model)")
        if data:
            add("--data", nargs="+", default=[], metavar="PATH", help=".txt files, directories of them "
                "or .jsonl(.gz) with a \"text\" field (default: five of the bundled books, in finetune.py the others)")
        add("--context-parallel", type=natural, default=1, metavar="N", help="torchrun's processes that share a "
            "sequence, of a multiple of 2 N tokens (default: 1; finetune.py: all / gcd(all, --batch-size))")
        add("--device", help="cuda, cpu, ... (default: cuda if there is one, else cpu)")
        add("--dtype", choices=["bfloat16", "float16", "float32"], help="default: bfloat16 on cuda, float32 on cpu")
        add("--no-compile", dest="compile", action="store_false", help="no torch.compile, which needs a C compiler")
        add("--seed", type=whole, default=0, metavar="N", help="of everything random (default: 0)")

    def error(self, message):
        raise UserError(f"{message} (--help explains)")


def whole(text, least=0, most=2**31):  # types of arguments: a number 0, 1, 2, ...
    if not re.fullmatch("[0-9]{1,19}", text) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
    return int(text)


natural, few = functools.partial(whole, least=1), functools.partial(whole, least=1, most=1000)


def begin(args):
    """The processes, and the model with its config's own rope."""
    global compiling
    join_processes(args.device)
    compiling = args.compile
    return load_model(args.model, "config", None, args.device, args.dtype)


def describe(model, tokenizer):
    """What must agree for two runs to be parts of one."""
    w, sample = model.unembedding, hashlib.sha256()
    sample.update(str(model.config.rms_norm_eps).encode())  # the one number beside them that logits depend on
    for p in model.parameters():  # a little of every tensor: quick, and any training changes it
        sample.update(p.flatten()[:1024].double().cpu().numpy().tobytes())
    return {"weights_sha256": sample.hexdigest(), "tokenizer_sha256": sha256_of(tokenizer.to_str()),
            "dtype": str(w.dtype).removeprefix("torch."), "kernel": attention_kernel(model),
            "compiled": bool(compiling and w.is_cuda)}


def recorded(args):
    """What need not agree, for the record."""
    return {"arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "python": sys.version.split()[0], "torch": torch.__version__, "processes": world_size(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores"}


def forward_flops(model, length):
    """Of one pass: 2 for each weight and token, and 2 * 2 * T^2/2 * H * D in each layer's causal attention."""
    c = model.config
    matrices = sum(p.numel() for block in model.model.layers for p in block.parameters()) + model.unembedding.numel()
    return 2 * matrices * length + 2 * length**2 * c.num_attention_heads * c.head_dim * c.num_hidden_layers


def utilisation(flops, seconds, device):
    """Model FLOP utilisation of all GPUs, None if their peak (bfloat16, dense) is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
    return next((flops / seconds / (peak * world_size()) for gpu, peak in peaks.items() if gpu in name), None)


# Safe for the colour-blind; as a rule of the formulas and what was found.
COLORS = ("#999999", "#CC79A7", "#009E73", "#E69F00", "#0072B2", "#56B4E9", "#D55E00")


def panels_of(count, width, height, **more):
    """(figure, axes): `count` panels of that size in inches, at most three a row."""
    from matplotlib.figure import Figure  # here, as it takes a second
    down = math.ceil(count / 3)
    across = math.ceil(count / down)
    fig = Figure(figsize=(1.8 + across * width, 0.4 + down * height), layout="constrained")
    axes = fig.subplots(down, across, squeeze=False, **more).ravel()
    for unused in axes[count:]:
        unused.set_axis_off()
    return fig, axes[:count]


def titles_of(ropes):  # in pictures: out/long/rope.json is long, seed0.rope.json seed0, if no other is
    short = [rope.removesuffix("rope.json").rstrip("/.").rpartition("/")[2] or rope for rope in ropes]
    return {rope: (title if short.count(title) == 1 else rope).lstrip("_") for rope, title in zip(ropes, short)}


def warm_up(model, length):
    """Let libraries start and kernels compile; on a GPU long sequences have kernels of their own."""
    step = 2 * model.context.size if model.context else 2
    window_nll(model, torch.zeros(min(length, 65536 if model.unembedding.is_cuda else 32) // step * step, dtype=int))


def run(main, remedy="lower --len"):
    """main() with the user's mistakes, and running out of memory, told in one line."""
    def stop(line, code=2):
        with suppress(OSError):  # a pipe that Ctrl-C closed, too
            tqdm.write(f"{Path(sys.argv[0]).name}: {' '.join(str(line).split())}", file=sys.stderr)
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files can hold what a terminal cannot show
    try:
        main()
    except (UserError, OSError, SafetensorError) as e:  # the last two: a full disk
        stop(e)
    except RuntimeError as e:  # as torch.OutOfMemoryError is
        if not (needed := re.search(r"tried to allocate [\d.]+ \w+", str(e), re.IGNORECASE)):
            raise
        stop(f"out of memory, {needed[0]}: {remedy}")
    except KeyboardInterrupt:
        stop("stopped; the same command goes on", 1)
    if dist.is_initialized():
        dist.barrier()  # none tears its connections down while another still writes
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads sometimes abort when the interpreter takes them down
