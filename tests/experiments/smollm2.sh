#!/usr/bin/env bash
# A real model, SmolLM2-135M-Instruct: 8192 -> 65536 tokens without fine-tuning, -> 131072 with it, and what it costs.
# results/smollm2/COMMANDS.md says what was run by it.
#
#     export MODEL=SmolLM2-135M BOOKS=books OUT=out/smollm2
#     bash tests/experiments/smollm2.sh search64 needle64 bounded64 within64 lambda64 ppl64 passkey64
#     bash tests/experiments/smollm2.sh search128 bounded128 original
#     bash tests/experiments/smollm2.sh train control recover tuned ppl-control quarter passkey128 generate words
#
# results/smollm2/DATA.md says where the model and the books are from. BOOKS/train, BOOKS/search and BOOKS/test are
# three separate lists of long texts. The stages named are run one after another, each from the directories that those
# before it left in OUT; a stage that was stopped goes on. GPUS: how many a command takes (default: all). LR: of the
# training and of its control; RUN: where these and what is measured of them go, below OUT (default: tuned).
set -euo pipefail
MODEL=${MODEL:?} BOOKS=${BOOKS:?} OUT=${OUT:?}
GPUS=${GPUS:-$(python3 -c "import torch; print(torch.cuda.device_count())")}
all() { if ((GPUS < 2)); then python3 "$@"; else torchrun --nproc-per-node "$GPUS" "$@"; fi; }
few=(--population-size 32 --num-parents 8 --num-mutations 5 --num-crossovers 3)  # fewest evaluations, see README
search() { all search.py --resume "${few[@]}" "$@"; }
bound() {
  python3 tests/experiments/variants.py --model "$MODEL" --rope "$OUT/search-$1/rope.json" --least "$2" \
    --out "$OUT/bounded-$1"
  mv "$OUT/bounded-$1/bounded.json" "$OUT/bounded-$1/rope.json"
}
tune() { all finetune.py --data "$BOOKS/train" --lr "${LR:-5e-5}" --steps 400 --save-every 100 --resume "$@"; }
RUN=$OUT/${RUN:-tuned}
texts=(--doc-tokens 524288 --data "$BOOKS/test")  # each length in windows one after another: the same tokens
to64=(--len 8192 16384 32768 65536) to128=(--len 2048 4096 8192 16384 32768 65536 131072)

for stage in "$@"; do
  case $stage in
    search64)
      search --model "$MODEL" --len 65536 --attention-factor search --data "$BOOKS/search" --out "$OUT/search-64k" ;;
    needle64)
      search --model "$MODEL" --len 65536 --attention-factor search --fitness needle --iterations 25 \
        --out "$OUT/needle-64k"
      search --model "$MODEL" --len 65536 --attention-factor search --fitness needle --iterations 25 \
        --start-from "$OUT/search-64k/rope.json" --out "$OUT/needle-64k-start" ;;
    bounded64)  # no factor below 9.5 = 1.19 s for pairs that make no full turn within the window, see README
      bound 64k 9.5 ;;
    within64)  # the same bound from the first candidate on, and a set that transformers can run
      search --model "$MODEL" --len 65536 --n-hat 0 --slow-least 1.19 --iterations 24 --data "$BOOKS/search" \
        --out "$OUT/slow-least-1.19-64k" ;;
    lambda64)  # the paper's ablation: searched without n_hat and attention factor, then with n_hat
      search --model "$MODEL" --len 65536 --data "$BOOKS/search" --n-hat 0 --attention-factor none \
        --out "$OUT/lambda-64k"
      search --model "$MODEL" --len 65536 --data "$BOOKS/search" --attention-factor none \
        --out "$OUT/lambda-n_hat-64k" ;;
    ppl64 | passkey64)
      python3 tests/experiments/variants.py --model "$MODEL" --rope "$OUT/search-64k/rope.json" --out "$OUT/variants"
      ropes=(none pi ntk yarn "$OUT"/variants/{pi,ntk,yarn}-su.json "$OUT"/search-64k/rope.json)
      for more in needle-64k needle-64k-start bounded-64k slow-least-1.19-64k lambda-64k lambda-n_hat-64k; do
        [ ! -e "$OUT/$more/rope.json" ] || ropes+=("$OUT/$more/rope.json")
      done
      if [ "$stage" = ppl64 ]; then
        all eval_ppl.py --model "$MODEL" --rope "${ropes[@]}" "${to64[@]}" "${texts[@]}" --out "$OUT/ppl-64k"
      else
        all eval_passkey.py --model "$MODEL" --rope "${ropes[@]}" "${to64[@]}" --trials 3 --out "$OUT/passkey-64k"
      fi ;;
    search128)
      search --model "$MODEL" --len 131072 --n-hat 0 --samples 3 --iterations 16 --data "$BOOKS/search" \
        --out "$OUT/search-128k" ;;
    bounded128)
      bound 128k 19 ;;
    original)
      ropes=(none "$OUT"/{search-128k,bounded-128k}/rope.json)
      all eval_ppl.py --model "$MODEL" --rope "${ropes[@]}" "${to128[@]}" "${texts[@]}" --out "$OUT/ppl-original"
      all eval_passkey.py --model "$MODEL" --rope "${ropes[@]}" "${to128[@]}" --trials 3 \
        --out "$OUT/passkey-original" ;;
    train)  # the short set is searched first, for twice the window: nearer to the long one it is easier to keep
      search --model "$MODEL" --init "$OUT/bounded-128k/rope.json" --short --len 16384 --n-hat 0 --slow-least 1.19 \
        --samples 8 --data "$BOOKS/search" --out "$OUT/short-128k"
      tune --model "$MODEL" --rope "$OUT/short-128k/rope.json" --len 131072 --batch-size 1 \
        --mix 131072:3 8192:5 16384:2 32768 65536 --out "$RUN/model" ;;
    control)  # the same steps, tokens and text, within the window
      [ -e "$OUT/train-whole" ] || python3 tests/experiments/whole_segments.py --model "$MODEL" --data "$BOOKS/train" \
        --len 131072 --out "$OUT/train-whole"
      tune --model "$MODEL" --rope none --len 8192 --batch-size 16 --micro-batch-size 16 --data "$OUT/train-whole" \
        --out "$RUN/control" ;;
    recover)  # once for this program, up to twice the window as in the paper; once for Hugging Face, which takes the
      # short set within the window alone, and has one attention factor for both sets
      short=(--model "$RUN/model" --init "$RUN/model/rope.json" --short --n-hat 0 --samples 8 --data "$BOOKS/search")
      search "${short[@]}" --len 16384 --slow-least 1.19 --start-from "$RUN/model/rope.json" --out "$RUN/recovered"
      search "${short[@]}" --len 8192 --out "$RUN/recovered-su" --export "$RUN/model-final"
      python3 tests/experiments/variants.py --model "$RUN/model" --rope "$RUN/model/rope.json" --out "$RUN/variants" ;;
    tuned)  # beyond twice the window all of these have the long set
      at=(--model "$RUN/model" "${texts[@]}" --out "$RUN/ppl")
      all eval_ppl.py --rope "$RUN/recovered/rope.json" "${to128[@]}" "${at[@]}"
      all eval_ppl.py --rope model "$RUN/variants/long.json" "$RUN/recovered-su/rope.json" --len 2048 4096 8192 \
        16384 "${at[@]}" ;;
    ppl-control)
      short=(--model "$RUN/control" --rope none --len 2048 4096 8192)
      all eval_ppl.py "${short[@]}" "${texts[@]}" --out "$RUN/ppl-control"
      all eval_passkey.py "${short[@]}" --trials 3 --out "$RUN/passkey-control" ;;
    quarter)
      python3 tests/experiments/last_quarter.py --model "$RUN/model" --rope "$RUN/recovered/rope.json" \
        "$RUN/variants/long.json" "${texts[@]}" --out "$RUN/last-quarter.json" ;;
    passkey128)
      at=(--model "$RUN/model" --trials 3)
      all eval_passkey.py --rope "$RUN/recovered/rope.json" "${to128[@]}" "${at[@]}" --out "$RUN/passkey"
      all eval_passkey.py --rope model --len 2048 4096 8192 16384 "${at[@]}" --out "$RUN/passkey-model" ;;
    generate)  # pass keys by the paper's own scoring
      key() { all eval_passkey.py --trials 3 --generate "$@"; }
      key --model "$MODEL" --rope none --len 2048 4096 8192 --out "$OUT/generate-original"
      key --model "$MODEL" --rope yarn "$OUT/variants/yarn-su.json" "$OUT"/{search,bounded}-64k/rope.json --len 65536 \
        --out "$OUT/generate-64k"
      key --model "$RUN/model" --rope "$RUN/recovered/rope.json" "${to128[@]}" --out "$RUN/generate" ;;
    words)  # short texts, so the short set, to which transformers gives the long set's attention factor
      python3 tests/experiments/last_word.py --data "$BOOKS/test" --out "$OUT/last-word"
      for model in "$MODEL" "$RUN"/{model,model-final,control}; do
        lm_eval --model hf --model_args "pretrained=$model,dtype=bfloat16" --tasks last_word --batch_size 32 \
          --include_path "$OUT/last-word" --output_path "$RUN/words/$(basename "$model")"
      done ;;
    *) echo "smollm2.sh: no stage $stage" >&2; exit 2 ;;
  esac
done
