#!/usr/bin/env bash
# Build the sdist, the wheel from it, install that beside torchtune into a clean environment without extras, and use
# it there: `qrecipes ls`, `check` every config that needs no extra, train and export the smallest one.
#
#   tools/wheel_smoke.sh PYTHON_WITH_BUILD [TORCH_REQUIREMENT]
set -euo pipefail
python=$(realpath -s "$1")
torch=${2:-torch==2.13.0}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --quiet --outdir "$work/dist" "$root"
"$python" - "$work"/dist/*.whl <<'PY'
import sys
import zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
top = {name.split("/")[0] for name in names}
assert all(t == "qrecipes" or (t.startswith("qrecipes-") and t.endswith(".dist-info")) for t in top), sorted(top)
for needed in ("qrecipes/_recipes/train.py", "qrecipes/_configs/tiny/llm.toml", "qrecipes/assets/stories260k/config.json"):
    assert needed in names, f"{needed} is not in the wheel"
print(f"wheel holds {len(names)} files under {sorted(top)}")
PY

"$python" -m venv "$work/clean"
"$work/clean/bin/python" -m pip install --quiet --disable-pip-version-check "$torch" "$work"/dist/*.whl
cd "$work"
export TMPDIR="$work"
qrecipes="$work/clean/bin/qrecipes"
"$qrecipes" --version
"$qrecipes" ls
"$qrecipes" check tiny/llm tiny/llm_int8_mixed_precision quickstart
"$qrecipes" run train --config tiny/llm_int8_mixed_precision steps=3 output=run log.progress=false export.at_end=true
"$work/clean/bin/python" - <<'PY'
import torch
from qrecipes import load_export

model = load_export("run/export")
assert torch.isfinite(model(torch.zeros(1, 4, dtype=torch.long))).all()
print("wheel smoke test passed on torch", torch.__version__)
PY
