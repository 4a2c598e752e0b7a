#!/usr/bin/env bash
# Makes the README's picture from a run's report: docs/images/screenshot.sh runs/ppcl-digits
# Needs chromium; light theme, 1200 pixels wide, the first HEIGHT of them.
set -euo pipefail
run=$1
height=${HEIGHT:-2010}
image=$(realpath "$(dirname "${BASH_SOURCE[0]}")")/report.png
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
"${CHROMIUM:-chromium}" --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking \
  --user-data-dir="$profile" --blink-settings=preferredColorScheme=1 --hide-scrollbars \
  --window-size="1200,$height" --screenshot="$image" "file://$(realpath "$run")/report/report.html"
python - "$image" <<'PYTHON'
import sys
from PIL import Image
Image.open(sys.argv[1]).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(sys.argv[1], optimize=True)
PYTHON
ls -l "$image"
