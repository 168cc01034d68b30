#!/usr/bin/env bash
# Sets up what is needed and trains CPM-2 in its three stages, as small as a laptop takes them: Chinese; Chinese and English; experts.
# Each stage begins with what the one before has learned, and one picture has the loss of all three.
#   bash tools/cpm2_recipe.sh [DIR [STEPS]]     DIR: where everything is written, default runs/cpm2_recipe
#                                               STEPS: at the end of each stage, default '600 1000 1300'
# The same command goes on where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. tools/setup_env.sh
setup_env
OUT="${1:-runs/cpm2_recipe}"
read -r CHINESE BILINGUAL EXPERTS <<< "${2:-600 1000 1300}"
mkdir -p "$OUT"

say() { printf '\n%s\n' "$*"; }
t5x_cpm() {
  printf '$ python -m t5x_cpm'
  printf ' %q' "$@"
  echo
  "$PYTHON" -m t5x_cpm "$@"
}

say '1. Texts, and two vocabularies: the second has the pieces of the first, each with its id, and then those of English.'
"$PYTHON" - "$OUT" <<'PYTHON'
import pathlib
import sys

from t5x_cpm.tasks import stories

for language in stories.LANGUAGES:
  for name, numbers in (('train', range(8000)), ('validation', range(1_000_000, 1_000_200))):
    texts = [stories.story(number, language).text for number in numbers]
    pathlib.Path(sys.argv[1], f'{language}.{name}.txt').write_text('\n'.join(texts) + '\n', encoding='utf-8')
PYTHON
t5x_cpm vocabulary --input="$OUT/zh.train.txt" --input=tasks/corpus/zh.txt --size=1600 --sentinels=50 --byte_fallback --output="$OUT/zh.vocab.txt"
t5x_cpm vocabulary --input="$OUT/en.train.txt" --input=tasks/corpus/en.txt --extends="$OUT/zh.vocab.txt" --size=2800 --sentinels=50 --byte_fallback \
  --output="$OUT/zh_en.vocab.txt"

run=(--gin_file=gin/runs/quickstart.gin --gin.TaskConfig.name=local --gin.TrainConfig.eval_every=100 --gin.CheckpointConfig.every=100)
chinese=(--gin.LocalTaskConfig.files="$OUT/zh.train.txt" --gin.LocalTaskConfig.validation_files="$OUT/zh.validation.txt")
both=(--gin.LocalTaskConfig.files="{'zh': '$OUT/zh.train.txt', 'en': '$OUT/en.train.txt'}"
      --gin.LocalTaskConfig.validation_files="{'zh': '$OUT/zh.validation.txt', 'en': '$OUT/en.validation.txt'}"
      --gin.LocalTaskConfig.rates="{'zh': 2.0, 'en': 1.0}")  # so that Chinese is not forgotten (Zhang et al. 2021, section 2.3)
goes_on=(--gin.TrainConfig.go_on=True)  # steps, learning rate and curve

say '2. The first stage: Chinese.'
t5x_cpm train --gin_file=gin/models/cpm2_tiny.gin "${run[@]}" "${chinese[@]}" --gin.TaskConfig.vocabulary="cpm2:$OUT/zh.vocab.txt" \
  --gin.ModelConfig.vocab_size=0 --gin.TrainConfig.steps="$CHINESE" --model_dir="$OUT/chinese"

say '3. The second stage: the vocabulary grows; a new piece begins with what its longest known beginning means.'
[ -d "$OUT/grown_vocabulary" ] || t5x_cpm inherit --source="$OUT/chinese" --gin_file=gin/runs/inherit_vocabulary.gin \
  --gin.TaskConfig.vocabulary="cpm2:$OUT/zh_en.vocab.txt" --model_dir="$OUT/grown_vocabulary"
for stage in chinese grown_vocabulary; do  # what the new vocabulary changes on the text that the model knows
  t5x_cpm eval --model_dir="$OUT/$stage" --tasks=local "${chinese[@]}"
done
t5x_cpm train --init_from="$OUT/grown_vocabulary" "${run[@]}" "${both[@]}" "${goes_on[@]}" --gin.TrainConfig.steps="$BILINGUAL" \
  --model_dir="$OUT/bilingual"

say '4. The third stage: each feed-forward network becomes 8 experts, between which a fixed projection chooses.'
[ -d "$OUT/grown_experts" ] || t5x_cpm inherit --source="$OUT/bilingual" --gin_file=gin/runs/inherit_experts.gin \
  --gin.MoEConfig.num_experts=8 --model_dir="$OUT/grown_experts"
t5x_cpm train --init_from="$OUT/grown_experts" "${run[@]}" "${both[@]}" "${goes_on[@]}" --gin.TrainConfig.steps="$EXPERTS" \
  --model_dir="$OUT/experts"

"$PYTHON" - "$OUT" "$CHINESE" "$BILINGUAL" <<'PYTHON'
import json
import pathlib
import sys

out, chinese, bilingual = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
before, after = (json.loads((out / run / 'eval' / step / 'metrics.json').read_text())['local']['metrics']['loss']
                 for run, step in (('chinese', chinese), ('grown_vocabulary', '0')))
print(f'\nThe loss on Chinese text, when the vocabulary grew: {before:.4f} -> {after:.4f}. More pieces compete.')
records = map(json.loads, (out / 'experts' / 'metrics.jsonl').read_text().splitlines())
before, after = [one['loss'] for one in records if one['split'] == 'eval' and one['step'] == bilingual]
print(f'The loss when networks became experts: {before:.6f} -> {after:.6f}, as the function stays the same.')
print(f'The loss of all three stages: {out}/experts/loss.png')
if abs(after - before) > 1e-4:
  sys.exit('error: the loss jumped.')
PYTHON
