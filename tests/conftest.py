"""What the tests share: random tiny Llamas on disk, a small byte-level BPE, documents, calls of the scripts."""
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# Before the imports: no test needs a network; and one thread, for on a busy machine the threads of tiny models wait for
# each other fifty times longer than they work. The scripts that the tests start inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import finetune
import longrope

signal.signal(signal.SIGINT, signal.default_int_handler)  # nohup and & have it ignored
# Processes are forked off one that has imported this and no more: quick, and clean of what pytest's own has running.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["conftest", "finetune", "torch._dynamo", "matplotlib.pyplot"])

ROOT = Path(longrope.__file__).resolve().parent
WINDOW, HEAD_DIM, VOCAB, BOS, EOS = 64, 64, 512, 0, 1
WORDS = ("the a of and in to it was that he she they river mountain letter window morning evening captain garden music "
         "silver winter answer question stone bridge walked found carried opened remembered forgot slowly never always "
         "under behind across without quiet old bright small other first last 7 42 1815")


@pytest.fixture(autouse=True)
def every_warning_anew():
    longrope.warn.cache_clear()


def prose(seed, words):
    """Sentences of random words, the same for the same seed."""
    rng, sentences = random.Random(seed), []
    while words > 0:
        sentences.append(" ".join(rng.choices(WORDS.split(), k=rng.randint(4, 14))).capitalize() + ".")
        words -= sentences[-1].count(" ") + 1
    return " ".join(sentences)


def save_tiny(path, shard="5GB", **changes):
    """Write a random tiny Llama as transformers does, and return transformers' own model of it. head_dim is not
    hidden_size / heads, so that no test passes by that coincidence; initializer_range is five times the usual, so that
    attention, and with it the rope, matters."""
    config = {"vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD_DIM, "initializer_range": 0.1,
              "max_position_embeddings": WINDOW, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
              "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "bos_token_id": BOS,
              "eos_token_id": EOS}
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | changes)).eval()
    for name, weight in hf.named_parameters():
        if name.endswith("norm.weight"):  # ones would hide a norm that forgets its weight
            weight.data.uniform_(0.5, 1.5)
        if name.endswith("bias"):  # nor zeros
            weight.data.normal_(std=0.1)
    hf.save_pretrained(path, max_shard_size=shard)
    return hf


def edit_config(path, **changes):
    """Change the config.json of a directory; `...` takes a key away."""
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def hf_logits(hf, tokens):
    with torch.no_grad():
        return hf(tokens, use_cache=False).logits


def assert_same_logits(model, hf, *lengths):
    """Of our model and of transformers', on random tokens."""
    for length in lengths:
        tokens = random_tokens(length)
        ours, theirs = model(tokens), hf_logits(hf, tokens)
        assert ours.shape == (1, length, VOCAB) and theirs.std() > 0.1  # there is something to compare
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def random_tokens(length, seed=0, vocab=VOCAB):
    return torch.randint(vocab, (1, length), generator=torch.Generator().manual_seed(seed))


def random_factors(seed, largest, pairs=HEAD_DIM // 2):
    """Non-decreasing multiples of 0.01 from 1 to `largest`."""
    rng = random.Random(seed)
    return tuple(sorted(rng.randint(100, round(100 * largest)) / 100 for _ in range(pairs)))


def signalling(last, *numbers, ranks=range(8)):
    """finetune.batch_of, with these signals in step `last` to this process, if it is one of `ranks`."""
    batch_of = finetune.batch_of

    def signalled(data, step, *rest):
        for number in numbers * (step == last and longrope.rank() in ranks):
            os.kill(os.getpid(), number)
        return batch_of(data, step, *rest)
    return signalled


def make_rope(rescale_factors, scale, n_hat=0, attention_factor=None, rope_theta=10000.0, window=WINDOW):
    """A Rope with these long factors and the usual attention factor unless one is given; plain up to the window."""
    plain = longrope.plain(len(rescale_factors))
    factor = longrope.su_factor(scale, window) if attention_factor is None else attention_factor
    long = longrope.Factors(tuple(map(float, rescale_factors)), n_hat, factor)
    return longrope.Rope(rope_theta, window, plain, long, scale, plain, window)


def run_script(name, *arguments):
    """A script as a user starts it, on the CPU."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments), "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def complaint(main, capsys, *arguments):
    """The one line on stderr of a run that must end with exit code 2, no traceback and nothing else on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        longrope.run(lambda: main([*map(str, arguments), "--device", "cpu"]))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0], lines
    return lines[0]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The directory of a random tiny Llama (grouped-query, tied, window 64) with a tokenizer that puts a BOS first."""
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([prose(0, 5000)], trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def books(tmp_path_factory):
    """A directory of six documents, each well over 512 tokens, and one of a few words."""
    path = tmp_path_factory.mktemp("books")
    for i in range(6):
        (path / f"book{i}.txt").write_text(prose(100 + i, 1000))
    (path / "note.txt").write_text("A note of a few words.")
    return path


@pytest.fixture
def tiny_model(tiny):
    return longrope.load_model(tiny, device="cpu")


@pytest.fixture
def tiny_rope():
    """A searched-looking rope for four times the tiny window."""
    return make_rope(random_factors(1, 4), 4.0)


@pytest.fixture(scope="session")
def bundled():
    """The bundled model's directory and our model of it."""
    return SimpleNamespace(path=longrope.BUNDLED_MODEL, model=longrope.load_model(device="cpu"))
