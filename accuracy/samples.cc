#include "accuracy/samples.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "benchmarks/results_file.h"
#include "fixtures/cache/kv_cache.h"
#include "kernels/error.h"
#include "kernels/file.h"
#include "kernels/sha256.h"

namespace kvq {
namespace {

constexpr char kFlag[] = "--benchmark_out";

// What policy hf has encoded of the tokens that position `at` reads: those before it that are not in the residual. A
// residual that with the new token reaches its length is encoded with all else, behind that token's attention.
int64_t HfEncoded(const SideRule& rule, int64_t first_call, int64_t at) {
  int64_t encoded = first_call, residual = 0;
  for (int64_t position = first_call; position < at; ++position) {
    if (residual > 0 && residual + 1 >= rule.residual_length) {
      encoded = position + 1;
      residual = 0;
    } else {
      ++residual;
    }
  }
  return encoded;
}

}  // namespace

std::string PromptSha256(const std::vector<int32_t>& ids) {
  std::string bytes(ids.size() * sizeof(int32_t), '\0');
  std::memcpy(bytes.data(), ids.data(), bytes.size());
  return Sha256(bytes);
}

double EncodedShareRead(const Spec& spec, const CacheShape& shape, int64_t first_call, int64_t begin, int64_t end) {
  if (begin >= end) throw std::logic_error("the share of no position");
  // Of all elements, those of keys and of values that are encoded at all.
  double keys = 0, values = 0, all = 0;
  for (int64_t layer = 0; layer < shape.count(); ++layer) {
    for (const LayerSide& side : SidesOf(spec, shape, layer)) {
      const double elements = static_cast<double>(side.elements());
      if (side.encodes()) (side.rule->values ? values : keys) += elements;
      all += elements;
    }
  }
  if (keys + values == 0) return 0;
  const auto encoded = [&](const SideRule& rule, int64_t at) -> int64_t {
    switch (spec.policy) {
      case Policy::kAppend: return EncodedTokens(spec, rule, at + 1);  // stores first, reads then
      case Policy::kKivi: return EncodedTokens(spec, rule, at);
      case Policy::kHf: return HfEncoded(rule, first_call, at);
    }
    throw std::logic_error("no such policy");
  };
  const bool raw = spec.raw_prefill || spec.policy != Policy::kAppend;
  double sum = 0;
  for (int64_t at = begin; at < end; ++at) {
    if (raw && at < first_call) continue;
    sum += (keys * static_cast<double>(encoded(spec.keys, at)) + values * static_cast<double>(encoded(spec.values, at))) /
           (all * static_cast<double>(at + 1));
  }
  return sum / static_cast<double>(end - begin);
}

void CheckSamples(const std::vector<Sample>& samples) {
  std::set<std::string> ids;
  for (const Sample& sample : samples) {
    if (!ids.insert(sample.id).second) throw std::logic_error(StrCat("two samples are called ", sample.id));
    std::vector<std::pair<std::string, double>> numbers = sample.numbers;
    for (const auto& [name, value] : {std::pair("right", sample.right), std::pair("nll", sample.nll),
                                      std::pair("margin", sample.margin), std::pair("encoded_share", sample.encoded_share)}) {
      if (value) numbers.emplace_back(name, *value);
    }
    for (const auto& [name, value] : numbers) {
      if (!std::isfinite(value)) throw std::runtime_error(StrCat(name, " of ", sample.id, " is not a finite number"));
    }
  }
}

SamplesFile::SamplesFile(const std::string& results) : path_(results.empty() ? "" : results + ".samples.jsonl") {
  std::error_code error;
  if (path_.empty() || !std::filesystem::exists(path_, error)) return;
  begun_ = true;
  const std::string text = ReadFile(path_);
  size_t number = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::string line = text.substr(at, end - at);
    at = end + 1;
    ++number;
    try {
      const nlohmann::json item = nlohmann::json::parse(line);
      item.at("sample").get_ref<const std::string&>();
      lines_[item.at("benchmark").get<std::string>()] += line + "\n";
    } catch (const nlohmann::json::exception& why) {
      throw InputError(kFlag, ": ", path_, ": line ", number, " is no sample of kvqbench; move the file away (", why.what(), ")");
    }
  }
}

void SamplesFile::Backup() const {
  if (begun_) WriteWhole("--patch", path_ + ".bak", ReadFile(path_));
}

void SamplesFile::Put(const std::string& benchmark, const std::vector<Sample>& samples) {
  std::string lines;
  for (const Sample& sample : samples) {
    nlohmann::ordered_json line = {{"benchmark", benchmark},
                                   {"sample", sample.id},
                                   {"cluster", sample.cluster},
                                   {"prompt_sha256", sample.prompt_sha256}};
    const auto add = [&](const std::string& name, const std::optional<double>& value) {
      if (value) line[name] = *value;
    };
    add("right", sample.right);
    add("nll", sample.nll);
    add("margin", sample.margin);
    add("encoded_share", sample.encoded_share);
    for (const auto& [name, value] : sample.numbers) add(name, value);
    if (sample.answer) line["answer"] = *sample.answer;
    // Half a character of a cut answer is shown as U+FFFD.
    lines += line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
  }
  std::string& there = lines_[benchmark];
  if (there == lines) return;
  there = lines;
  changed_ = true;
}

void SamplesFile::Save(const std::vector<std::string>& known) {
  const std::set<std::string> names(known.begin(), known.end());
  if (std::erase_if(lines_, [&](const auto& cell) { return cell.second.empty() || names.count(cell.first) == 0; }) > 0) {
    changed_ = true;
  }
  if (path_.empty() || !changed_ || (lines_.empty() && !begun_)) return;
  std::string text;
  for (const auto& [name, lines] : lines_) text += lines;
  WriteWhole(kFlag, path_, text);
  changed_ = false;
  begun_ = true;
}

std::string SamplesFile::Text(const std::string& benchmark) const {
  const auto found = lines_.find(benchmark);
  return found == lines_.end() ? "" : found->second;
}

}  // namespace kvq
