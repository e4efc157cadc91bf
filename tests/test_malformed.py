"""A thousand malformed inputs, the same every time: each is refused in one line, or read as transformers reads it.
pytest runs every sixteenth; `python tests/test_malformed.py` all, in some minutes, and with numbers behind it those."""
import gzip
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where python does not look

import pytest
from conftest import WINDOW, hf_logits, make_rope, prose, random_factors, random_tokens
from test_families import LLAMA3, LONGROPE, PAIRS, THETA, YARN, save_family, to_old_config, transformers_model

import eval_passkey
import eval_ppl
import finetune
import search
from longrope import load_model, rope_to_dict, run, write_json

SEED, MODEL = 2402, Path("case/model")
NUMBERS = [int(number) for number in os.environ.get("MALFORMED", "").split()] or range(0, 1000, 16)
KINDS = {"config.json": 33, "rope.json": 12, "tokenizer.json": 10, "model.safetensors.index.json": 5, "weights": 8,
         "bytes": 11, "data": 11, "flags": 10}  # percent
ROPES = None, LONGROPE, YARN, LLAMA3, {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}
MODELS = [(family, rope) for family in ("llama", "mistral", "qwen2") for rope in ROPES]
MODELS += ("phi3", None), ("phi3", LONGROPE)
COMMANDS = {eval_ppl: "--rope model none --len 64 --samples 3 --data case/data",
            eval_passkey: "--rope none --len 400 --depths 1", finetune: "--len 64 --steps 1 --data case/data",
            search: "--len 512 --population-size 4 --iterations 0 --samples 1 --screening 2 --data case/data"}
MEETS = {"config.json": (eval_ppl, eval_ppl, finetune), "tokenizer.json": (eval_passkey, finetune)}
JUNK = (..., None, "", "x", "64", "../rope.json", [], [1], {}, {"a": 1}, True, False, 0.5, -1, 0, 1, 3, 64.0, 10**12,
        10**400, 1e300, 1e-300, float("nan"), float("inf"))
ADDED = {  # keys that may not be there, and what is likely in them
    "config.json": {"architectures": (["Qwen2ForCausalLM"], ["MistralForCausalLM"], "x", [None], [[1]])}
    | dict.fromkeys(("type", "rope_type"), ("default", "linear", "dynamic", "yarn", "longrope", "su", "llama3"))
    | dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim", "truncate", "beta_fast", "beta_slow", "factor",
                     "original_max_position_embeddings", "partial_rotary_factor", "rope_theta", "head_dim",
                     "sliding_window", "attention_bias", "short_factor", "long_factor"), (2.0, 32, 1.5)),
    "tokenizer.json": {"truncation": [{"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Left"}],
                       "padding": [{"strategy": {"Fixed": 999}, "direction": "Left", "pad_id": 9, "pad_type_id": 0,
                                    "pad_token": "x"}]},
    "weights": {"dtype": ("I32", "U32", "F64", "BF16", "C64", "BOOL"), "shape": ([-1], [2**62, 4])}}
FLAGS = (*"x013.²", "", "-1", str(10**12), str(10**19), "nan", "inf", "1e9", "0.5", "meta", "cuda", "none", "model",
         "config", "yarn:0", "yarn:nan", "yarn:1e300", "pi:-3", "search", "a/b", "/dev/null", "a\0b", "\udcff")
RECORDS = ('{"text": "%s"}', '{"text": "%s \\ud800"}', '{"text": "%s", "title": "\\udc00"}', '{"text": 3}', "3", "NaN",
           '{"text": "%s", "title": ["a\\nb"]}', '{"text": null}', '{"txt": "%s"}', "{", "[" * 100_000, "")
NAMES = "a.txt", "a.jsonl", "a.jsonl.gz", "a.JSONL.GZ", "a.csv", ".a.txt", "a\nb.txt", "\udce9.jsonl", "a" * 200


def garbled(rng, data):
    at = rng.randrange(min(len(data) or 1, rng.choice((9, 999, 10**9))))  # of weights: the header's length, the header
    return rng.choice([data[:at], data[:at] + rng.randbytes(1) + data[at + 1:], data[:at] + b"\xff" * 9 + data[at + 9:],
                       b"", data + data, data[:at] + b"\xed\xa0\x80" + data[at:], b"[" * 100_000, b'{"a":' * 100_000,
                       b"\xef\xbb\xbf" + data, data.decode("latin1").encode("utf16"), b"\0" + data, rng.randbytes(99)])


def spoil(rng, file, added):
    """Replace, drop or add something in a file's JSON, which in weights is a header, at any depth -> what, in words."""
    data = file.read_bytes()
    start, end = (8, 8 + int.from_bytes(data[:8], "little")) if file.suffix == ".safetensors" else (0, len(data))
    value = json.loads(data[start:end])
    holder, key = {"": rng.choice([value, *(inner for inner in value.values() if isinstance(inner, dict))])}, ""
    while (inner := holder[key]) and isinstance(inner, (dict, list)) and (key == "" or rng.random() < 0.6):
        holder, key = inner, rng.choice([*inner] if isinstance(inner, dict) else range(len(inner)))
    junk = rng.choice(JUNK)
    if added and isinstance(holder, dict) and rng.random() < 0.5:
        junk = rng.choice((junk, rng.choice(added[key := rng.choice([*added])])))
    elif type(inner) in (int, float) and rng.random() < 0.4:
        junk = rng.choice((inner * 2, inner + 1, inner + 512, -inner, float(inner), str(inner), 2**32 - 1))
    holder[key] = junk
    if junk is ...:
        del holder[key]
    file.write_bytes(len(new := json.dumps(value).encode()).to_bytes(8, "little")[:start] + new + data[end:])
    return f"{key} = {junk!r:.50}"


def mutated(rng, kind):
    """Damage something of the case -> (what, in words, the script that is to meet it, more arguments)."""
    file, what, script, more = MODEL / kind, "", eval_ppl, []
    if kind == "rope.json":
        file = rng.choice((file, Path("case/rope.json")))
        write_json(file, rope_to_dict(make_rope(random_factors(3, 4, PAIRS), 4.0)))
        more = ["--rope", file] * (file.parent != MODEL)
    elif kind in ("weights", "bytes"):
        file = rng.choice(sorted(MODEL.glob("*.safetensors" if kind == "weights" else "[!g]*")))  # no generation_config
    if file.suffix and kind != "bytes":
        what = [spoil(rng, file, ADDED.get(kind)) for _ in range(rng.choice((1, 1, 2)))]
        script = rng.choice(MEETS.get(kind, [eval_ppl]))
    elif kind == "bytes":
        file.write_bytes(data := garbled(rng, file.read_bytes()))
        what = f"{file.name} {len(data)} {data[:30]}"
    elif kind == "data":
        file, what = Path("case/data") / rng.choice(NAMES), rng.choices(RECORDS[:rng.choice((3, 99))], k=3)
        data = "\n".join(record.replace("%s", prose(i, 900)) for i, record in enumerate(what)).encode()
        data = gzip.compress(data, mtime=0) if file.suffix.lower() == ".gz" else data
        file.write_bytes(garbled(rng, data) if rng.random() < 0.5 else data)
        script, more = rng.choice((eval_ppl, search, finetune)), ["--data", file, *[file.parent] * rng.choice((0, 1))]
    else:
        script = rng.choice([*COMMANDS])
        flag = rng.choice([a for a in script.parser()._actions if a.dest not in ("help", "out", "export")])
        more = [flag.option_strings[0], *rng.sample(FLAGS, rng.choice((1, 1, 1, 2)))]
    return f"{what!s:.200}", script, [*map(str, more)]


def judged(script, arguments, capsys, recwarn):
    """(what came of it, what is to be seen of it)."""
    signal.alarm(20)
    try:
        code = run(lambda: script.main(arguments))
    except BaseException as e:  # as Rust's panics are
        code = e.code if isinstance(e, SystemExit) else repr(e)
    signal.alarm(0)
    shown = [str(w.message) for w in recwarn if w.category in (UserWarning, RuntimeWarning)]  # by Python itself
    lines = [*shown, *capsys.readouterr().err.splitlines()]
    if code == 2 and lines[-1].startswith(f"{script.__name__}.py: ") and len(lines[-1]) < 700 and not shown:
        return "refused" if len(lines) == 1 else "refused after a warning", ""
    if code or "Traceback" in str(lines):
        return "FAULT", [code, *lines]
    try:
        hf, ours = transformers_model(MODEL), load_model(MODEL, "config", device="cpu")
        off = [float((ours(t) - hf_logits(hf, t)).abs().max()) for t in map(random_tokens, (WINDOW, 4 * WINDOW))]
    except Exception as e:
        return "read, not by transformers", f"{e!r:.400}"
    same = "slides over" in str(lines) or all(x < 5e-3 for x in off)  # factors of 64 make float32's errors so large
    return ("read", "") if same else ("DIFFERS", off)


def test_what_is_malformed_is_refused_in_a_line_or_read_as_transformers_reads_it(
        tiny, books, tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for i, (family, rope) in enumerate(MODELS):
        save_family(str(i), family, "150KB", rope, max_position_embeddings=4 * WINDOW if rope else WINDOW)
        shutil.copy(tiny / "tokenizer.json", str(i))
    found, seen = Counter(), []
    for number in NUMBERS:
        kind, = (rng := random.Random(f"{SEED} {number}")).choices([*KINDS], KINDS.values())
        shutil.copytree(books, "case/data")
        shutil.copytree(str(rng.randrange(len(MODELS))), MODEL)
        if rng.random() < 0.5:
            to_old_config(MODEL)
        what, script, more = mutated(rng, kind)
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
        arguments = f"{COMMANDS[script]} --model {MODEL} --out case/out --device cpu".split()
        capsys.readouterr(), recwarn.clear()
        outcome, why = judged(script, arguments + more, capsys, recwarn)
        found[kind, outcome] += 1
        seen += [f"{number} {kind} {script.__name__} {what} {more}: {outcome} {why}"[:1500]] * bool(why)
        shutil.rmtree("case")
    with capsys.disabled():
        print("", *seen, *(f"{count:4} {key}" for key, count in sorted(found.items())), sep="\n")
    assert not [line for line in seen if ": FAULT" in line or ": DIFFERS" in line]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 12 * 2**20


if __name__ == "__main__":
    os.environ["MALFORMED"] = " ".join(sys.argv[1:] or map(str, range(1000)))
    sys.exit(pytest.main(["--show-capture=no", __file__]))
