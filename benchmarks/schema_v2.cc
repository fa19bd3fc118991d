#include "benchmarks/schema_v2.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <regex>

#include "benchmarks/results_file.h"
#include "fixtures/safetensors.h"
#include "fixtures/cache/spec.h"
#include "fixtures/model.h"
#include "kernels/error.h"
#include "kernels/file.h"

namespace kvq {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr double kMiB = 1048576;

// Benchmarks of one context: measurement -> the run as it stands in the file.
using Context = std::map<std::string, json>;
// Of one model, backend and spec: context -> its benchmarks.
using Combination = std::map<int64_t, Context>;
using Key = std::tuple<std::string, std::string, std::string>;

// A counter in the schema's unit, or null.
json Value(const Context& context, const std::string& measurement, const std::string& counter,
           double scale = 1) {
  const auto run = context.find(measurement);
  if (run == context.end() || !run->second.contains(counter)) return nullptr;
  const json& value = run->second.at(counter);
  if (!value.is_number() || !std::isfinite(value.get<double>())) return nullptr;
  return value.get<double>() * scale;
}

json Repetitions(const Context& context, const std::string& measurement) {
  json value = Value(context, measurement, "samples");
  if (value.is_null()) value = Value(context, measurement, "iterations");  // as older files have them
  return value.is_null() ? value : json(static_cast<int64_t>(value.get<double>()));
}

json Number(const json& context, const char* key) {  // custom context is text
  if (!context.contains(key)) return nullptr;
  return std::stoll(context.at(key).get<std::string>());
}

json Text(const json& context, const char* key) {
  return context.contains(key) ? context.at(key) : json(nullptr);
}

// Sum of what is known; null if any part is not.
json Sum(const json& a, const json& b) {
  if (a.is_null() || b.is_null()) return nullptr;
  return a.get<double>() + b.get<double>();
}

json Product(const json& a, const json& b) {
  if (a.is_null() || b.is_null()) return nullptr;
  return a.get<double>() * b.get<double>();
}

json Quotient(const json& a, const json& b) {
  if (a.is_null() || b.is_null()) return nullptr;
  return a.get<double>() / b.get<double>();
}

// Seconds that all benchmarks of a context took in their timers.
double Elapsed(const Context& context) {
  double seconds = 0;
  for (const auto& [name, run] : context) {
    seconds += run.value("real_time", 0.0) * run.value("iterations", 0.0) * run.value("samples", 1.0) / 1e3;
  }
  return seconds;
}

json Measurement(int64_t tokens, const Context& of, const Spec& spec, const json& decode_tokens,
                 const json& memory_bytes) {
  const json prefill_ms = Value(of, "prefill", "prefill_ms");
  const json rate = Value(of, "decode", "tokens_per_s");
  json decode_ms = nullptr;
  if (!rate.is_null() && !decode_tokens.is_null()) {
    decode_ms = 1e3 * decode_tokens.get<double>() / rate.get<double>();
  }
  // One run over one run: what encoding and decoding take of a prefill and of the decoding steps.
  const auto overhead = [&](const char* measurement) -> json {
    if (spec.stores_dense()) return 0;
    return Sum(Product(Value(of, measurement, "share_of_prefill"), prefill_ms),
               Product(Value(of, measurement, "share_of_decode"), decode_ms));
  };
  const json encode = overhead("quantize"), decode = overhead("dequantize");
  const json share = Quotient(Sum(encode, decode), Sum(prefill_ms, decode_ms));
  const json reserved = Value(of, "memory", "vram_reserved_bytes");
  return {{"context_len", tokens},
          {"prefill_ms", prefill_ms},
          {"prefill_n_runs", Repetitions(of, "prefill")},
          {"prefill_tokens_per_sec", Value(of, "prefill", "tokens_per_s")},
          {"decode_ms", decode_ms},
          {"decode_n_runs", Repetitions(of, "decode")},
          {"decode_tokens", decode_tokens},
          {"decode_tokens_per_sec", rate},
          {"vram_peak_mb", Value(of, "memory", "vram_peak_bytes", 1 / kMiB)},
          {"vram_reserved_mb", Value(of, "memory", "vram_reserved_bytes", 1 / kMiB)},
          {"kv_cache_mb", Value(of, "kv_size", "kv_bytes", 1 / kMiB)},
          {"kv_cache_type", "kvqbench " + spec.text},
          {"quant_overhead_ms", encode},
          {"dequant_overhead_ms", decode},
          {"overhead_pct", Product(share, 100)},
          {"avg_power_watts", Value(of, "power", "watts")},
          {"energy_mj_per_token", Value(of, "power", "mj_per_token")},
          {"ctx_elapsed_s", Elapsed(of)},
          {"vram_overflow", reserved.is_null() || memory_bytes.is_null()
                                ? json(nullptr)
                                : json(reserved.get<double>() > memory_bytes.get<double>())}};
}

// The needle trials with the constant number, as the study has them.
void AddNeedle(const Combination& contexts, json& benchmarks) {
  int64_t trials = 0, successes = 0;
  json per_context = json::object(), all = json::array();
  static const std::regex kTrial("needle/depth:([0-9]+)");
  for (const auto& [tokens, of] : contexts) {
    const auto run = of.find("needle");
    if (run == of.end()) continue;
    std::vector<std::pair<int64_t, bool>> found;  // depth in percent
    for (const auto& [counter, value] : run->second.items()) {
      std::smatch match;
      if (std::regex_match(counter, match, kTrial)) {
        found.emplace_back(std::stoll(match[1]), value.get<double>() != 0);
      }
    }
    if (found.empty()) continue;
    std::sort(found.begin(), found.end());
    // Protocol `study` has the answers in its label, from the start of the prompt to its end.
    const std::string label = run->second.value("label", ""), word = "answers: ";
    const size_t at = label.find(word);
    json answers = json::array();
    if (at != std::string::npos) answers = json::parse(label.substr(at + word.size()));
    answers.get_ref<json::array_t&>().resize(found.size());  // null where there is none
    int64_t here = 0;
    for (size_t index = 0; index < found.size(); ++index) {
      const auto [depth, success] = found[index];
      here += success;
      json input = Value(of, "needle", StrCat("prompt_tokens/depth:", depth));
      if (!input.is_null()) input = static_cast<int64_t>(input.get<double>());
      all.push_back({{"context_length", tokens},
                     {"depth_percent", static_cast<double>(depth) / 100},
                     {"input_tokens", input},
                     {"generated_text", answers[index]},
                     {"success", success}});
    }
    const auto count = static_cast<int64_t>(found.size());
    per_context[std::to_string(tokens)] = {
        {"trials", count},
        {"successes", here},
        {"success_rate", static_cast<double>(here) / static_cast<double>(count)}};
    trials += count;
    successes += here;
  }
  if (trials == 0) return;
  benchmarks["needle_in_haystack"] = {
      {"total_trials", trials},
      {"successes", successes},
      {"success_rate", static_cast<double>(successes) / static_cast<double>(trials)},
      {"per_context", per_context}};
  benchmarks["needle_in_haystack_trials"] = all;
}

json Quantization(const Spec& spec) {
  const bool dense = spec.stores_dense();
  static const std::regex kStudy("int[842]-(hqq|quanto)(-kivi)?");
  const std::string& name = spec.schemes.keys->name;
  const bool plain = spec.schemes.keys == spec.schemes.values && spec.layers.empty() && spec.dense_first + spec.dense_last == 0;
  std::smatch match;
  const bool known = plain && std::regex_match(name, match, kStudy);
  json quant = {{"enabled", !dense},    {"nbits", nullptr},      {"backend", nullptr},
                {"axis_key", nullptr},  {"axis_value", nullptr}, {"asymmetric", false},
                {"spec", spec.text}};
  if (dense) return quant;
  if (spec.keys.residual_length == spec.values.residual_length) quant["residual_length"] = spec.keys.residual_length;
  if (plain && spec.schemes.keys->keys.bits == spec.schemes.values->values.bits) {
    quant["nbits"] = spec.schemes.keys->keys.bits;
  }
  quant["backend"] = known ? match[1].str() : spec.text.substr(0, spec.text.find('@'));
  if (known) {
    const bool kivi = match[2].matched;
    quant["axis_value"] = match[1] == "hqq" || kivi ? 1 : 0;
    quant["axis_key"] = kivi ? 0 : quant["axis_value"].get<int>();
    quant["asymmetric"] = kivi;
  }
  return quant;
}

json Document(const json& context, const Key& key, const Combination& contexts) {
  const auto& [model, backend, text] = key;
  const Spec spec = ParseSpec(text);
  const json decode_tokens = Number(context, "decode_tokens");
  const json memory = Number(context, "gpu_memory_bytes");
  // The machine's own time.
  const std::string date = context.at("date").get<std::string>().substr(0, 19);
  json measurements = json::array(), benchmarks = json::object();
  json window = nullptr;
  double elapsed = 0;
  for (const auto& [tokens, of] : contexts) {
    measurements.push_back(Measurement(tokens, of, spec, decode_tokens, memory));
    elapsed += Elapsed(of);
    const auto perplexity = [&](const char* name, const char* counter) {
      const json value = Value(of, "perplexity", counter);
      if (value.is_null()) return;
      benchmarks[name] = {
          {"dataset", Text(context, "corpus")}, {"tokens", tokens}, {"value", value}};
      window = tokens;
    };
    perplexity("perplexity", "ppl_reference");
    if (!spec.stores_dense()) perplexity("perplexity_quantized", "ppl");
  }
  AddNeedle(contexts, benchmarks);
  json shape = nullptr;
  if (const std::string fact = "model_config " + model; context.contains(fact)) {
    shape = json::parse(context.at(fact).get<std::string>());
  } else {
    for (const char* field : {"num_params_b", "num_layers", "num_q_heads", "num_kv_heads",
                              "gqa_ratio", "head_dim", "max_position_embeddings"}) {
      shape[field] = nullptr;
    }
  }
  std::string id = StrCat(model, "_", backend, "_", text == "none" ? "fp16" : text, "_");
  std::transform(id.begin(), id.end(), id.begin(),
                 [](unsigned char c) { return c == '-' ? '_' : std::tolower(c); });
  for (const char c : date) {
    if (c == 'T') id += '_';
    else if (std::isdigit(static_cast<unsigned char>(c))) id += c;
  }
  const json gpu = Text(context, "gpu");
  return {{"schema_version", "2.0"},
          {"experiment_id", id},
          {"timestamp", date},
          {"model", model},
          {"model_config", shape},
          {"attn_backend", backend},
          {"kv_quant", Quantization(spec)},
          {"environment", {{"python_version", nullptr},
                           {"pytorch_version", Text(context, "libtorch")},
                           {"transformers_version", nullptr},
                           {"cuda_version", Text(context, "cuda_runtime")},
                           {"gpu_name", gpu},
                           {"gpu_vram_gb", Quotient(memory, 1e9)}}},
          {"hardware", {{"vram_total_mb", Quotient(memory, kMiB)}, {"gpu_name", gpu}}},
          {"config", {{"seed", Number(context, "seed")},
                      {"warmup_runs", 1},  // of prefill and of decode
                      {"measure_runs", Number(context, "runs")},
                      {"decode_tokens", decode_tokens},
                      {"ppl_dataset", Text(context, "corpus")},
                      {"ppl_tokens", window}}},
          {"measurements", measurements},
          {"benchmarks", benchmarks},
          {"combo_elapsed_s", elapsed}};
}

}  // namespace

json ModelConfigV2(const ModelFiles& files) {
  const ModelConfig config = files.config();
  json parameters = nullptr;
  if (!files.random_weights()) {
    int64_t count = 0;
    const Safetensors weights = Safetensors::Open(files.dir);
    for (const auto& [name, entry] : weights.entries()) {
      int64_t elements = 1;
      for (const int64_t size : entry.shape) elements *= size;
      count += elements;
    }
    parameters = static_cast<double>(count) / 1e9;
  }
  const KvShape first = CacheShapeOf(config, 1).layers.at(0);  // of latent attention one head of as many channels as the latent
  json facts = {{"num_params_b", parameters},
                {"num_layers", config.layers.size()},
                {"num_q_heads", config.num_heads},
                {"num_kv_heads", first.kv_heads},
                {"gqa_ratio", StrCat(config.num_heads / first.kv_heads, ":1")},
                {"head_dim", first.head_dim},
                {"max_position_embeddings", config.max_position_embeddings}};
  if (first.latent()) facts["rotary_dim"] = first.rotary_dim;
  // Which of its layers keep tokens of their own, where not all do: the cache's layers, as @layers counts them.
  if (const std::vector<int64_t> kept = config.CachedLayers(); kept.size() < config.layers.size()) facts["kv_layers"] = kept;
  return facts;
}

std::vector<std::string> WriteV2(const std::vector<std::string>& files, const std::string& dir) {
  static const std::regex kName("([^/]+)/([^/]+)/([^/]+)/([^/]+)/ctx:([0-9]+)/batch:([0-9]+).*");
  std::vector<json> documents;
  for (const std::string& path : files) {
    const std::string text = ReadFile(path);
    try {
      const json results = json::parse(text);
      std::map<Key, Combination> combinations;
      for (const json& run : results.at("benchmarks")) {
        std::smatch match;
        const std::string name = run.at("name");
        if (!std::regex_match(name, match, kName)) {
          throw InputError(path, ": '", name, "' is no benchmark of kvqbench");
        }
        if (match[6] != "1" || run.value("error_occurred", false)) continue;
        // With repetitions, the median stands for them.
        if (run.value("aggregate_name", "median") != "median") continue;
        combinations[{match[2], match[3], match[4]}][std::stoll(match[5])][match[1]] = run;
      }
      for (const auto& [key, contexts] : combinations) {
        documents.push_back(Document(results.at("context"), key, contexts));
      }
    } catch (const json::exception& error) {
      throw InputError(path, ": not a benchmarks.json of kvqbench, or cut off: ", error.what());
    } catch (const std::logic_error& error) {  // std::stoll
      throw InputError(path, ": a number in its context is none: ", error.what());
    }
  }
  std::error_code error;
  fs::create_directories(dir, error);
  std::vector<std::string> written;
  for (const json& document : documents) {
    const std::string id = document.at("experiment_id");
    const std::string path = fs::path(dir) / (id + ".json");
    WriteWhole("--to-v2", path, document.dump(2) + "\n");
    written.push_back(path);
  }
  return written;
}

}  // namespace kvq
