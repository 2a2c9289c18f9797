#!/usr/bin/env bash
# Everything that needs a GPU, in one call, from the repository's root:
#   bench/gpu.sh [OUT]
# In an environment with `pip install -e '.[gpu]'`; the TRL environment is made beside it (python3.11 is needed).
#   1. MFU of the 1B and 8B shapes, bfloat16, r=64, both length profiles, reference live and cached, with recomputation
#      and without. A point that does not fit in memory is reported and left out.
#   2. The attention kernel next to cuDNN's dense causal attention over as many tokens.
#   3. TRL side by side on the same pairs, on both profiles, its reference live and precomputed, with and without
#      gradient checkpointing.
# Each result is a line of JSON in OUT (build/gpu by default). PAIRS and STEPS change how much is measured.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${1:-build/gpu}"
pairs_per_step="${PAIRS_PER_STEP:-16}"
pairs="${PAIRS:-$((4 * pairs_per_step))}"
steps="${STEPS:-12}"
environments="${ENVIRONMENTS:-build/peers}"
mkdir -p "$out"
failed=0

run() { # NAME COMMAND...
    local name="$1"
    shift
    echo "== $name: $*"
    if ! "$@" >"$out/$name.txt" 2>"$out/$name.log"; then
        echo "-- $name did not run to its end; $out/$name.log ends:"
        tail -n 5 "$out/$name.log"
        failed=$((failed + 1))
        return
    fi
    tail -n 20 "$out/$name.txt"
}

for shape in 1b 8b; do
    for data in ultrafeedback hh; do
        for reference in live cached; do
            for recompute in products full; do
                name="mfu-$shape-$data-$reference-$recompute"
                run "$name" python -m bench.throughput --shape "$shape" --data "$data" --pairs "$pairs" \
                    --trainer.train_batch_size "$pairs_per_step" --warmup 4 --steps "$steps" --lora.r 64 --lora.alpha 64 \
                    --reference "$reference" --model.gradient_checkpointing "$recompute" --out "$out/$name.json"
            done
        done
    done
done

for length in 2048 4096 8192 16384; do
    run "attention-$length" python -m bench.attention --rows "$((32768 / length))" --length "$length" \
        --out "$out/attention-$length.json"
done

run environments bench/peers/environments.sh "$environments" trl
for shape in 1b 8b; do
    for data in ultrafeedback hh; do
        for reference in live cached; do
            peers=(trl trl-nogc)
            [ "$reference" = cached ] && peers=(trl-precomputed)
            name="trl-$shape-$data-$reference"
            run "$name" python -m bench.compare --environments "$environments" --peer "${peers[@]}" --rounds 2 \
                --shape "$shape" --data "$data" --pairs "$pairs" --pairs-per-step "$pairs_per_step" --warmup 4 \
                --steps "$steps" --r 64 --alpha 64 --dtype bfloat16 --reference "$reference" \
                --work "build/bench-$shape-$data" --out "$out/$name.json"
        done
    done
done
echo "== results in $out; $failed commands failed"
[ "$failed" = 0 ]
