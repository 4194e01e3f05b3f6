#!/usr/bin/env bash
# Make .venv beside the README and install infovla_peft with the simulation into it. Safe to run again.
# usage: recipes/setup.sh [EXTRA ...]     extras of pyproject.toml, default: libero video
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=$(IFS=,; echo "${*:-libero,video}")
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' ||
    { echo "infovla: Python 3.10 to 3.13 is needed; set PYTHON to one, as PYTHON=python3.13" >&2; exit 1; }
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then  # none, or one that was begun and not finished
    "$python" -m venv .venv ||
        { echo "infovla: could not make .venv; on Debian: apt-get install python3-venv" >&2; exit 1; }
fi

# One stamp for what was installed: a second run starts at once.
stamp=.venv/.infovla-setup
wanted="$extras $(cat pyproject.toml infovla_peft/simulation/installation.py | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "infovla: installing into .venv (a few minutes the first time) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
    case ",$extras," in *,libero,*) .venv/bin/infovla setup-libero ;; esac
    echo "$wanted" > "$stamp"
fi
