#!/usr/bin/env bash
# Known vulnerabilities in the exact sets of packages that CI runs: bash scripts/audit.sh
# Fails where there are any. Where no advisory service can be reached, it says so, and does not fail.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=.venv-audit
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --constraint scripts/constraints_audit.txt pip-audit

audit() { # SERVICE FILE
  "$folder/bin/python" -m pip_audit --vulnerability-service "$1" --requirement "$2" --no-deps --disable-pip \
    --progress-spinner off --timeout 10
}

known="$(mktemp)"
trap 'rm -f "$known"' EXIT
echo "jinja2==2.4.1" >"$known" # has known vulnerabilities: a service that does not know them cannot be asked
for service in pypi osv; do
  found="$(audit "$service" "$known" 2>/dev/null || true)"
  grep --quiet --extended-regexp "^jinja2 .*(CVE|GHSA|PYSEC)-" <<<"$found" || continue
  status=0
  for file in scripts/constraints*.txt; do
    echo "$file, by the advisories of $service:"
    audit "$service" "$file" || status=1
  done
  exit "$status"
done
echo "no advisory service (pypi, osv) can be reached: scripts/constraints*.txt are not audited"
