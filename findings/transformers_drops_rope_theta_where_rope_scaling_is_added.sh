#!/usr/bin/env bash
# transformers 5: YaRN added to a config.json the documented way resets rope_theta to 10,000, without a word.
#
# Expected: "rope_scaling" in config.json, as model cards of Qwen2.5 and others tell to add it for long texts, scales the
# rope that the file has.
# Seen with transformers 5.23.0 on 2026-11-28: a file that transformers 5 saved has its theta in "rope_parameters". An
# added "rope_scaling" replaces that object as a whole, so that theta becomes 10000.0 (1000000.0 in the file), which
# damages the model in texts of any length. With a top-level "rope_theta", as older files have it, theta is kept.
# jfa: config_from_hf refuses a file whose two objects differ, and says to move rope_scaling into rope_parameters.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "transformers==5.23.0" python - 2>/dev/null <<'PYTHON'
import json
import pathlib

import transformers

file = pathlib.Path("config.json")
transformers.Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}).save_pretrained(".")
saved = json.loads(file.read_text())
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

found = []
for added in ({}, {"rope_scaling": yarn}, {"rope_scaling": yarn, "rope_theta": 1e6}):
    file.write_text(json.dumps(saved | added))
    found.append(transformers.AutoConfig.from_pretrained(".").rope_parameters)
    print(f"transformers {transformers.__version__}: added {sorted(added)}: {found[-1]}")
assert found[0]["rope_theta"] == found[2]["rope_theta"] == 1e6
assert found[1]["rope_type"] == "yarn"
assert found[1]["rope_theta"] == 1e4, "changed: rope_scaling keeps the file's rope_theta now"
PYTHON
