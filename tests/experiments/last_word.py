"""An offline task for lm-evaluation-harness, as LAMBADA: the last word of a passage, which occurred in it before.

    $ python tests/experiments/last_word.py --data books/test --out out/last-word
    $ lm_eval --model hf --model_args pretrained=DIR,dtype=bfloat16 --tasks last_word --include_path out/last-word

Passages are whole sentences, at least 100 words of them, drawn from all of each text without overlap; the word has at
least five letters and none but lower-case ones.
"""
import argparse
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from longrope import read_documents, write_json  # noqa: E402

TASK = {"task": "last_word", "dataset_path": "json", "test_split": "test", "output_type": "loglikelihood",
        "doc_to_text": "{{context}}", "doc_to_target": " {{word}}", "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]}


def passages(text, least=100):
    """Yield (context, word) of all passages of a text that qualify, one after another."""
    passage = []
    for sentence in re.split(r"(?<=[a-z]{3}[.!?]) (?=[A-Z\"“])", re.sub(r"\s+", " ", text)):  # not after Mr.
        passage.append(sentence)
        if sum(len(s.split()) for s in passage) >= least:
            context, _, word = " ".join(passage).rstrip(".!?").rpartition(" ")
            if re.fullmatch("[a-z]{5,}", word) and re.search(rf"\b{word}\b", context):
                yield context, word
            passage = []


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+", required=True)
    p.add_argument("--count", type=int, default=500, help="items of each text (default: 500, or all there are)")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    rng, items = random.Random(0), []
    for name, text in read_documents(args.data):
        found = list(passages(text))
        items += rng.sample(found, min(args.count, len(found)))
        print(f"{name}: {len(found)} passages")
    path = (args.out / "items.jsonl").resolve()
    write_json(args.out / "last_word.yaml", TASK | {"dataset_kwargs": {"data_files": {"test": str(path)}}})  # YAML, too
    path.write_text("".join(json.dumps({"context": c, "word": w}) + "\n" for c, w in items))
    print(f"wrote {args.out}: {len(items)} items")
