# shellcheck shell=bash disable=SC2034
# Shared by the scripts of ci/: sourced, not run.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export KVQ_CACHE=${KVQ_CACHE:-$HOME/.cache/kvqbench}

# say TEXT: progress, on stderr.
say() { printf '%s\n' "$*" >&2; }

# fail TEXT: one clear line and exit code 2.
fail() {
  say "$(basename "$0"): $*"
  exit 2
}

# show_help: the comment block at the top of the calling script.
show_help() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }
