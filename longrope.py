"""LongRoPE (arXiv 2402.13753) around a Llama written from scratch: everything but the search and the training.

    $ python search.py                                    # find rescale factors for the bundled model at 8x its window
    $ python eval_ppl.py --rope none pi ntk yarn out/search-8192/rope.json --len 1024 8192

    from longrope import load_model, Rope
    model = load_model("assets/model", rope="yarn", length=8192)
    logits = model(tokens)                                # (B, T) int64 -> (B, T, V)

Dimensions: B batch, T tokens, H query heads, K key/value heads, D head_dim, C model width, V vocabulary.
Rotary pair i = 0 .. D/2-1 joins the coordinates i and i + D/2 of a head ("split-half", as Hugging Face weights are).
"""
import argparse
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
import sysconfig
import time
import warnings
import zlib
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain, count
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

BUNDLED_MODEL = Path(__file__).resolve().parent / "assets" / "model"


class UserError(Exception):
    """Something the user can put right. `run` prints it as one line and exits with code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Rope: the subject. Everything LongRoPE changes in a model is the table of cosines and sines made here.


# Hugging Face's `rope_parameters` of longrope, which come first in rope.json
HF_KEYS = ("rope_type", "rope_theta", "factor", "original_max_position_embeddings", "long_factor", "short_factor",
           "attention_factor")
NAMED = ("none", "pi", "ntk", "yarn")  # ropes that are formulas of the length


def su_factor(scale, window):
    """sqrt(1 + ln s / ln L0), the attention factor of all released LongRoPE code and of Hugging Face's `longrope`."""
    return math.sqrt(1 + math.log(scale) / math.log(window)) if scale > 1 else 1.0


def yarn_factor(scale):
    """0.1 ln s + 1, YaRN's attention factor."""
    return 0.1 * math.log(scale) + 1 if scale > 1 else 1.0


def is_named(rope):
    """Is it one of NAMED, perhaps with an s of its own behind a colon?"""
    return isinstance(rope, str) and rope.partition(":")[0] in NAMED


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding with one rescale factor per pair (LongRoPE, eq. 3).

    The angle of pair i at position n is  n / (I(lambda_i, n_hat) * theta^(2i/D)),  I = 1 for n < n_hat, else lambda_i.
    cos and sin are multiplied by `attention_factor`, which sharpens attention over a longer window.
    `short`, if there, is the rope for sequences of at most `short_max_length` tokens in total.
    """
    rescale_factors: tuple                    # lambda_i, (D/2,); 1 leaves a pair alone, s is interpolation by s
    rope_theta: float                         # theta, the base
    original_max_position_embeddings: int     # L0, the window the model was trained on
    scale: float = 1.0                        # s = L'/L0, L' the window these factors are for
    n_hat: int = 0                            # the first n_hat tokens keep lambda = 1
    attention_factor: float = 1.0
    short: "Rope | None" = None
    short_max_length: int = 0

    # The constructors share their arguments: D, theta, L0 and s. `none` is RoPE as trained.

    @classmethod
    def none(cls, head_dim, rope_theta, window, scale=1.0):
        return cls((1.0,) * (head_dim // 2), rope_theta, window, scale)

    @classmethod
    def pi(cls, head_dim, rope_theta, window, scale):
        """Position interpolation (arXiv 2306.15595): lambda_i = s."""
        return cls((float(scale),) * (head_dim // 2), rope_theta, window, scale)

    @classmethod
    def ntk(cls, head_dim, rope_theta, window, scale):
        """NTK-aware scaling: lambda_i = s^(2i/(D-2)), from 1 at the fastest pair to s at the slowest."""
        factors = scale ** (2 * np.arange(head_dim // 2) / (head_dim - 2))
        return cls(tuple(factors.tolist()), rope_theta, window, scale)

    @classmethod
    def yarn(cls, head_dim, rope_theta, window, scale, beta_fast=32, beta_slow=1):
        """YaRN (arXiv 2309.00071): pairs that turn more than beta_fast times within the window stay as they are, those
        that turn less than beta_slow times are interpolated, between lies a linear ramp. Attention factor 0.1 ln s + 1.
        """
        def pair_turning(times):  # the (fractional) pair that makes `times` full turns within the window
            return head_dim * math.log(window / (times * 2 * math.pi)) / (2 * math.log(rope_theta))
        low = max(math.floor(pair_turning(beta_fast)), 0)
        high = min(math.ceil(pair_turning(beta_slow)), head_dim - 1)
        ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)  # 0 keep ... 1 interpolate
        factors = 1 / ((1 - ramp) + ramp / scale)
        return cls(tuple(factors.tolist()), rope_theta, window, scale, attention_factor=yarn_factor(scale))

    @classmethod
    def llama3(cls, head_dim, rope_theta, window, factor, low_freq_factor, high_freq_factor, before):
        """Llama 3.1's, with which it was trained: YaRN's ramp over the turns within an earlier window, `before`."""
        turns = cls.none(head_dim, rope_theta, window).turns(before)
        keep = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
        return cls(tuple((1 / (keep + (1 - keep) / factor)).tolist()), rope_theta, window)

    @classmethod
    def longrope(cls, rescale_factors, rope_theta, window, scale, n_hat=0, attention_factor=None):
        """Factors of one's own, with plain RoPE up to the original window. attention_factor: None is `su_factor`."""
        plain = cls.none(2 * len(rescale_factors), rope_theta, window)
        factor = su_factor(scale, window) if attention_factor is None else attention_factor
        return cls(tuple(map(float, rescale_factors)), rope_theta, window, scale, n_hat, factor, plain, window)

    @classmethod
    def named(cls, name, config, length):
        """"none", "pi", "ntk" or "yarn" for `length` tokens; "yarn:16" fixes s = 16 instead of length / window."""
        name, _, fixed = name.partition(":")
        window = config.rope.original_max_position_embeddings
        try:
            scale = float(fixed) if fixed else max(1.0, length / window)
        except ValueError:
            scale = 0.0
        if not 1 <= scale < math.inf:
            raise UserError(f"rope {name}:{fixed}: the number behind the colon is s, the extension, a number from 1 up")
        return config.rope.trained.times(getattr(cls, name)(config.head_dim, config.rope.rope_theta, window, scale))

    @property
    def trained(self):
        """What an extension multiplies its factors onto: plain RoPE, or the factors Llama 3.1 was trained with."""
        plain = Rope.none(2 * len(self.rescale_factors), self.rope_theta, self.original_max_position_embeddings)
        return plain if self.short or self.scale != 1 else self

    def times(self, rope):
        """`rope` on top of this one: their factors multiply, all else is `rope`'s."""
        return replace(rope, rescale_factors=tuple(np.multiply(self.rescale_factors, rope.rescale_factors).tolist()))

    def at(self, length):
        """The set of factors for a sequence of `length` tokens in total: the short one or this."""
        return self.short if self.short and length <= self.short_max_length else self

    def inv_freq(self, rescale_factors=None):
        """1 / (lambda_i * theta^(2i/D)), radians per token, (D/2,) float64."""
        pairs = len(self.rescale_factors)
        factors = np.asarray(self.rescale_factors if rescale_factors is None else rescale_factors, dtype=np.float64)
        return 1.0 / (factors * self.rope_theta ** (np.arange(pairs) / pairs))

    def turns(self, window):
        """How many full turns each pair makes within `window` tokens, (D/2,) float64."""
        return window / (2 * math.pi) * self.inv_freq()

    def table(self, length, device="cpu", total_length=None):
        """cos and sin, (T, D/2) float32 each, for positions 0 .. length-1.

        The set of factors is chosen by `total_length`, the tokens there will be in the end, by default `length`.
        The angles are float64: in float32 the cosine is off by 0.0076 at 131072 positions and by 0.12 at 2M.
        """
        rope = self.at(total_length or length)
        inv_freq = torch.from_numpy(rope.inv_freq()).to(device)
        angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * inv_freq  # (T, D/2)
        kept = min(rope.n_hat, length)
        plain = torch.from_numpy(rope.inv_freq(np.ones(len(inv_freq)))).to(device)
        angles[:kept] = torch.arange(kept, dtype=torch.float64, device=device)[:, None] * plain  # n < n_hat
        return (angles.cos() * rope.attention_factor).float(), (angles.sin() * rope.attention_factor).float()

    def to_dict(self):
        """HF_KEYS, then those that Hugging Face's format has no place for."""
        short = self.short or self
        return {
            "rope_type": "longrope", "rope_theta": self.rope_theta, "factor": self.scale,
            "original_max_position_embeddings": self.original_max_position_embeddings,
            "long_factor": list(self.rescale_factors), "short_factor": list(short.rescale_factors),
            "attention_factor": self.attention_factor,
            "long_n_hat": self.n_hat, "short_n_hat": short.n_hat, "short_attention_factor": short.attention_factor,
            "short_max_length": self.short_max_length or self.original_max_position_embeddings,
        }

    @classmethod
    def from_dict(cls, d, source="rope"):
        """The inverse of `to_dict`. A plain Hugging Face dict has one attention factor for both sets and no n_hat."""
        if not isinstance(d, dict) or d.get("rope_type", "longrope") != "longrope":
            raise UserError(f"{source}: not an object of rope_type longrope")
        given = {k: v for k, v in d.items() if v is not None}
        try:
            window, theta = int(d["original_max_position_embeddings"]), float(d["rope_theta"])
            scale = float(given.get("factor", 1.0))
            factor = float(given["attention_factor"] if "attention_factor" in given else su_factor(scale, window))
            long, short = (tuple(map(float, d[k])) for k in ("long_factor", "short_factor"))
            n_hats = int(d.get("long_n_hat", 0)), int(d.get("short_n_hat", 0))
            short_factor = float(d.get("short_attention_factor", factor))
            short_max = int(d.get("short_max_length", window))
        except (KeyError, TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"{source}: not a longrope description ({type(e).__name__}: {e})") from None
        if len(long) != len(short):
            raise UserError(f"{source}: long_factor has {len(long)} factors, short_factor {len(short)}")
        if not all(math.isfinite(x) and x > 0 for x in (*long, *short, factor, short_factor, theta, scale, window)):
            raise UserError(f"{source}: factors must be finite and above 0")
        if min(*n_hats, short_max) < 0:
            raise UserError(f"{source}: n_hat and short_max_length must be 0 or more")
        return cls(long, theta, window, scale, n_hats[0], factor,
                   cls(short, theta, window, 1.0, n_hats[1], short_factor), short_max)

    @classmethod
    def load(cls, path):
        return cls.from_dict(read_json(path), source=str(path))

    def save(self, path, **extra):
        """Write rope.json; `extra` (a search's record) goes behind the rope's own keys."""
        write_json(path, {**self.to_dict(), **extra})


# ---------------------------------------------------------------------------------------------------------------------
# Attention

# Exact kernels, the fastest first: measured on Hopper (H100, H200), where flash-attn-4 comes before cuDNN. cuDNN's is
# taken on Hopper and data-centre Blackwell alone, as by PyTorch itself; on Ampere and Ada come flash-attn (2) and
# PyTorch's flash attention, which is the same. Four are PyTorch's own, the others packages, used if installed.
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
KERNELS = ("flash-attn-4", "cudnn", "flash-attn-2", *list(SDPA)[1:])
forced_kernel = None  # the name of --attention


def attention(q, k, v):
    """Causal softmax(q k^T / sqrt(D)) v. q (B, T, H, D); k, v (B, T, K, D), H a multiple of K -> (B, T, H, D).

    Fewer queries than keys are the last ones: a single query with a cache, or a chunk of a sequence with all before it.
    """
    queries, keys = q.shape[1], k.shape[1]
    assert queries <= keys, f"{queries} queries for {keys} keys"
    chunk = 1 < queries < keys  # SDPA's is_causal would take the queries for the first ones
    grouped = q.shape[2] != k.shape[2]
    kernel = None if queries == 1 else attention_kernel(q.device.type, q.dtype, q.shape[-1], grouped, chunk)
    if kernel == "flash-attn-4":
        return flash_attn_4(q, k, v)[0]
    if kernel == "flash-attn-2":
        from flash_attn import flash_attn_func
        return flash_attn_func(q, k, v, causal=True)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # heads before tokens, as SDPA wants them
    if chunk and kernel == "flash" and q.is_cuda:  # this operator's is_causal takes them for the last ones
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0].transpose(1, 2)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries) if chunk else None
    with sdpa_kernel(SDPA[kernel]) if kernel else nullcontext():  # for a single query PyTorch chooses
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=1 < queries == keys, enable_gqa=grouped)
    return out.transpose(1, 2)


@functools.cache
def attention_kernel(device, dtype, head_dim, grouped, chunk=False):
    """The name of the first of KERNELS that runs there, or of the forced one; for the record too, since kernels differ
    in their last bits. device: its type. grouped: are there more query heads than key heads? chunk: is it for fewer
    queries than keys? Raises UserError if none does."""
    half = dtype in (torch.bfloat16, torch.float16)
    capability = torch.cuda.get_device_capability() if device == "cuda" and half else (0, 0)
    for kernel in [forced_kernel] if forced_kernel else KERNELS:
        match kernel:
            case "flash-attn-4":
                works = capability >= (9, 0) and head_dim % 8 == 0 and head_dim <= 128 and is_installed(kernel)
            case "flash-attn-2":
                works = capability >= (8, 0) and head_dim % 8 == 0 and head_dim <= 256 and is_installed("flash-attn")
            case "cudnn" if capability[0] not in (9, 10) and not forced_kernel:
                works = False
            case "cudnn" | "efficient" if chunk:
                works = False  # they would need a T x T mask
            case "flash" if chunk and device == "cuda":
                works = capability >= (8, 0) and head_dim % 8 == 0 and head_dim <= 256
            case _:
                works = sdpa_runs(SDPA[kernel], device, dtype, head_dim, grouped)
        if works:
            return kernel
    raise UserError(f"attention {forced_kernel or 'kernels'}: not for {device}, {str(dtype).removeprefix('torch.')}, "
                    f"head_dim {head_dim}{', grouped heads' * grouped}{', a part of a sequence' * chunk} here, or not "
                    "installed")


def use_attention(name):
    """Force the kernel of that name, of KERNELS; None: the fastest."""
    global forced_kernel
    forced_kernel = name
    attention_kernel.cache_clear()


def is_installed(package):
    try:
        return bool(importlib.metadata.version(package))  # reads its metadata: an import can fail, or take seconds
    except importlib.metadata.PackageNotFoundError:
        return False


def sdpa_runs(backend, device, dtype, head_dim, grouped):
    """Would PyTorch run this backend on such tensors? It is asked about 16 tokens with gradients, and runs nothing."""
    q = torch.empty(1, 2, 16, head_dim, device=device, dtype=dtype, requires_grad=True)
    k = q[:, :1] if grouped else q
    with sdpa_kernel(backend), warnings.catch_warnings(), suppress(RuntimeError):  # "No viable backend"
        warnings.simplefilter("ignore")  # the reasons why
        return torch._fused_sdp_choice(q, k, k, is_causal=True, enable_gqa=grouped) == backend.value  # runs nothing


warnings.filterwarnings("ignore", "Argument aux_data")  # of flash-attn-4's compiler, at the first call


# A custom operator, so that selective checkpointing sees it as one. It returns the log-sum-exp too: that and the output
# are all its backward pass needs.
@torch.library.custom_op("longrope::flash_attn_4", mutates_args=())
def flash_attn_4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """flash-attn-4's causal attention of the last queries: the output (B, T, H, D) and the log-sum-exp (B, H, T)."""
    from flash_attn.cute.interface import _flash_attn_fwd  # here, as it takes seconds
    out, lse, *_ = _flash_attn_fwd(q, k, v, causal=True, return_lse=True)
    return out, lse


@flash_attn_4.register_fake
def _(q, k, v):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("longrope::flash_attn_4_backward", mutates_args=())
def flash_attn_4_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
                          lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd
    dq, dk, dv, *_ = _flash_attn_bwd(q, k, v, out, grad.contiguous(), lse, causal=True)
    return dq, dk, dv


@flash_attn_4_backward.register_fake
def _(grad, q, k, v, out, lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


flash_attn_4.register_autograd(
    lambda ctx, grad, _: flash_attn_4_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output))


def rotate(x, cos, sin):
    """Turn each pair (i, i + D/2) of x (B, T, heads, D) by its angle, in float32. cos, sin (T, D/2)."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]  # the same for every head
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Cache:
    """One layer's keys, already turned, and values: room for T tokens of one sequence, filled from the front."""

    def __init__(self, length, config, like):
        self.filled, shape = 0, (1, length, config.num_key_value_heads, config.head_dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)  # (1, T, K, D)

    def append(self, k, v):
        """Those of the next tokens in, those of all tokens so far out."""
        start, self.filled = self.filled, self.filled + k.shape[1]
        self.k[:, start:self.filled], self.v[:, start:self.filled] = k, v
        return self.k[:, :self.filled], self.v[:, :self.filled]

    def attend(self, q, k, v):
        return attention(q, *self.append(k, v))


# ---------------------------------------------------------------------------------------------------------------------
# Llama and its kin. Module and parameter names are Hugging Face's Llama's, so that weights load strictly.

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
# model_type: the class it has in config.json, which projections have a bias, which are one matrix in the checkpoint
FAMILIES = {
    "llama": ("LlamaForCausalLM", (), {}),
    "mistral": ("MistralForCausalLM", (), {}),
    "qwen2": ("Qwen2ForCausalLM", QKV, {}),
    "phi3": ("Phi3ForCausalLM", (), dict.fromkeys(QKV, "qkv_proj") | dict.fromkeys(GATE_UP, "gate_up_proj")),
}


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
    fused: dict                   # projection: the name of the matrix that holds it, and others, in the checkpoint
    sliding_window: int | None    # tokens that a token attends to; None is all
    hf: dict                      # config.json as it was read, so that saving keeps what we do not use

    @classmethod
    def from_dict(cls, d, source="config.json"):
        """Hugging Face's config.json, of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`)."""
        if not isinstance(d, dict):
            raise UserError(f"{source}: not a JSON object")
        name = (d.get("architectures") or [d.get("model_type", "unknown")])[0]
        architecture, biased, fused = FAMILIES.get(family := d.get("model_type"), (None, (), {}))
        if not architecture or name not in (architecture, family):
            supported = ", ".join(f[0] for f in FAMILIES.values())
            raise UserError(f"{source}: {name} is not supported; supported: {supported}")
        if d.get("hidden_act", "silu") != "silu":
            raise UserError(f"{source}: hidden_act {d['hidden_act']} is not supported, only SwiGLU's silu")
        biased += (*QKV, "o_proj") * bool(d.get("attention_bias"))
        biased += (*GATE_UP, "down_proj") * bool(d.get("mlp_bias"))
        try:
            heads = d["num_attention_heads"]
            head_dim = d.get("head_dim") or d["hidden_size"] // heads
            sizes = {k: d[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
            window = d["max_position_embeddings"]
        except KeyError as e:
            raise UserError(f"{source}: {e} is missing") from None
        rope = {"rope_theta": d.get("rope_theta", 10000.0), "original_max_position_embeddings": window}
        rope |= d.get("rope_scaling") or {}
        rope |= d.get("rope_parameters") or {}
        rope |= {k: d[k] for k in ("original_max_position_embeddings",) if k in d}  # as transformers does
        kind = "longrope" if "long_factor" in rope else rope.get("rope_type", rope.get("type", "default"))
        if (rope.get("partial_rotary_factor") or d.get("partial_rotary_factor") or 1) != 1:
            kind = "partial rotary"
        try:
            theta, before = float(rope["rope_theta"]), rope["original_max_position_embeddings"]
            match kind:  # what a Rope can say exactly; older Phi-3 calls longrope "su"
                case "default":
                    rope = Rope.none(head_dim, theta, window)
                case "linear":
                    rope = Rope((float(rope["factor"]),) * (head_dim // 2), theta, window)
                case "llama3":
                    factors = (rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
                    rope = Rope.llama3(head_dim, theta, window, *factors, before)
                case "yarn" if not {"mscale", "mscale_all_dim", "truncate", "attention_factor"} & rope.keys():
                    betas = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
                    rope = Rope.yarn(head_dim, theta, before, rope["factor"], *betas)
                case "longrope":
                    rope = Rope.from_dict({"factor": window / before} | rope | {"rope_type": kind}, source)
                    check_pairs(rope, head_dim, source)
                case other:
                    raise UserError(f"{source}: rope type {other!r} is not supported; supported: default, linear, "
                                    "llama3, yarn without options, longrope")
        except (KeyError, TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"{source}: not a {kind} rope ({type(e).__name__}: {e})") from None
        sliding = d.get("sliding_window", 4096 if family == "mistral" else None)  # transformers' defaults
        sliding = sliding if d.get("use_sliding_window", family != "qwen2") else None
        return cls(**sizes, biased=biased, fused=fused, sliding_window=sliding, num_attention_heads=heads,
                   num_key_value_heads=d.get("num_key_value_heads") or heads,
                   head_dim=head_dim, rms_norm_eps=d.get("rms_norm_eps", 1e-6),
                   tie_word_embeddings=d.get("tie_word_embeddings", False), rope=rope, hf=d)


def check_pairs(rope, head_dim, source):
    pairs = len(rope.rescale_factors)
    if pairs != head_dim // 2:
        raise UserError(f"{source}: {pairs} factors are for head_dim {2 * pairs}, this model has head_dim {head_dim} "
                        f"and needs {head_dim // 2}")


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

    def qkv(self, x, cos, sin, heads=slice(None)):
        """(B, T, C) -> queries (B, T, H, D) and keys (B, T, K, D), turned, and values (B, T, K, D); with `heads` of
        those key heads alone and of the query heads that share them."""
        def rows(p):
            return p if p is None else p.unflatten(0, (self.kv_heads, -1))[heads].flatten(0, 1)
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

    def forward(self, x):
        return self.down_proj(self.hidden(x))


IN_MLP = 2**29   # numbers in an MLP at a time: 1 GiB in bfloat16, and well below 2^31, where kernels become slow
AT_ONCE = 2**31  # numbers in the queries of all heads


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)
        self.chunk = max(1, IN_MLP // config.intermediate_size // 4096) * 4096  # tokens

    def before(self, x, cos, sin):
        return self.self_attn.qkv(self.input_layernorm(x), cos, sin)

    def after(self, x, out):
        """x with attention's part, and the MLP up to its last product. That one is left to `forward`: no backward pass
        needs its result, so activation checkpointing stops before it where it is not inside of what is compiled."""
        x = x + self.self_attn.o_proj(out.flatten(2))
        return x, self.mlp.hidden(self.post_attention_layernorm(x))

    def forward(self, x, cos, sin, cache=None):
        """(B, T, C) -> (B, T, C). What follows attention is done some tokens at a time unless gradients are needed: the
        MLP's activations, 3.5 C wide in a Llama-3-8B, never exist for the whole sequence."""
        before, after = (self.before, self.after) if x.shape[1] > 1 else (
            Block.before.__get__(self), Block.after.__get__(self))  # decoding stays uncompiled
        training = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        chunk = max(1, self.chunk // x.shape[0])
        if x.shape[0] * x.shape[1] * self.self_attn.q_proj.out_features >= AT_ONCE:
            if cache or training:
                what = "train" if training else "generate"  # several processes that share a sequence have a cache, too
                raise UserError(f"{x.shape[0]} x {x.shape[1]} tokens are too many to {what} with at once: the queries "
                                f"of all heads make {AT_ONCE} numbers and more, which attention kernels cannot count")
            return self.some_heads_at_a_time(x, cos, sin, chunk)
        q, k, v = before(x, cos, sin)
        out = cache.attend(q, k, v) if cache else attention(q, k, v)
        del q, k, v

        def finish(x, out, into=None):  # a function, so that one chunk's `hidden` is freed before the next is made
            x, hidden = after(x, out)
            return torch.add(x, self.mlp.down_proj(hidden), out=into)
        if training or x.shape[1] <= chunk:
            return finish(x, out)
        y = torch.empty_like(x)
        for parts in zip(*(t.split(chunk, 1) for t in (x, out, y))):
            finish(*parts)
        return y

    def some_heads_at_a_time(self, x, cos, sin, chunk):
        """The same for a sequence so long that the queries of all heads would be 2^31 numbers and more, which kernels
        cannot count: a few key heads at a time, their part of o_proj's sum added to the result. Uncompiled: attention
        is all that counts there. Raises UserError if a single key head's queries are that many."""
        y, attn = x.clone(), self.self_attn
        width = attn.q_proj.out_features // attn.kv_heads  # of the queries that share a key head
        step = (AT_ONCE - 1) // (x.shape[0] * x.shape[1] * width)
        if step < 1:
            raise UserError(f"{x.shape[0]} x {x.shape[1]} tokens are too many for this model: {width} numbers a token "
                            f"in the queries that share a key head make {AT_ONCE} and more, which attention kernels "
                            "cannot count")
        for first in range(0, attn.kv_heads, step):
            heads = slice(first, first + step)
            q, k, v = joined(attn.qkv(self.input_layernorm(part), *angles, heads)
                             for part, *angles in zip(x.split(chunk, 1), cos.split(chunk), sin.split(chunk)))
            out = attention(q, k, v).flatten(2)
            del q, k, v
            columns = attn.o_proj.weight[:, first * width:(first + step) * width]
            for part, part_out in zip(y.split(chunk, 1), out.split(chunk, 1)):
                part += F.linear(part_out, columns)
        for part in y.split(chunk, 1):
            if attn.o_proj.bias is not None:
                part += attn.o_proj.bias
            part += self.mlp(self.post_attention_layernorm(part))
        return y


def joined(parts):
    """[(a0, b0, ...), (a1, b1, ...), ...], pieces along the tokens -> (a, b, ...)."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else [torch.cat(pieces, 1) for pieces in zip(*parts)]


def compile_blocks(model, **options):
    """torch.compile for what lies between the attention calls: two graphs, for every layer, rope and length."""
    def fuse(function, *token_dims):
        compiled = torch.compile(function, **options)

        def call(*tensors):
            for x, dim in zip(tensors, token_dims):
                torch._dynamo.maybe_mark_dynamic(x, dim)
            return compiled(*tensors)
        return call
    for block in model.model.layers:
        block.before = fuse(Block.before.__get__(block), 1, 0, 0)
        block.after = fuse(Block.after.__get__(block), 1, 1)


class Llama(nn.Module):
    """`rope` is data, not a module: assign another Rope and the next forward pass uses it."""

    def __init__(self, config, rope=None):
        super().__init__()
        self.config = config
        self.rope = rope or config.rope
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
        """The window the model was trained on, in tokens, whatever its rope now is."""
        return self.config.rope.original_max_position_embeddings

    def check_length(self, length):
        """Raises UserError if so many tokens need the sliding window, which is not computed here."""
        if length > (self.config.sliding_window or math.inf):
            raise UserError(f"{length} tokens: in this model a token attends to the last {self.config.sliding_window} "
                            "only; --no-sliding-window lets it attend to all, as LongRoPE's authors did")

    def hidden(self, tokens, table=None, caches=None):
        """(B, T) int64 -> (B, T, C), the states whose product with `unembedding` are the logits.

        `generate` brings the rows of a longer table that are these tokens', and a cache for each layer.
        """
        self.check_length(0 if table else tokens.shape[1])
        cos, sin = table or self.rope.table(tokens.shape[1], tokens.device)  # once, passed down to every layer
        x = self.model.embed_tokens(tokens)
        for block, cache in zip(self.model.layers, caches or [None] * len(self.model.layers)):
            x = block(x, cos, sin, cache)
        return self.model.norm(x)

    def forward(self, tokens):
        """(B, T) int64 -> logits (B, T, V). Whole logits of a long sequence are huge: `token_nll` works in chunks."""
        return F.linear(self.hidden(tokens), self.unembedding)


@torch.inference_mode()
def generate(model, tokens, count, length=None, stop=()):
    """Greedy decoding: the list of at most `count` tokens after tokens (T,), ending before a token of `stop`.

    The set of factors is that for `length` tokens, by default all there will be, and the table is made once for all:
    keys in a cache cannot be turned anew when the sequence grows over the original window.
    """
    total, new = len(tokens) + count, []
    model.check_length(total)
    tokens = tokens.to(model.unembedding.device)
    cos, sin = model.rope.table(total, tokens.device, length)
    caches = [Cache(total, model.config, model.unembedding) for _ in model.model.layers]
    while len(new) < count:
        now = slice(caches[0].filled, caches[0].filled + len(tokens))  # the whole prompt, then one token at a time
        last = model.hidden(tokens[None], (cos[now], sin[now]), caches)[0, -1]
        tokens = F.linear(last, model.unembedding).argmax().view(1)
        if tokens.item() in stop:
            break
        new.append(tokens.item())
    return new


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: Hugging Face directories (config.json, *.safetensors, tokenizer.json), with rope.json beside.

BESIDE = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
          "generation_config.json")


def load_model(path=BUNDLED_MODEL, rope=None, length=None, device=None, dtype=None, sliding_window=True, compile=None):
    """The model in a Hugging Face directory or on the Hub, in eval mode.

    rope: None = what the directory says (its rope.json before its config), "config" = its config alone, a Rope, a path
    to a rope.json, or "none" | "pi" | "ntk" | "yarn" for `length` tokens. device: cuda if there is one, else cpu; meta
    reads no weights. dtype: bfloat16 on cuda, float32 on cpu. sliding_window: False lets Mistral's tokens attend to all
    before them. compile: torch.compile what lies between the attention calls (None: on cuda).
    Raises UserError.
    """
    path = model_directory(path)
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        if device.index is not None:
            torch.cuda.set_device(device)  # kernels are chosen for, and started on, the current one
    except (RuntimeError, AssertionError) as e:  # of a PyTorch without CUDA
        raise UserError(f"device {device}: {str(e).splitlines()[0]}") from None
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = LlamaConfig.from_dict(read_json(path / "config.json"), str(path / "config.json"))
    if not sliding_window:
        config.sliding_window = config.hf["sliding_window"] = None
        config.hf.pop("layer_types", None)  # a list of which layers slide
    with torch.device("meta"):
        model = Llama(config)
    state, parts = {}, stored_names(model)
    for name, tensor in read_weights(path, device, dtype) if device.type != "meta" else ():
        rows = [model.get_parameter(ours).shape[0] for ours in parts.get(name, ())]
        if len(rows) > 1 and tensor.shape[:1] != (sum(rows),):
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, this config needs {sum(rows)} rows")
        state |= zip(parts[name], tensor.split(rows)) if len(rows) > 1 else {name: tensor}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)  # some checkpoints hold the tied matrix twice
    try:
        model.load_state_dict(state, strict=device.type != "meta", assign=True)
    except RuntimeError as e:  # missing, unexpected or wrongly shaped tensors
        raise UserError(f"{path}: " + " ".join(str(e).split())[:300]) from None
    model.path = path
    model.rope = resolve_rope(rope, model, length)
    if device.type == "cuda" if compile is None else compile:
        compile_blocks(model)
    return model.requires_grad_(False).eval()


def model_directory(path):
    """A directory stays itself; NAME/REPO that is no directory is fetched from the Hub (the needed files only)."""
    path = Path(path)
    if path.is_dir():
        return path
    if len(path.parts) != 2 or path.is_absolute() or path.parts[0] in (".", ".."):
        raise UserError(f"model {path}: no such directory")
    from huggingface_hub import snapshot_download  # only here, so that everything else works without it
    try:
        return Path(snapshot_download(str(path), allow_patterns=[
            *BESIDE, "config.json", "rope.json", "model*.safetensors", "model.safetensors.index.json"]))
    except Exception as e:  # the Hub client raises its own, requests' and the system's errors
        raise UserError(f"model {path}: no such directory, and the Hub says: {str(e).splitlines()[0]}") from None


def stored_names(model):
    """{name in the checkpoint: our names of its parts, from the first row on}. Only a fused matrix has several."""
    names = {}
    for ours in model.state_dict():
        *before, module, kind = ours.split(".")
        names.setdefault(".".join((*before, model.config.fused.get(module, module), kind)), []).append(ours)
    return names


def read_weights(path, device, dtype):
    """Yield (name, tensor) of every safetensors file of a directory, each moved to its place as it is read."""
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    if (index := path / "model.safetensors.index.json").exists():
        try:
            files = [path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: no weight_map in it") from None
    if not files:
        raise UserError(f"{path}: no .safetensors file (other formats are not read, since they can run code)")
    for file in files:
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118, it is no dict
                    if not name.endswith("rotary_emb.inv_freq"):  # of old Llamas, what config.json says too
                        yield name, f.get_tensor(name).to(device, dtype)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file}: {e}") from None


def resolve_rope(rope, model, length=None):
    """A Rope from what `load_model` and the command lines accept (see there), checked against the model."""
    model.check_length(length or 0)
    if rope is None:
        rope = model.path / "rope.json" if (model.path / "rope.json").exists() else "config"
    if rope == "config":
        return model.config.rope
    if is_named(rope):
        if length is None and rope in NAMED[1:]:
            raise UserError(f"rope {rope}: for how many tokens? Give length, or s as in {rope}:8")
        return Rope.named(rope, model.config, length or model.window)
    if not isinstance(rope, Rope):
        if not Path(rope).is_file():
            hint = "; a model's directory is for --model" if Path(rope).is_dir() else ""
            raise UserError(f"rope {rope}: not none, pi, ntk, yarn (yarn:16 fixes s) or config, nor a rope.json "
                            f"file{hint}")
        source, rope = rope, Rope.load(rope)
        if not math.isclose(rope.rope_theta, theta := model.config.rope.rope_theta):
            raise UserError(f"{source}: rope_theta {rope.rope_theta:g}, this model has {theta:g}")
        if rope.original_max_position_embeddings != model.window:
            raise UserError(f"{source}: for an original window of {rope.original_max_position_embeddings} tokens, this "
                            f"model's is {model.window}")
        check_pairs(rope, model.config.head_dim, source)
        return rope
    check_pairs(rope, model.config.head_dim, "rope")
    return rope


def save_model(model, path, dtype=torch.bfloat16, state=None):
    """Write a Hugging Face directory that transformers loads as it is. `state` are the weights gathered from all
    processes, where each has a part of the model only."""
    save_config(model, path, dtype)
    state = state or model.state_dict()
    state = {name: torch.cat([state[part].detach().to("cpu", dtype) for part in parts])
             for name, parts in stored_names(model).items()}
    with whole_file(Path(path) / "model.safetensors") as part:
        save_file(state, part, metadata={"format": "pt"})
        part.chmod(0o644)  # it makes them readable by their owner alone
    for old in Path(path).glob("model*.safetensors*"):  # shards of a model that was here
        if old.name != "model.safetensors":
            old.unlink()


def save_config(model, path, dtype=None):
    """All of that but the weights: the model's rope goes into config.json and, with what that has no place for, into
    rope.json; the tokenizer is copied from where the model came from. dtype: None is that of the weights there."""
    path, rope, d = Path(path), model.rope, model.rope.to_dict()
    path.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in model.config.hf.items() if k != "auto_map"}  # the code that it names is not copied
    if dtype:
        config = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": str(dtype).removeprefix("torch.")}
    plain = set(rope.rescale_factors) == {1.0} and rope.attention_factor == 1.0 and not rope.short
    if rope != model.config.rope:  # or else config.json says it already
        parameters, window = {k: d[k] for k in HF_KEYS}, rope.original_max_position_embeddings
        said = Rope.from_dict(parameters).to_dict()
        lost = [f"{k} {v:.4g} (transformers will take {said[k]:.4g})" for k, v in d.items() if v != said[k]]
        if lost and rank() == 0:
            print(f"{path}: config.json has no place for {', '.join(lost)}; rope.json beside it, which this program "
                  "reads, has", file=sys.stderr)
        parameters |= {"short_mscale": d["short_attention_factor"], "long_mscale": rope.attention_factor}  # for vLLM
        config = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_theta")} | {
            "rope_parameters": {"rope_type": "default", "rope_theta": rope.rope_theta} if plain else parameters,
            "max_position_embeddings": window if plain else round(rope.scale * window),
            "original_max_position_embeddings": window}  # Phi3 looks for it here
    write_json(path / "config.json", config)
    if rope.short or not plain and rope != model.config.rope:
        rope.save(path / "rope.json")
    else:
        (path / "rope.json").unlink(missing_ok=True)
    for file in {file for name in BESIDE for file in model.path.glob(name)} if model.path not in (None, path) else ():
        with whole_file(path / file.name) as part:
            part.write_bytes(file.read_bytes())


def load_tokenizer(path=BUNDLED_MODEL):
    """tokenizer.json of a model directory, as a `tokenizers.Tokenizer`."""
    file = model_directory(path) / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{file}: not found")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises no narrower class
        raise UserError(f"{file}: {e}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Documents: text -> tokens -> windows of exactly T tokens.


@dataclass
class Window:
    document: str
    tokens: torch.Tensor  # (T,) int64
    first: int = 1        # tokens first .. T-1 are scored


def read_documents(paths, min_characters=0):
    """Yield (name, text) from .txt files, directories of them, .jsonl(.gz) files with a "text" field and data sets
    hf:NAME[:SPLIT[:FIELD]], in the order given and, within a directory, of the names. No path: long documents made of
    this Python's standard library. Those without text are left out, with a line on stderr; UserError if all are."""
    sources = [data_set(p) if p.startswith("hf:") else documents_in(Path(p)) for p in map(str, paths or ())]
    good, empty, damaged = 0, [], []
    try:
        for name, text in chain(*sources or [standard_library(min_characters)]):
            if "\ufffd" in text:
                damaged.append(name)
            if text.strip():
                good += 1
                yield name, text
            else:
                empty.append(name)
    finally:  # the reader may have had enough before the end
        for names, what in ((empty, "have no text"), (damaged, "have bytes that are not UTF-8, read as U+FFFD")):
            if names and good and rank() == 0:
                print(f"{len(names)} documents {what}: {shorten(', '.join(names), 200)}", file=sys.stderr)
    if not good:
        raise UserError(f"data: no text in any of {len(empty)} documents: {shorten(', '.join(empty), 200)}")


def documents_in(path):
    """Yield (name, text) from a file or a directory."""
    if not path.exists():
        raise UserError(f"data {path}: no such file or directory")
    kinds = (".txt", ".jsonl", ".jsonl.gz")
    files = sorted(p for p in path.rglob("*") if p.name.endswith(kinds)) if path.is_dir() else [path]
    if not files:
        raise UserError(f"data {path}: no .txt or .jsonl file in it")
    for file in files:
        try:
            if not file.name.endswith(kinds[1:]):
                yield file.name, file.read_text(encoding="utf-8", errors="replace")
                continue
            opened = gzip.open if file.suffix == ".gz" else open
            with opened(file, "rt", encoding="utf-8", errors="replace") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        text = json.loads(line)["text"]
                        assert isinstance(text, str)
                    except (ValueError, KeyError, TypeError, AssertionError):
                        raise UserError(f"{file}, line {number}: not a JSON object with a \"text\" field") from None
                    yield f"{file.name}:{number}", text
        except (OSError, EOFError, zlib.error) as e:
            raise UserError(f"data {file}: {e}") from None


def data_set(path):
    """Yield (name, text) from hf:NAME[:SPLIT[:FIELD]], by default the split train and the field text."""
    _, name, split, field = (path + ":::").split(":")[:4]
    split, field = split or "train", field or "text"
    try:
        from datasets import load_dataset  # only here, so that everything else works without it
        for number, row in enumerate(load_dataset(name, split=split, streaming=True, trust_remote_code=False), 1):
            yield f"{name}:{split}:{number}", str(row[field])
    except ImportError:
        raise UserError(f"data {path}: needs the package datasets: pip install datasets") from None
    except Exception as e:  # the library raises its own, the network's and the system's errors
        raise UserError(f"data {path}: {type(e).__name__}: {' '.join(str(e).split())[:300]}") from None


def standard_library(min_characters):
    """Yield (name, text): the packages and modules of this Python's standard library, the largest first, each whole, as
    many joined into a document as it takes to reach `min_characters`. Without tests and the tables in encodings.
    """
    root = Path(sysconfig.get_path("stdlib"))
    without = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "__pycache__"}
    texts = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if not without & set(parts):
            name = parts[0].removesuffix(".py")
            texts[name] = texts.get(name, "") + file.read_text(encoding="utf-8", errors="replace") + "\n"
    names = sorted(texts, key=lambda name: (-len(texts[name]), name))
    while names:
        joined, text = [], ""
        while names and (not joined or len(text) < min_characters):
            joined.append(names.pop(0))
            text += texts[joined[-1]]
        yield "stdlib:" + "+".join(joined[:2]) + ("+..." if len(joined) > 2 else ""), text


def windows(documents, tokenizer, length, samples, bos=None):
    """The first `length` tokens of each of the first `samples` documents that have so many -> list of Window.

    A beginning-of-text token comes first if the tokenizer adds it by itself or it is given as `bos`. Shorter documents
    are left out, with a line on stderr. Raises UserError if none is long enough.
    """
    found, short, longest = [], [], 0
    for name, text in documents:
        characters = 8 * length  # encode a beginning only; books are far longer than most windows
        while True:
            tokens = tokenizer.encode(text[:characters]).ids
            tokens = tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens]
            if len(tokens) > length + 16 or characters >= len(text):  # the cut changes the last few tokens at most
                break
            characters *= 2
        if len(tokens) < length:
            short.append(name)
            longest = max(longest, len(tokens))
            continue
        found.append(Window(name, torch.tensor(tokens[:length])))
        if len(found) == samples:
            break
    if not found:
        raise UserError(f"no document of {length} tokens: the longest of {len(short)} has {longest}; "
                        "give longer documents (--data) or a shorter --len")
    if short and rank() == 0:
        print(f"left out {len(short)} documents shorter than {length} tokens: {shorten(', '.join(short), 200)}",
              file=sys.stderr)
    return found


def data_hash(found):
    """sha256 over the tokens of the windows: what was measured, whatever files it came from."""
    return hashlib.sha256(b"".join(w.tokens.numpy().tobytes() for w in found)).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Measure: perplexity = exp(total NLL / total tokens). The search, the evaluators and fine-tuning all come through here.


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
def window_nll(model, tokens, first=1):
    """-log p of tokens first .. T-1 of one window, each given all before it. tokens (T,) -> (T-first,) float64, CPU."""
    tokens = tokens.to(model.unembedding.device)
    hidden = model.hidden(tokens[None])[0]
    return token_nll(hidden[first - 1:-1], model.unembedding, tokens[first:]).double().cpu()


def forward_flops(model, length):
    """Floating-point operations of one forward pass over a window of `length` tokens: 2 for each weight and token, and
    causal attention's two matrix products, 2 * 2 * T^2/2 * H * D in each layer."""
    c = model.config
    matrices = sum(p.numel() for block in model.model.layers for p in block.parameters()) + model.unembedding.numel()
    return 2 * matrices * length + 2 * length**2 * c.num_attention_heads * c.head_dim * c.num_hidden_layers


PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}  # bfloat16, dense, data sheets


def utilisation(flops, seconds, device):
    """Model FLOP utilisation of all processes' GPUs, None if their peak is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops / seconds / (peak * world_size()) for gpu, peak in PEAK_FLOPS.items() if gpu in name), None)


# ---------------------------------------------------------------------------------------------------------------------
# What the scripts share: arguments, processes, files, errors.


def add_arguments(parser, data=True):
    parser.add_argument("--model", default=os.path.relpath(BUNDLED_MODEL),
                        help="Hugging Face directory or Hub id (default: the bundled model)")
    if data:
        parser.add_argument("--data", nargs="+", default=[], metavar="PATH",
                            help=".txt files, directories, .jsonl(.gz) with \"text\", hf:NAME[:SPLIT[:FIELD]] "
                                 "(default: Python's standard library)")
    parser.add_argument("--no-sliding-window", dest="sliding_window", action="store_false",
                        help="let Mistral's tokens attend to all before them, as LongRoPE's authors did")
    parser.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"],
                        help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="torch.compile what lies between the attention calls (default: on cuda)")
    parser.add_argument("--attention", choices=KERNELS,
                        help="default: the first of these that runs (cudnn on data-centre Hopper and Blackwell alone)")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of everything random (default: 0)")


def natural(text):
    """argparse's type of a seed."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not 0, 1, 2, ...")
    return int(text)


def versions():
    """Of what a result depends on, for the record beside it."""
    cuda = torch.cuda.is_available()
    return {"python": platform.python_version(), "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} cores {platform.machine()}"}


def weights_hash(model):
    """Of a little of every tensor: quick, and any training changes it."""
    sample = hashlib.sha256()
    for p in model.parameters():
        sample.update(p.flatten()[:1024].double().cpu().numpy().tobytes())
    return sample.hexdigest()


def describe(model, args):
    """What must agree, among other things, for rows of two runs to stand in one table."""
    w, c = model.unembedding, model.config
    return {"model": str(args.model), "weights_sha256": weights_hash(model),
            "dtype": str(w.dtype).removeprefix("torch."), "versions": versions(),
            "compiled": "before" in vars(model.model.layers[0]),
            "attention": attention_kernel(w.device.type, w.dtype, c.head_dim,
                                          c.num_attention_heads != c.num_key_value_heads)}


def join_processes(device=None):
    """Under torchrun: join its processes and take this one's GPU. Before `load_model`."""
    if "RANK" in os.environ and not dist.is_initialized():
        gpu = None
        if torch.cuda.is_available() and (device or "cuda").startswith("cuda"):
            gpu = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(gpu)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=1),  # a window can take an hour
                                device_id=gpu)


def begin(args):
    """What the search and the evaluators start with: processes, kernel, and the model with its config's own rope."""
    join_processes(args.device)
    use_attention(args.attention)
    return load_model(args.model, "config", None, args.device, args.dtype, args.sliding_window, args.compile)


def warm_up(model, length, begun):
    """Let libraries start and kernels compile, which no measurement should pay for, and say what it took since `begun`.
    On a GPU long sequences have kernels of their own, so the pass is over up to 65536 of `length` tokens."""
    on_cpu = model.unembedding.device.type == "cpu"
    window_nll(model, torch.zeros(16 if on_cpu else min(length, 65536), dtype=torch.long))
    say_start(model, time.perf_counter() - begun)


def say_start(model, seconds):
    compiling = "" if model.unembedding.device.type == "cpu" else ", compiling"
    say(f"loading{compiling} and reading took {duration(seconds)}")


def duration(seconds):
    """To be read: at least two of its unit."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def rank():
    """The number of this process; 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(line):
    """A line on stdout, of the first process only, clear of the progress bar."""
    if rank() == 0:
        tqdm.write(line)


def barrier():
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def spread(measure, items):
    """[measure(x) for x in items], dealt to torchrun's processes. All of them get the whole list in the order of
    `items`, so sums over it do not depend on their number."""
    size, mine = world_size(), [measure(x) for x in items[rank()::world_size()]]
    parts = [mine] * size
    if size > 1:
        dist.all_gather_object(parts, mine)
    return [parts[i % size][i // size] for i in range(len(items))]


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


def set_aside(paths):
    """Rename an earlier run's files, NAME.EXT to NAME.oldN.EXT, N the first that is free: they may be days of work.
    -> what became of them, in words."""
    for n in count(1):
        aside = [path.with_suffix(f".old{n}{path.suffix}") for path in paths]
        if not any(path.exists() for path in aside):
            break
    for path, new in zip(paths, aside):
        path.replace(new)
    return ", ".join(f"{path} is now {new.name}" for path, new in zip(paths, aside))


def write_json(path, value):
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: {getattr(e, 'strerror', None) or e}") from None  # strerror leaves the path out


def run(main, remedy="lower --len"):
    """main() with mistakes of the user's, and running out of memory, told in one line and exit code 2."""
    try:
        main()
    except (UserError, OSError) as e:  # a file where a directory should be, a full disk
        sys.exit(tqdm.write(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr) or 2)  # clear of the progress bar
    except RuntimeError as e:  # torch.OutOfMemoryError is one, but a CPU's is a plain RuntimeError
        if not (needed := re.search(r"tried to allocate [\d.]+ \w+", str(e), re.IGNORECASE)):
            raise
        sys.exit(tqdm.write(f"{Path(sys.argv[0]).name}: out of memory, {needed[0]}: {remedy}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(f"{Path(sys.argv[0]).name}: stopped; what it has written so far is whole")
    if dist.is_initialized():
        dist.barrier()  # none tears its connections down while another still writes
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # all is written; gloo's threads sometimes abort when the interpreter takes them down
