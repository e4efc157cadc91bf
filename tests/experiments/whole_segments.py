"""Of each text the part that fills whole segments, so that trainings with segments of other lengths see the same text.

    $ python tests/experiments/whole_segments.py --model DIR --data books/train --len 131072 --out out/whole
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from finetune import segments  # noqa: E402
from longrope import load_tokenizer, read_documents, run  # noqa: E402


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", required=True, help="whose tokenizer")
    p.add_argument("--data", nargs="+", required=True, help="as in the scripts")
    p.add_argument("--len", type=int, required=True, help="tokens of a segment")
    p.add_argument("--out", type=Path, required=True, help="directory to make, one .txt for each text")
    args = p.parse_args()
    tokenizer = load_tokenizer(args.model)
    part = args.out.with_name(args.out.name + ".part")  # one that was stopped is not taken for whole
    part.mkdir(parents=True, exist_ok=True)
    total = 0
    for i, found in enumerate(segments(read_documents(args.data), tokenizer, args.len, 0, 0)):
        tokens = found[:, 1:-1].reshape(-1).tolist()  # without BOS and EOS
        (part / f"{i:04}.txt").write_text(tokenizer.decode(tokens), encoding="utf-8")
        total += len(found)
    part.replace(args.out)
    print(f"{total} segments in {args.out}")


if __name__ == "__main__":
    run(main)
