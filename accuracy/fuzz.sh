#!/usr/bin/env bash
# Fuzzes the loaders under AddressSanitizer and UndefinedBehaviorSanitizer.
#
# usage: accuracy/fuzz.sh [SECONDS | --inputs N] [--jobs J]     (default 60; needs clang with libFuzzer)
#
# Starts from accuracy/fuzz_seeds and what build/fuzz/corpus has from before, into which J processes (default 1) write what
# they find new ways with; N is of all of them together. What it finds is left in build/fuzz/crash-*; add the file to
# the seeds with its fix. Exit code 1 for a finding. build/fuzz/fuzz_loaders needs no more than libc, libm, libstdc++ and libgcc_s
# and also runs alone where there is no clang (accuracy/README.md).
set -euo pipefail
usage() { echo "fuzz.sh: $1; usage: accuracy/fuzz.sh [SECONDS | --inputs N] [--jobs J]" >&2; exit 2; }
seconds=60 inputs='' jobs=1
while [[ $# -gt 0 ]]; do
  case $1 in
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \?//;p}' "$0"; exit 0 ;;
    --inputs) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage "--inputs wants a number"; inputs=$2; shift ;;
    --jobs) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage "--jobs wants a number"; jobs=$2; shift ;;
    *) [[ $1 =~ ^[1-9][0-9]*$ ]] || usage "'$1' is no number of seconds"; seconds=$1 ;;
  esac
  shift
done
root=$(cd "$(dirname "$0")/.." && pwd)
cache=${KVQ_CACHE:-$HOME/.cache/kvqbench}
oniguruma=$cache/third_party/oniguruma-6.9.10
build=$root/build/fuzz
mkdir -p "$build/corpus"
cd "$build"
checked=(-gline-tables-only -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fsanitize=fuzzer-no-link)

# Architectures' rows are parsers of config.json, schemes' rows check specs. Files that share what takes most of a file's time, JSON's code
# above all, are read at once.
together() {  # NAME FILE...
  printf '#include "%s"\n' "${@:2}" >"$1.new"
  cmp -s "$1.new" "$1.cc" || mv "$1.new" "$1.cc"
}
mapfile -t architectures < <(grep -l '^const RegisterArchitecture' "$root"/fixtures/architectures/*.cc)
loops=("$root"/fixtures/{safetensors,tokenizer/{tokenizer,tokenizer_stages,added_tokens,bpe,unicode}}.cc)
parsers=("$root"/{benchmarks/results_file,fixtures/cache/{spec,presets},accuracy/fuzz_loaders}.cc "${architectures[@]}")
together loops "${loops[@]}"
together parsers "${parsers[@]}"
together schemes "$root"/kernels/schemes/*.cc
sources=("$build"/{loops,parsers,schemes}.cc "$root"/fixtures/{tokenizer/tokenizer_formats,model_config}.cc
  "$root"/kernels/{scheme,rotation,deal,device/plain_encode}.cc)
# A header, a file among others or this script that has changed makes all of ours anew.
mapfile -t headers < <(ls -t "$root"/*/*.{h,cuh} "$root"/*/*/*.{h,cuh} "${loops[@]}" "${parsers[@]}" "$root"/kernels/schemes/*.cc \
  "$root/accuracy/fuzz.sh" 2>/dev/null)
ours=("${checked[@]}" -std=c++20 -Wno-unknown-pragmas -I "$root" -isystem "$oniguruma/src" -isystem "$cache/cuda-13.0.96/include")
# Without -O1 a file takes half of the time: what loops over texts has it, and comes first, so that JSON's own code is taken from there.
compile() {  # SOURCE
  local object level=-O0
  [[ $1 == */loops.cc ]] && level=-O1
  object=$(basename "$1").o
  [[ $object -nt $1 && $object -nt ${headers[0]} ]] || clang++ "${ours[@]}" $level -c "$1" -o "$object"
}
waiting=0
for source in "${sources[@]}"; do
  compile "$source" &
  if (( ++waiting == $(nproc) )); then wait -n || exit 1; (( --waiting )) || true; fi
done
for (( ; waiting > 0; --waiting )); do wait -n || exit 1; done
objects=("${sources[@]/%/.o}")
# Oniguruma shifts and adds in ways that the undefined-behaviour checks object to; addresses are checked.
for source in "$oniguruma"/src/{regcomp,regenc,regerror,regexec,regparse,regsyntax,regversion,st,ascii,utf8,unicode}.c \
  "$oniguruma"/src/unicode_{fold1,fold2,fold3,unfold}_key.c; do
  object=$(basename "$source").o
  [[ $object -nt $source ]] ||
    clang "${checked[@]}" -fno-sanitize=undefined -w -c "$source" -o "$object"
  objects+=("$object")
done
clang++ "${checked[@]}" -fsanitize=fuzzer "${objects[@]##*/}" -l:libutf8proc.a -o fuzz_loaders
# The seeds alone first: each is a case that must stay handled.
./fuzz_loaders "$root"/accuracy/fuzz_seeds/* 2>run.log || { tail -n 30 run.log; exit 1; }
limit=(-max_total_time="$seconds")
[[ $inputs ]] && limit=(-runs=$(((inputs + jobs - 1) / jobs)))
# Features that few inputs have, by which the fuzzer chooses what it tries next, took half of its time where 255 inputs were few.
pids=()
for (( job = 0; job < jobs; ++job )); do
  ./fuzz_loaders "${limit[@]}" -entropic_feature_frequency_threshold=20 -max_len=65536 -rss_limit_mb=2500 -timeout=20 -print_final_stats=1 \
    -artifact_prefix="$build/" corpus "$root/accuracy/fuzz_seeds" 2>"run-$job.log" &
  pids+=($!)
done
found=0
for (( job = 0; job < jobs; ++job )); do
  wait "${pids[job]}" || { tail -n 40 "run-$job.log"; found=1; }
  grep -hE 'stat::(number_of_executed_units|peak_rss_mb)' "run-$job.log" || true
done
exit $found
