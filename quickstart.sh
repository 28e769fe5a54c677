#!/usr/bin/env bash
# The whole pipeline on this machine, in five minutes on two free CPU cores (after installation; longer where a data
# root has many validation images, since one is sampled for each):
#
#   ./quickstart.sh                 on retinal OCT phantoms, which it draws itself
#   ./quickstart.sh --data ROOT     on a data root made with prepare_data.py
#
# prepare data -> extract latents -> train (from the bundled GeCA-XS that is nearest to the images: phantoms, OCT or
# fundus) -> sample -> score -> a report to look at. The labels may be any; fold 0 needs two validation images or more.
# Options: --minutes N (training time, default 3), --output DIR (default runs/quickstart[-ROOT]). The same command
# continues a run that was stopped.
set -euo pipefail
FROM=$PWD
cd "$(dirname "$0")"
usage() { sed -n '2,11s/^# \{0,1\}//p' "$0"; }
DATA="" MINUTES=3 OUTPUT=""
while [ $# -gt 0 ]; do
    case "$1" in --help|-h) usage; exit 0 ;; esac
    [ $# -ge 2 ] || { echo "quickstart.sh: error: $1: expected a value" >&2; exit 2; }
    case "$1" in
        --data) DATA=$2 ;;
        --minutes) MINUTES=$2 ;;
        --output) OUTPUT=$2 ;;
        *) echo "quickstart.sh: error: unknown option $1 (--help lists them)" >&2; exit 2 ;;
    esac
    shift 2
done
[[ $MINUTES =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)$ && $MINUTES =~ [1-9] ]] || {
    echo "quickstart.sh: error: --minutes $MINUTES: expected a number above 0" >&2; exit 2; }
here() { case "$1" in ''|/*) echo "$1" ;; *) echo "$FROM/$1" ;; esac; }  # as seen from where the command was given
DATA=$(here "$DATA") OUTPUT=$(here "$OUTPUT")
[ -z "$DATA" ] || [ -f "$DATA/train_0.csv" ] || {
    echo "quickstart.sh: error: --data $DATA: no train_0.csv there; make a data root with prepare_data.py" >&2; exit 2; }
OUTPUT=${OUTPUT:-runs/quickstart${DATA:+-$(basename "$DATA")}}
source scripts/setup.sh

step() { printf '\n== %s\n' "$1"; }
if [ -z "$DATA" ]; then
    DATA=$OUTPUT/data
    step "1 data: drawing retinal OCT phantoms with known pathology"
    [ -f "$DATA/test.csv" ] || python prepare_data.py --source phantom --count 600 --global-seed 1 --output "$DATA"
else
    step "1 data: $DATA"
fi
step "2 latents: the bundled autoencoder encodes the training images of fold 0 at 64 x 64 pixels"
python extract_features.py --data-path "$DATA" --features-path "$OUTPUT/features" --fold 0 --image-size 64 --vae retina

step "3 training: of the bundled weights, those that denoise these images best"
START=$(python scripts/nearest_weights.py --feature-path "$OUTPUT/features" --fold 0 --ckpt assets/geca-xs-*/geca-xs-*.pt)
echo "$START learns for $MINUTES minutes"
python train.py --preset quickstart --data-path "$DATA" --feature-path "$OUTPUT/features" --fold 0 \
    --load-from "$START" --epochs 100000 --max-minutes "$MINUTES" --val-samples 8 --no-both-weights \
    --log-every 50 --ckpt-every 100 --results-dir "$OUTPUT/results"
RUN=$(ls -dt "$OUTPUT"/results/*-GeCA-XS-0 | head -n 1)

step "4 sampling: one image for the labels of every validation image"
python sample_ddp_val.py --preset quickstart --ckpt "$RUN/checkpoints/last_ckpt.pt" --data-path "$DATA" --fold 0 \
    --sample-dir "$OUTPUT/synthetic-$MINUTES-minutes"
SAMPLES=$(ls -dt "$OUTPUT/synthetic-$MINUTES-minutes"/GeCA-XS-* | head -n 1)

step "5 report: real against real is the noise floor, then GeCA-XS"
python evaluate.py --real "$DATA" --gen "$SAMPLES" --fold 0 --features retina --lpips none \
    --cache "$OUTPUT/cache" --output "$OUTPUT/report"
echo
echo "report:  $OUTPUT/report/report.html (and real_vs_generated.png, results.txt, results.json)"
echo "samples: $SAMPLES"
echo "run:     $RUN (log.txt, samples/, checkpoints/; tensorboard --logdir $RUN)"
