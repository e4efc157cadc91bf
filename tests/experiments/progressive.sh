#!/usr/bin/env bash
# Progressive extension of the bundled model at the paper's ratios: 1024 -> 32x (400 steps) -> 64x (600 steps) -> 512x.
#
#     export BOOKS=books OUT=out/progressive
#     bash tests/experiments/progressive.sh search32 search64 train32 train64 second recover evaluate short
#
# BOOKS/train, BOOKS/search and BOOKS/test are three separate lists of long texts. The stages named are run one after
# another, each from the directories that those before it left in OUT. GPUS: how many a command takes (default: all).
set -euo pipefail
BOOKS=${BOOKS:?} OUT=${OUT:?}
GPUS=${GPUS:-$(python3 -c "import torch; print(torch.cuda.device_count())")}
all() { if ((GPUS < 2)); then python3 "$@"; else torchrun --nproc-per-node "$GPUS" "$@"; fi; }
few=(--num-parents 8 --num-mutations 5 --num-crossovers 3 --iterations 40)  # needs the fewest evaluations, see README

for stage in "$@"; do
  case $stage in
    search32) all search.py --len 32768 --data "$BOOKS/search" "${few[@]}" --out "$OUT/search-32x" ;;
    search64) all search.py --len 65536 --data "$BOOKS/search" "${few[@]}" --out "$OUT/search-64x" ;;
    train32)
      all finetune.py --rope "$OUT/search-32x/rope.json" --len 32768 --data "$BOOKS/train" --steps 400 \
        --batch-size 4 --lr 5e-4 --out "$OUT/model-32x" ;;
    train64)
      all finetune.py --model "$OUT/model-32x" --rope "$OUT/search-64x/rope.json" --len 65536 --data "$BOOKS/train" \
        --steps 600 --batch-size 4 --lr 5e-4 --out "$OUT/model-64x" ;;
    second)
      all search.py --model "$OUT/model-64x" --init "$OUT/model-64x/rope.json" --len 524288 --samples 3 \
        --population-size 24 --num-parents 6 --num-mutations 5 --num-crossovers 3 --iterations 8 \
        --data "$BOOKS/search" "$BOOKS/test" --out "$OUT/search-512x" ;;
    recover)  # on windows from all over the books
      mkdir -p "$OUT/pieces"
      for book in "$BOOKS"/search/*.txt; do
        split -n l/4 -d --additional-suffix=.txt "$book" "$OUT/pieces/$(basename "$book" .txt)-"
      done
      all search.py --model "$OUT/model-64x" --init "$OUT/search-512x/rope.json" --short --len 1024 --samples 20 \
        --population-size 32 "${few[@]}" --iterations 24 --data "$OUT/pieces" --out "$OUT/recovered"
      all search.py --model "$OUT/model-64x" --init "$OUT/search-512x/rope.json" --short --len 1024 --samples 20 \
        --population-size 32 "${few[@]}" --iterations 24 --data "$OUT/pieces" --attention-factor su \
        --out "$OUT/recovered-su" ;;
    evaluate)
      lengths=(--len 1024 8192 32768 65536 524288)
      texts=(--samples 4 --data "$BOOKS/test")
      all eval_ppl.py --rope none "$OUT/search-32x/rope.json" "$OUT/search-64x/rope.json" "${lengths[@]}" "${texts[@]}" \
        --out "$OUT/ppl-0"
      all eval_ppl.py --model "$OUT/model-32x" --rope model "${lengths[@]}" "${texts[@]}" --out "$OUT/ppl-32x"
      all eval_ppl.py --model "$OUT/model-64x" --rope model "$OUT/search-512x/rope.json" "${lengths[@]}" "${texts[@]}" \
        --out "$OUT/ppl-64x"
      all eval_passkey.py --rope none "$OUT/search-32x/rope.json" "$OUT/search-64x/rope.json" \
        --len 1024 8192 32768 65536 --out "$OUT/passkey-0"
      all eval_passkey.py --model "$OUT/model-32x" --rope model --len 1024 8192 32768 65536 --out "$OUT/passkey-32x"
      all eval_passkey.py --model "$OUT/model-64x" --rope model "$OUT/search-512x/rope.json" "${lengths[@]}" \
        --out "$OUT/passkey-64x" ;;
    short)  # the original window, on many windows of the books and of the standard library, without and with recovery
      python3 tests/experiments/variants.py --model "$OUT/model-64x" --rope "$OUT/search-512x/rope.json" --out "$OUT/variants"
      ropes=(model "$OUT"/variants/long.json "$OUT"/recovered{,-su}/rope.json)  # long.json: the long set at every length
      books=(--doc-tokens 65536 --data "$BOOKS/test")
      all eval_ppl.py --rope none --len 1024 "${books[@]}" --out "$OUT/short-books-0"
      all eval_ppl.py --model "$OUT/model-32x" --rope model --len 1024 "${books[@]}" --out "$OUT/short-books-32x"
      all eval_ppl.py --model "$OUT/model-64x" --rope "${ropes[@]}" --len 1024 "${books[@]}" --out "$OUT/short-books"
      all eval_ppl.py --rope none --len 1024 --doc-tokens 8192 --out "$OUT/short-library-0"
      all eval_ppl.py --model "$OUT/model-64x" --rope "${ropes[@]}" --len 1024 --doc-tokens 8192 --out "$OUT/short-library"
      all eval_passkey.py --model "$OUT/model-64x" --rope "${ropes[@]}" --len 1024 --out "$OUT/short-passkey" ;;
    *) echo "progressive.sh: no stage $stage" >&2; exit 2 ;;
  esac
done
