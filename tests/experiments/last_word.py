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
from longrope import read_documents  # noqa: E402

TASK = """task: last_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: " {{{{word}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""
WORDS = 100


def passages(text):
    """Yield (context, word) of all passages of a text that qualify, one after another."""
    sentences = re.split(r"(?<=[a-z]{3}[.!?]) (?=[A-Z\"“])", re.sub(r"\s+", " ", text))  # not after Mr.
    passage = []
    for sentence in sentences:
        passage.append(sentence)
        if sum(len(s.split()) for s in passage) < WORDS:
            continue
        context, _, word = " ".join(passage).rstrip(".!?").rpartition(" ")
        if re.fullmatch("[a-z]{5,}", word) and re.search(rf"\b{word}\b", context):
            yield context, word
        passage = []


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", nargs="+", required=True)
    p.add_argument("--count", type=int, default=500, help="items of each text (default: 500, or all there are)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng, items = random.Random(args.seed), []
    for name, text in read_documents(args.data):
        found = list(passages(text))
        items += rng.sample(found, min(args.count, len(found)))
        print(f"{name}: {len(found)} passages")
    path = (args.out / "items.jsonl").resolve()
    path.write_text("".join(json.dumps({"context": c, "word": w}) + "\n" for c, w in items))
    (args.out / "last_word.yaml").write_text(TASK.format(items=path))
    print(f"wrote {args.out}: {len(items)} items")


if __name__ == "__main__":
    main()
