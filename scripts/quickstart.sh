#!/usr/bin/env bash
# From nothing to scores: environment, sample data, encoding, training, evaluation. A second call is quick.
#
#   bash scripts/quickstart.sh
#   bash scripts/quickstart.sh --cpu    # without the 3 GB of GPU libraries that torch brings on Linux
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/.."

step=start
trap 'echo "error: the quick start stopped at: $step (its own message stands above)" >&2' ERR
announce() { step=$1; printf '\n== %s\n' "$step"; }

announce "environment"
python=$(bash "$here/create_hseg_env.sh" "$@")
announce "sample data"
"$python" tools/make_sample_data.py
announce "encoding"
"$python" tools/dataset_hie_enc.py --cfg configs/quickstart.json
announce "training"
resume=$([ -f experiments/quickstart/configs/quickstart.json ] && echo --resume || true)
"$python" train.py --cfg configs/quickstart.json $resume
announce "evaluation"
"$python" evaluate.py --cfg configs/quickstart.json --checkpoint best

cat <<END

Where to look:
  scores and pictures   $PWD/experiments/quickstart/evaluation/best/index.html
  curves                $python -m tensorboard.main --logdir $PWD/tensorboard
  next                  $python train.py --cfg configs/quickstart.json exp_name=mine criterion=tree_min
END
