#!/usr/bin/env bash
# Debian's Chromium, in which the tests open the report; without it (no Debian, no root) they are skipped.
set -uo pipefail
if command -v chromium google-chrome >/dev/null; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "chromium is missing and cannot be installed here: the report will not be opened in a browser"
    exit 0
fi
packages="chromium fonts-dejavu-core"
log=$(mktemp)
# The lists of packages may be missing or old: update them only where the first try fails.
if ! apt-get install -y --no-install-recommends $packages >"$log" 2>&1; then
    apt-get update >"$log" 2>&1 && apt-get install -y --no-install-recommends $packages >>"$log" 2>&1 || tail -3 "$log"
fi
rm -f "$log"
