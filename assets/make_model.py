"""Make the bundled model: a small Llama with a window of 1024 tokens, trained from nothing on books and Python source.

    $ python assets/make_model.py --books BOOKS_DIR --out out/bundled          # one GPU, under 15 minutes

Steps: collect text; train a BPE of 4096 tokens; write random weights; train with finetune.py's own loop, then a few
steps more on a mixture with a third of pass keys; the result in OUT/model is what stands in assets/model. No file of
Python source that shares more than 3 lines with the standard library is used, so that it can be measured on; about a
tenth of the text are pass-key documents. The committed model is of an earlier finetune.py, which had the cosine
schedule and a weight decay of 0.1 that its first training used, and packed no documents.

theta is 700. What a window has to repair depends on the share of the pairs that turn within it at least once: 0.70 of
them in Llama-2 (window 4096, theta 10000), 0.78 here with a window of 1024. With theta 10000 the share would be 0.55,
YaRN alone would extend this small model 8 times at almost no loss, and a search would have nothing to find.
"""
import argparse
import importlib.metadata
import json
import math
import random
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import finetune
from eval_passkey import make_prompt
from longrope import Llama, read_config, read_documents, run, save_model, write_json

WINDOW = 1024
ANNEAL = 150  # steps at the end, of 16 segments, a third of them pass keys
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 256,
    "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "max_position_embeddings": WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    "bos_token_id": 0, "eos_token_id": 1, "attention_bias": False, "mlp_bias": False,
}


def substantial_lines(text):
    """Lines that say something: 20 characters and more, imports aside."""
    lines = (line.strip() for line in text.splitlines())
    return {line for line in lines if len(line) >= 20 and not line.startswith(("import ", "from "))}


def python_source(folders, budget):
    """Yield a text for each package under `folders`, in random order, without the files that share more than 3 lines
    with the standard library, up to `budget` characters and 4 million of one package."""
    library = Path(sysconfig.get_path("stdlib"))
    known = set()
    for file in library.rglob("*.py"):
        if not {"site-packages", "dist-packages"} & set(file.parts):
            known |= substantial_lines(file.read_text(encoding="utf-8", errors="replace"))
    packages = sorted(p for folder in folders for p in Path(folder).iterdir() if p.is_dir())
    random.Random(0).shuffle(packages)
    for package in packages:
        texts, size = [], 0
        for file in sorted(package.rglob("*.py")):
            text = file.read_text(encoding="utf-8", errors="replace")
            if 1500 <= len(text) <= 200_000 and len(substantial_lines(text) & known) <= 3 and size < 4_000_000:
                texts.append(text)
                size += len(text)
        if size > 20_000 and budget > 0:
            budget -= size
            yield package.name, "\n".join(texts)


def train_tokenizer(texts, path):
    """Byte-level BPE; every digit is a token of its own, as in Llama; a <s> comes first by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"], special_tokens=["<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "model_max_length": WINDOW, "clean_up_tokenization_spaces": False})
    return tokenizer


def passkey_documents(tokenizer, texts, count, ends=0.0):
    """`count` documents that fill a segment each: a pass-key prompt of up to WINDOW tokens with its answer, then a
    book. A share `ends` of the keys stands at the very start or end, where one of a random depth hardly ever does."""
    rng = random.Random(0)
    while count:
        length = rng.randint(110, WINDOW - 2) if rng.random() < 0.7 else WINDOW - 2
        depth = rng.choice((0.0, 1.0)) if ends and rng.random() < ends else rng.random()
        tokens, *_ = make_prompt(tokenizer, length, depth, f"{rng.randint(10000, 99999)}")
        book = rng.choice(texts)
        start = rng.randrange(max(1, len(book) - 10 * WINDOW))
        tokens += tokenizer.encode("\n\n" + book[start:start + 8 * WINDOW], add_special_tokens=False).ids
        tokens = tokenizer.encode(tokenizer.decode(tokens[:WINDOW + 50]), add_special_tokens=False).ids  # a few less
        text = tokenizer.decode(tokens[:WINDOW - 1])
        if len(tokenizer.encode(text).ids) == WINDOW:  # with BOS, as a rule; the next begins with a segment of its own
            count -= 1
            yield text


def random_weights(config, seed):
    """Normal with standard deviation 0.02, the projections back into the residual stream smaller by sqrt(2 layers)."""
    torch.manual_seed(seed)
    model = Llama(config)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            back = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.num_hidden_layers) if back else 0.02)
    return model


def train(model, data, out, steps, batch_size, lr):
    """finetune.py's loop. Segments have one token more than the window: EOS ends a segment, and the window's own last
    place should see all kinds of tokens."""
    finetune.main(["--model", str(model), "--len", str(WINDOW + 1), "--data", str(data), "--rope", "none",
                   "--steps", str(steps), "--lr", lr, "--warmup", str(min(50, steps // 4)),
                   "--batch-size", str(batch_size), "--micro-batch-size", str(batch_size), "--out", str(out)])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--books", nargs="+", required=True, help="directories of .txt files")
    p.add_argument("--python", nargs="+", default=[sysconfig.get_path("purelib")],
                   help="directories of packages (default: this Python's site-packages)")
    p.add_argument("--characters", type=float, default=8e7, help="most characters of each of the two (default: 8e7)")
    p.add_argument("--passkeys", type=int, default=6000, help="pass-key documents (default: 6000)")
    p.add_argument("--steps", type=int, default=3600, help="training steps (default: 3600)")
    p.add_argument("--batch-size", type=int, default=128, help="segments of 1024 tokens in a step (default: 128)")
    p.add_argument("--out", type=Path, default=Path("out/bundled"))
    args = p.parse_args()
    begun, init = time.perf_counter(), args.out / "init"
    init.mkdir(parents=True, exist_ok=True)

    books, left = [], args.characters
    for name, text in read_documents(args.books):
        if left > 0:
            books.append((name, text[:int(left)]))
            left -= len(text)
    source = list(python_source(args.python, args.characters))
    print(f"{len(books)} books, {sum(len(t) for _, t in books) / 1e6:.1f}M characters; "
          f"{len(source)} packages, {sum(len(t) for _, t in source) / 1e6:.1f}M characters", flush=True)
    tokenizer = train_tokenizer([t[:300_000] for _, t in books + source], init)
    prompts = list(passkey_documents(tokenizer, [t for _, t in books], args.passkeys))
    with open(args.out / "train.jsonl", "w") as f:
        for text in prompts + [t for _, t in books + source]:  # as long as segments, so that they stay whole
            f.write(json.dumps({"text": text}) + "\n")
    print(f"tokenizer and text after {time.perf_counter() - begun:.0f} s", flush=True)

    save_model(random_weights(read_config(CONFIG), seed=0), init, dtype=torch.float32)
    train(init, args.out / "train.jsonl", args.out / "pretrained", args.steps, args.batch_size, "2e-3")
    rng = random.Random(1)
    with open(args.out / "anneal.jsonl", "w") as f:
        prompts += (keys := list(passkey_documents(tokenizer, [t for _, t in books], ANNEAL * 8, ends=0.4)))
        texts = rng.choices([t for _, t in books + source], k=ANNEAL * 8)
        for text in keys + [t[(at := rng.randrange(max(1, len(t) - 8000))):at + 8000] for t in texts]:
            f.write(json.dumps({"text": text}) + "\n")
    train(args.out / "pretrained", args.out / "anneal.jsonl", args.out / "model", ANNEAL, 16, "3e-4")
    log = map(json.loads, (args.out / "pretrained" / "log.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in log if "loss" in line][-50:]
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    write_json(args.out / "made.json", {
        "arguments": {k: str(v) for k, v in vars(args).items()}, "seconds": round(time.perf_counter() - begun),
        "books": len(books), "book_characters": sum(len(t) for _, t in books),
        "packages": {name: installed.get(name, "") for name, _ in source},
        "package_characters": sum(len(t) for _, t in source), "passkey_documents": len(prompts),
        "final_loss": sum(losses) / len(losses)})


if __name__ == "__main__":
    run(main)
