#include "benchmarks/options.h"

#include <algorithm>
#include <charconv>
#include <functional>
#include <numeric>
#include <sstream>

#include "fixtures/cache/presets.h"
#include "kernels/error.h"
#include "kernels/groups.h"

namespace kvq {
namespace {

std::vector<std::string> List(const std::string& flag, const std::string& text) {
  std::vector<std::string> items;
  std::istringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) {
    if (item.empty()) throw InputError(flag, ": an empty item in '", text, "'");
    items.push_back(item);
  }
  if (items.empty()) throw InputError(flag, ": wants a list, items separated by commas");
  return items;
}

std::vector<std::string> Texts(const std::vector<int64_t>& numbers) {
  std::vector<std::string> texts;
  for (const int64_t number : numbers) texts.push_back(std::to_string(number));
  return texts;
}

// A flag: its name, what --help says of it, its default as text, and what to do with a value.
struct Flag {
  std::string name, what, value;
  std::function<void(const std::string& text)> set;
};

std::vector<Flag> Flags(Options& o) {
  const auto text = [](std::string name, std::string what, std::string& target) {
    return Flag{"--" + name, std::move(what), target, [&target](const std::string& t) { target = t; }};
  };
  const auto texts = [](std::string name, std::string what, std::vector<std::string>& target) {
    return Flag{"--" + name, std::move(what), Join(target),
                [&target, name](const std::string& t) { target = List("--" + name, t); }};
  };
  const auto number = [](std::string name, std::string what, int64_t& target, int64_t least) {
    return Flag{"--" + name, std::move(what), std::to_string(target),
                [&target, name, least](const std::string& t) {
                  target = WholeNumber("--" + name, t, least);
                }};
  };
  const auto numbers = [](std::string name, std::string what, std::vector<int64_t>& target) {
    return Flag{"--" + name, std::move(what), Join(Texts(target)),
                [&target, name](const std::string& t) {
                  target.clear();
                  for (const std::string& item : List("--" + name, t)) {
                    target.push_back(WholeNumber("--" + name, item, 1));
                  }
                }};
  };
  return {
      texts("models", "catalogue names, published shapes, paths of Hugging Face directories or GGUF files, owner/name in the Hugging Face cache", o.models),
      texts("schemes", "specs: SCHEME[+SCHEME][@key=value]...", o.schemes),
      texts("backends", "who computes attention", o.backends),
      numbers("contexts", "tokens of context; the window of perplexity", o.contexts),
      numbers("batch", "sequences at a time", o.batches),
      text("corpus", "text by catalogue name", o.corpus),
      text("corpus-file", "a UTF-8 text file, or a folder of them, instead", o.corpus_file),
      number("windows", "windows of text that perplexity and sensitivity score; prompts of drift, contexts of reuse", o.windows, 1),
      number("skip-windows", "windows of perplexity and sensitivity that are left out at the text's beginning", o.skip_windows, 0),
      texts("parts", "what sensitivity encodes: all, of one layer k, v or kv, or all without-k or without-v of one layer", o.parts),
      number("stride", "tokens from window to window; 0: disjoint (decode), half a window (study)",
             o.stride, 0),
      text("protocol", "decode, or study: as the reference study measured, see below",
           o.protocol),
      text("needles", "numbers that needle hides: random, or both: the reference study's, too, as --protocol=study always does", o.needles),
      text("device", "cpu; cuda: the GPU that ctest allots, or the first; cuda:1: that one; cuda:0,1: layers over both", o.device),
      text("dtype", "float32, float16, bfloat16; auto: bfloat16 unless float32 is far faster here (CUDA: float16)", o.dtype),
      text("kv-dtype",
           "what tokens that are not encoded are stored in; auto: 16 bits unless --dtype names float32, see below",
           o.kv_dtype),
      number("seed", "of everything random", o.seed, 0),
      number("runs", "timed repetitions of prefill, decode, power, quantize, dequantize, at least", o.runs, 1),
      number("max-runs", "and at most, until the median is known to 1 % (95 % interval)", o.max_runs, 1),
      number("max-seconds", "after which no repetition more than --runs begins", o.max_seconds, 0),
      number("decode-tokens", "new tokens that decode times, and that drift writes", o.decode_tokens, 1),
      number("ruler-samples", "prompts of each of RULER's tasks", o.ruler_samples, 1),
      text("squad-file", "SQuAD's dev-v2.0.json, for ruler_qa_1", o.squad_file),
      text("hotpotqa-file", "HotpotQA's hotpot_dev_distractor_v1.json, for ruler_qa_2", o.hotpotqa_file),
      number("prefill-chunk", "tokens of a sequence that a prefill feeds at once; 0: 1024, on CUDA 8192 over the batch",
             o.prefill_chunk, 0),
      number("memory-limit", "MiB that a run may take of each GPU, or have as a process on a CPU; 0: all there is",
             o.memory_limit, 0),
      {"--memory", "that capacity plans for, of a card that is not at hand: 24GiB, 80GB, 512MiB; 0: what the device has", "0",
       [&o](const std::string& t) { o.memory = t == "0" ? 0 : MemorySize("--memory", t); }},
  };
}

// Two columns; the first is as wide as its widest entry, whatever is registered.
using Rows = std::vector<std::pair<std::string, std::string>>;
std::string Columns(const Rows& rows) {
  size_t widest = 0;
  for (const auto& [name, what] : rows) widest = std::max(widest, name.size());
  std::string text;
  for (const auto& [name, what] : rows) text += "  " + name + std::string(widest + 2 - name.size(), ' ') + what + "\n";
  return text;
}

}  // namespace

std::string Join(const std::vector<std::string>& items) {
  std::string text;
  for (const std::string& item : items) text += (text.empty() ? "" : ",") + item;
  return text;
}

int64_t WholeNumber(const std::string& flag, const std::string& text, int64_t least) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least ||
      value > 1'000'000'000) {
    throw InputError(flag, ": a whole number from ", least, " to 1000000000, not '", text, "'");
  }
  return value;
}

int64_t MemorySize(const std::string& flag, const std::string& text) {
  double number = 0;
  const char* const end = text.data() + text.size();
  const auto [unit, error] = std::from_chars(text.data(), end, number, std::chars_format::fixed);
  const std::string_view name(unit, static_cast<size_t>(end - unit));
  for (const auto& [known, bytes] : {std::pair("", 1.0), {"B", 1.0}, {"KiB", 0x1p10}, {"MiB", 0x1p20}, {"GiB", 0x1p30},
                                     {"TiB", 0x1p40}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9}, {"TB", 1e12}}) {
    if (error != std::errc() || name != known) continue;
    const double size = number * bytes;
    if (size >= 1 && size <= 0x1p50) return static_cast<int64_t>(size);
  }
  throw InputError(flag, ": a size up to 1024TiB, as 24GiB, 80GB, 512MiB or in bytes, not '", text, "'");
}

std::regex CompileRegex(const std::string& flag, const std::string& text) {
  try {
    return std::regex(text);
  } catch (const std::regex_error& error) {
    throw InputError(flag, ": '", text, "' is not a regular expression: ", error.what());
  }
}

CommandLine ParseCommandLine(const std::vector<std::string>& arguments) {
  CommandLine line;
  const std::vector<Flag> flags = Flags(line.options);
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    if (!IsUtf8(argument)) throw InputError(name, ": not UTF-8, which results could not say; rename what it names");
    const std::string value = equals == std::string::npos ? "" : argument.substr(equals + 1);
    if (argument == "--help" || argument == "-h") {
      line.help = true;
    } else if (name == "--benchmark_filter") {
      line.output.filter = value;
    } else if (name == "--benchmark_format") {
      if (value != "console" && value != "json") {
        throw InputError("--benchmark_format: console or json, not '", value, "'");
      }
      line.output.format = value;
    } else if (name == "--benchmark_out") {
      line.output.out = value;
    } else if (name == "--benchmark_out_format") {
      if (value != "json") throw InputError("--benchmark_out_format: json, not '", value, "'");
    } else if (name == "--patch") {
      if (value.empty()) throw InputError("--patch: wants a regular expression, as --patch=^needle/");
      CompileRegex(name, value);
      line.output.patch = value;
    } else if (argument == "--no-backup") {
      line.output.backup = false;
    } else if (name == "--summary-file") {
      if (value.empty()) throw InputError("--summary-file: wants a file, as --summary-file=FILE");
      line.output.summary_file = value;
    } else if (name == "--to-v2") {
      if (value.empty()) throw InputError("--to-v2: wants a folder, as --to-v2=DIR");
      line.output.to_v2 = value;
    } else if (name == "--vram-diag") {
      line.options.vram_diag = value != "false" && value != "0";
    } else if (name == "--presets") {
      if (value.empty()) throw InputError("--presets: wants a file, as --presets=FILE.json");
      AddPresets(value);
    } else if (name == "--check-capacity") {
      if (equals != std::string::npos && value != "true" && value != "false") {
        throw InputError("--check-capacity: true or false, not '", value, "'");
      }
      line.options.check_capacity = value != "false";
    } else if (name == "--list-presets") {
      line.output.list_presets = value != "false" && value != "0";
    } else if (name == "--list-devices") {
      line.output.list_devices = value != "false" && value != "0";
    } else if (name == "--benchmark_list_tests") {
      line.output.list_tests = value != "false" && value != "0";
    } else if (!line.output.to_v2.empty() && argument.rfind("-", 0) != 0) {
      line.output.files.push_back(argument);
    } else if (name.rfind("--benchmark_", 0) == 0 || name == "--v") {
      line.rest.push_back(argument);
    } else {
      bool known = false;
      for (const Flag& flag : flags) {
        if (flag.name != name) continue;
        known = true;
        if (equals != std::string::npos) {
          flag.set(value);
        } else if (i + 1 < arguments.size()) {
          flag.set(arguments[++i]);
        } else {
          throw InputError(name, ": wants a value");
        }
      }
      if (!known) throw InputError(name, ": no such flag; --help lists them");
    }
  }
  if (!line.output.to_v2.empty() && line.output.files.empty()) {
    throw InputError("--to-v2: wants the results to convert behind it, as --to-v2=DIR FILE.json...");
  }
  if (line.options.vram_diag && line.options.device == "cpu") {
    throw InputError("--vram-diag: lists a GPU's memory; wants --device=cuda");
  }
  if (!line.output.patch.empty() && line.output.out.empty()) {
    throw InputError("--patch: wants the results to patch, as --benchmark_out=FILE");
  }
  if (!line.output.backup && line.output.patch.empty()) {
    throw InputError("--no-backup: is for --patch, which otherwise keeps FILE.bak");
  }
  for (const std::string& part : line.options.parts) {
    if (const auto& known = {"all", "k", "v", "kv", "without-k", "without-v"};
        std::find(known.begin(), known.end(), part) == known.end()) {
      throw InputError("--parts: of all, k, v, kv, without-k, without-v, not '", part, "'");
    }
  }
  if (line.options.protocol != "decode" && line.options.protocol != "study") {
    throw InputError("--protocol: decode or study, not '", line.options.protocol, "'");
  }
  if (line.options.needles != "random" && line.options.needles != "both") {
    throw InputError("--needles: random or both, not '", line.options.needles, "'");
  }
  return line;
}

// What a side of a scheme groups, and which shapes it takes.
static std::string SideText(const Codec& codec) {
  if (codec.encode == nullptr) return "as they are";
  std::string text = codec.grouping;
  if (codec.groups.size() > 1) text += StrCat(" (@group: ", GroupsText(codec.groups), ")");
  if (!codec.head_dims.empty()) return StrCat(text, ", head_dim ", GroupsText(codec.head_dims));
  return StrCat(text, ", head_dim a multiple of ", std::lcm(codec.head_dim_multiple, std::max<int64_t>(codec.default_group, 1)));
}

std::string HelpText() {
  Options defaults;
  std::ostringstream help;
  help << "kvqbench measures what storing the KV cache in fewer bits costs and buys.\n\n"
          "usage: kvqbench [--benchmark_filter=REGEX] [flags]    (of a flag given twice, the last counts)\n\n"
          "Each benchmark is named MEASUREMENT/MODEL/BACKEND/SPEC/ctx:N/batch:B; the filter picks "
          "among them.\n\nflags (default)\n";
  Rows rows;
  for (const Flag& flag : Flags(defaults)) {
    rows.emplace_back(flag.name, flag.what + (flag.value.empty() ? "" : " (" + flag.value + ")"));
  }
  rows.emplace_back("--list-devices", "lists what --device can name, and ends");
  rows.emplace_back("--presets=FILE", "JSON, {\"NAME\": \"SPEC\"}: names of your own that --schemes can use, as those of ci/plan");
  rows.emplace_back("--list-presets", "lists what engines store and --schemes can name, with its bits per element for the first of --models, and ends");
  rows.emplace_back("--vram-diag", "memory lists the largest live blocks of GPU memory on stderr");
  rows.emplace_back("--check-capacity", "capacity runs the limits that it has found, and 2 % more: prompts as long as those");
  help << Columns(rows)
       << "  --benchmark_filter=REGEX, --benchmark_format=console|json, --benchmark_out=FILE.json,\n"
          "  --benchmark_list_tests, and the others of Google Benchmark\n"
          "  --patch=REGEX             measures only the matching benchmarks of FILE.json again, see below\n"
          "  --no-backup               without the copy FILE.json.bak that --patch makes\n"
          "  --summary-file=FILE       what was done, failed and skipped, and why, as plain text\n"
          "  --to-v2=DIR FILE.json...  measures nothing; converts results to the reference study's schema 2.0"
          "\n\nmeasurements\n";
  rows.clear();
  for (const Measurement& measurement : Measurements()) rows.emplace_back(measurement.name, measurement.what);
  help << Columns(rows) << "\n--protocol=study: what the reference study did (defects included; accuracy/README.md)\n";
  rows.clear();
  for (const Measurement& measurement : Measurements()) {
    if (!measurement.study.empty()) rows.emplace_back(measurement.name, measurement.study);
  }
  help << Columns(rows) << "  the others do the same under both; @policy=hf makes a spec encode as its library did\n";
  help << "\n--kv-dtype=auto: dense tokens (the newest, the sinks, all of `none`) are stored in what --dtype names. With\n"
          "  --dtype=auto, on CUDA in what it computes in; on a CPU, whatever that computes in, in the model's own type (of\n"
          "  config.json, else of its tensors) if it has 16 bits, in bfloat16 for a model in float32, in float16 for a\n"
          "  published shape. So kv_bytes and bits_per_element are the same on every machine\n";
  rows.clear();
  for (const PublishedShape& shape : PublishedShapes()) rows.emplace_back(shape.name, shape.source);
  help << "\nmodels on random weights, by their published shapes\n" << Columns(rows) << "\nschemes\n";
  rows.clear();
  for (const Scheme& scheme : Schemes()) {
    rows.emplace_back(scheme.name, !scheme.refused.empty() ? "refused: " + scheme.refused
                                   : scheme.stores_dense() ? "nothing encoded: all tokens as --kv-dtype says"
                                   : SideText(scheme.keys) == SideText(scheme.values)
                                       ? SideText(scheme.keys)
                                       : StrCat("keys: ", SideText(scheme.keys), "; values: ", SideText(scheme.values)));
  }
  help << Columns(rows)
       << "  keys of a spec: @group=N @residual=N[+N] (128: of keys and values; 0: each token is encoded as it comes)\n"
          "  @sinks=N (0) @policy=append|kivi|hf (append) @prefill=stored|raw (stored: what a prompt's attention reads)\n"
          "  @rotate=R[+R] (none; hadamard[:BLOCK], signs[:BLOCK]) @dense=N[+N] (0: first and last layers not encoded)\n"
          "  @layers=FIRST-LAST:SCHEME[+SCHEME]\n"
          "  @window-cache=full|window (full; window: layers with a sliding window keep what later queries see)\n\nbackends\n";
  rows.clear();
  for (const Backend& backend : Backends()) rows.emplace_back(backend.name, backend.what);
  help << Columns(rows)
       << "\nlong runs\n"
          "  FILE.json is complete after every benchmark: whatever ends a run, the same command goes on. What FILE has\n"
          "  is not measured again, only what failed. Other benchmarks may be added (models, schemes, backends,\n"
          "  contexts, batch, filter); but whatever else the context of FILE says must be the same: build, commit,\n"
          "  models and text by sha256, seed, protocol, runs, windows, device, libraries, threads, ... Otherwise\n"
          "  the run is refused. Free are date, host, paths, load, clocks, caches, probed rates.\n"
          "  --patch wants the flags FILE was made with; the build may be another. The other entries stay as they are,\n"
          "  byte for byte. Interrupted, the same --patch goes on. Runs that took up or patched FILE stand in its \"history\".\n"
          "  Single items of drift, reuse and ruler_* stand in FILE.json.samples.jsonl and follow their cells; ci/paired compares them\n"
          "\nexit code: 0 measured, 1 a benchmark failed, 2 bad input\n";
  return help.str();
}

}  // namespace kvq
