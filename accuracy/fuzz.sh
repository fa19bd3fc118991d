#!/usr/bin/env bash
# Fuzzes the loaders under AddressSanitizer and UndefinedBehaviorSanitizer.
#
# usage: accuracy/fuzz.sh [SECONDS]     (default 60; needs clang with libFuzzer)
#
# Starts from accuracy/fuzz_seeds. What it finds is left in build/fuzz/crash-*; add the file to the seeds with
# its fix. Exit code 1 for a finding.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
oniguruma=${KVQ_CACHE:-$HOME/.cache/kvqbench}/third_party/oniguruma-6.9.10
build=$root/build/fuzz
mkdir -p "$build/corpus"
cd "$build"
checked=(-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fsanitize=fuzzer-no-link)

objects=()
# The architectures' rows are parsers of config.json, too.
mapfile -t architectures < <(grep -l '^const RegisterArchitecture' "$root"/fixtures/architectures/*.cc)
for source in "$root"/fixtures/{safetensors,model_config,tokenizer/{tokenizer,tokenizer_formats,tokenizer_stages,added_tokens,bpe,unicode}}.cc \
  "${architectures[@]}" \
  "$root/accuracy/fuzz_loaders.cc"; do
  object=$(basename "$source").o
  # A changed header is rare here and a stale object is worse than a minute: ours are always compiled.
  clang++ "${checked[@]}" -std=c++20 -I "$root" -isystem "$oniguruma/src" -c "$source" -o "$object"
  objects+=("$object")
done
# Oniguruma shifts and adds in ways that the undefined-behaviour checks object to; addresses are checked.
for source in "$oniguruma"/src/{regcomp,regenc,regerror,regexec,regparse,regsyntax,regversion,st,ascii,utf8,unicode}.c \
  "$oniguruma"/src/unicode_{fold1,fold2,fold3,unfold}_key.c; do
  object=$(basename "$source").o
  [[ $object -nt $source ]] ||
    clang "${checked[@]}" -fno-sanitize=undefined -w -c "$source" -o "$object"
  objects+=("$object")
done
clang++ "${checked[@]}" -fsanitize=fuzzer "${objects[@]}" -l:libutf8proc.a -o fuzz_loaders
# The seeds alone first: each is a case that must stay handled.
./fuzz_loaders "$root"/accuracy/fuzz_seeds/* 2>run.log || { tail -n 30 run.log; exit 1; }
./fuzz_loaders -max_total_time="${1:-60}" -max_len=65536 -rss_limit_mb=2500 -timeout=20 -print_final_stats=1 \
  -artifact_prefix="$build/" corpus "$root/accuracy/fuzz_seeds" 2>run.log || { tail -n 40 run.log; exit 1; }
grep -E 'stat::(number_of_executed_units|peak_rss_mb)' run.log
