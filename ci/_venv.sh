# Sourced by the other scripts. Changes to the root of the checkout, compiles llama.cpp, and makes .venv there with the
# project in editable mode and everything that the tests need. Sets $python. Takes a second if nothing has changed.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV

say() { printf 'ci: %s\n' "$*" >&2; }

# Reports everything that the machine lacks, before anything else starts. $1: the Python to make .venv with.
check_machine() {
  local missing=()
  if ! command -v "$1" >/dev/null; then
    missing+=(python3 python3-venv python3-dev)
  else
    if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      say "$("$1" -V 2>&1) is too old: set PYTHON to a Python 3.11 or newer"
      exit 1
    fi
    "$1" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    "$1" -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null ||
      missing+=(python3-dev)
  fi
  if [[ -z ${CXX:-} ]] && ! command -v c++ g++ clang++ >/dev/null; then
    missing+=(g++)
  fi
  if ((${#missing[@]})); then
    say "this machine lacks ${missing[*]}: on Debian or Ubuntu run: sudo apt install ${missing[*]}"
    exit 1
  fi
}

base=${PYTHON:-python3}
python=$PWD/.venv/bin/python
stamp=.venv/installed

# Everything that the installation depends on. The compiled libraries have a cache of their own. A checkout that was
# moved counts as a new one.
fingerprint() { { pwd; "$python" -VV; cat pyproject.toml setup.py build_llama.py native/build/*.py ci/_venv.sh; } 2>&1 | cksum; }

if [[ -f $stamp && $(<"$stamp") == "$(fingerprint)" ]]; then
  "$python" build_llama.py --inplace
else
  check_machine "$base"
  if ! "$python" -c 'import pip' 2>/dev/null || [[ $(<.venv/bin/pip) != *"$PWD"* ]]; then
    say "making .venv with $("$base" -V)"
    "$base" -m venv --clear .venv
  fi
  rm -f "$stamp"
  say "installing the build requirements"
  "$python" -m pip install -qq --upgrade 'pip>=25.1' 'setuptools>=77' 'cffi>=1.17'
  tools=$("$python" -c 'import build_llama; print(*build_llama.get_requires_for_build_wheel())')
  # shellcheck disable=SC2086 # a list of words
  [[ -z $tools ]] || "$python" -m pip install -qq $tools
  # Compile here and not inside pip, which would hide the progress line.
  "$python" build_llama.py --inplace
  say "installing trio-runner and the test requirements"
  if ! "$python" -m pip install -qq --no-build-isolation --only-binary llguidance --editable '.[schema]' --group test; then
    say "perhaps llguidance has no wheel for this machine: trying without, so that JSON schemas are refused"
    "$python" -m pip install -qq --no-build-isolation --editable . --group test
  fi
  fingerprint >"$stamp"
fi
