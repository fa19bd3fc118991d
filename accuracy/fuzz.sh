#!/usr/bin/env bash
# Fuzzes the loaders under AddressSanitizer and UndefinedBehaviorSanitizer.
#
# usage: accuracy/fuzz.sh [SECONDS]     (default 60; needs clang with libFuzzer)
#
# Starts from accuracy/fuzz_seeds. What it finds is left in build/fuzz/crash-*; add the file to the seeds with
# its fix. Exit code 1 for a finding.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
tokenizers=${KVQ_CACHE:-$HOME/.cache/kvqbench}/third_party/pytorch_tokenizers-1.0.1
build=$root/build/fuzz
mkdir -p "$build/corpus"
cd "$build"
checked=(-std=c++20 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined)
includes=(-I "$root" -isystem "$tokenizers/include" -isystem "$tokenizers/third-party/llama.cpp-unicode/include")

# compile OBJECT SOURCE FLAGS...: only where the source is newer.
compile() {
  local object=$1 source=$2
  shift 2
  [[ $object -nt $source ]] || clang++ "$@" "${includes[@]}" -c "$source" -o "$object"
}
objects=()
# The architectures' rows are parsers of config.json, too.
mapfile -t architectures < <(grep -l '^const RegisterArchitecture' "$root"/fixtures/*.cc)
for source in "$root"/fixtures/{safetensors,model_config,tokenizer}.cc "${architectures[@]}" \
  "$root/accuracy/fuzz_loaders.cc"; do
  object=$(basename "$source").o
  # A changed header is rare here and a stale object is worse than a minute: ours are always compiled.
  clang++ "${checked[@]}" -fsanitize=fuzzer-no-link "${includes[@]}" -c "$source" -o "$object"
  objects+=("$object")
done
for source in "$tokenizers"/src/{pcre2_regex,pre_tokenizer,re2_regex,regex,regex_lookahead,std_regex}.cpp \
  "$tokenizers"/third-party/llama.cpp-unicode/src/unicode{,-data}.cpp; do
  object=$(basename "$source").o
  compile "$object" "$source" "${checked[@]}" -w -include functional -DTK_LOG_ENABLED=0
  objects+=("$object")
done
clang++ "${checked[@]}" -fsanitize=fuzzer "${objects[@]}" -lre2 -lpcre2-8 -o fuzz_loaders
# The seeds alone first: each is a case that must stay handled.
./fuzz_loaders "$root"/accuracy/fuzz_seeds/* 2>run.log || { tail -n 30 run.log; exit 1; }
./fuzz_loaders -max_total_time="${1:-60}" -max_len=65536 -rss_limit_mb=2500 -timeout=20 -print_final_stats=1 \
  -artifact_prefix="$build/" corpus "$root/accuracy/fuzz_seeds" 2>run.log || { tail -n 40 run.log; exit 1; }
grep -E 'stat::(number_of_executed_units|peak_rss_mb)' run.log
