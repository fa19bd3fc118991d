#!/usr/bin/env bash
# What must not be lost or mixed, more often than ci/test does it: runs that are killed, a disk that fills up, two runs on one
# file, converters of GGUF files that are killed. All on tiny models; needs a release build.
#
# usage: accuracy/hardening.sh [--kills N] [--fills N] [--writers N] [--seed S]     (default: 50 50 20 1)
#
# --kills: SIGKILLs at random moments of a study, taken up again each time, and at random moments of a converter;
# --fills: times that the disk, a tmpfs of 1 MiB, is full at a random moment; --writers: rounds of two runs that begin at
# nearly the same time. Every study must end with the facts of an uninterrupted one. Where no tmpfs can be mounted,
# that part is skipped. Exit code 1 for a loss.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
kills=50 fills=50 writers=20 seed=1
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \?//;p}' "$0"; exit 0 ;;
    --kills | --fills | --writers | --seed)
      [[ ${2:-} =~ ^[1-9][0-9]{0,5}$ ]] || { echo "hardening.sh: $1 wants a number from 1" >&2; exit 2; }
      declare "${1#--}=$2"
      shift 2 ;;
    *) echo "hardening.sh: '$1' is no flag; --help" >&2; exit 2 ;;
  esac
done
tests=$root/build/release/kvqbench_tests
[[ -x $tests ]] || { echo "hardening.sh: $tests is not there; ci/build release makes it" >&2; exit 2; }
export KVQ_KILLS=$kills KVQ_FILLS=$fills KVQ_WRITERS=$writers KVQ_SEED=$seed
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} TEST_TMPDIR=${TEST_TMPDIR:-$root/build/tmp}
mkdir -p "$TEST_TMPDIR"
disk=$(mktemp -d)
trap 'rmdir "$disk"' EXIT
code=0
/usr/bin/python3 "$root/accuracy/test_datasets.py" GgufToHf.test_a_killed_converter_leaves_no_half_model || code=1
# In a namespace of mounts, so that nothing is left mounted; without root in one of users, too.
run='mount -t tmpfs -o size=1m none "$0" && KVQ_SMALL_DISK=$0 exec "$@"'
for namespace in --mount "--mount --user --map-root-user" none; do
  if [[ $namespace == none ]]; then
    echo "hardening.sh: no tmpfs can be mounted here ($why): the full disk is skipped" >&2
    "$tests" --gtest_filter='LongRunSlow.*' || code=1
  elif why=$(unshare $namespace mount -t tmpfs -o size=1m none "$disk" 2>&1); then
    unshare $namespace bash -c "$run" "$disk" "$tests" --gtest_filter='LongRunSlow.*' || code=1
    break
  fi
done
exit $code
