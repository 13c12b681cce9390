#!/usr/bin/env bash
# Make an environment for lmms-eval, which `ov2 vlm eval --tasks ...` runs as a process: its pins (protobuf and others) do
# not agree with ours.
#
#     bash scripts/setup_lmms.sh ENV [BASE]
#
# Then `ov2 vlm eval ... --lmms ENV`, or OV2_LMMS=ENV. BASE is an environment whose packages, torch above all, are used
# where they fit, so that they are not installed twice.
set -euo pipefail
ENV="${1:?usage: bash scripts/setup_lmms.sh ENV [BASE]}" BASE="${2:-}"
"${PYTHON:-python3}" -m venv "$ENV"
if [ -n "$BASE" ]; then
  "$BASE/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
    > "$("$ENV/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth"
fi
# decord is missing from lmms-eval's own list; filelock 4 has no `thread_local` that it needs.
"$ENV/bin/pip" install 'lmms-eval==0.7.3' decord 'filelock<4'
"$ENV/bin/python" -c "import importlib.metadata as m; print('lmms-eval', m.version('lmms-eval'), 'with transformers', m.version('transformers'))"
