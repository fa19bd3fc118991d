#include "accuracy/server/flags.h"

#include <map>
#include <utility>

#include "benchmarks/options.h"
#include "fixtures/dataset.h"
#include "kernels/error.h"

namespace kvq {

const char kServerHelp[] =
    "kvqserve serves a model over a quantized KV cache as OpenAI's API does, in the shapes of vLLM.\n\n"
    "usage: kvqserve [flags]\n\n"
    "flags (default)\n"
    "  --model=NAME      as kvqbench's --models: a catalogue's name, a Hugging Face directory, a GGUF file (smollm2-135m)\n"
    "  --spec=SPEC       how the cache is stored: a spec or a preset, as one of kvqbench's --schemes (none)\n"
    "  --backend=NAME    who computes attention (sdpa)\n"
    "  --device=DEVICE   cpu, cuda, cuda:1, cuda:0,1 (cpu)\n"
    "  --dtype=TYPE      float32, float16, bfloat16; auto: bfloat16 unless float32 is far faster here (auto)\n"
    "  --kv-dtype=TYPE   what tokens that are not encoded are stored in (auto)\n"
    "  --context=N       tokens of prompt and answer together, for which the cache has room (the model's, at most 8192)\n"
    "  --host=ADDRESS    where to listen; others than this machine reach it only if you say so (127.0.0.1)\n"
    "  --port=N          0: a free one (8000)\n"
    "  --parallel=N      requests that are answered side by side, each with a cache of its own; the answers are the same (1)\n"
    "  --queue=N         requests that may wait; one more is refused with 503 (64)\n"
    "  --body-mib=N      MiB that a request may have; a larger one is refused with 413 (8)\n"
    "  --no-reuse        reads every prompt anew, also what it has in common with the one before; the answers are the same\n\n"
    "POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize; GET /v1/models, /health, /tokenizer_info\n\n"
    "exit code: 0 ended by SIGINT or SIGTERM, 2 bad input\n";

Flags ParseFlags(const std::vector<std::string>& arguments) {
  Flags flags;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    if (argument == "--help" || argument == "-h") {
      flags.help = true;
      continue;
    }
    if (argument == "--no-reuse") {
      flags.reuse = false;
      continue;
    }
    const std::map<std::string, std::string*> texts = {{"--model", &flags.model}, {"--spec", &flags.spec}, {"--backend", &flags.backend},
        {"--device", &flags.device}, {"--dtype", &flags.dtype}, {"--kv-dtype", &flags.kv_dtype}, {"--host", &flags.host}};
    const std::map<std::string, std::pair<int64_t*, int64_t>> numbers = {{"--context", {&flags.context, 2}}, {"--port", {&flags.port, 0}},
        {"--parallel", {&flags.parallel, 1}}, {"--queue", {&flags.queue, 1}}, {"--body-mib", {&flags.body_mib, 1}}};
    const auto text = texts.find(name);
    const auto number = numbers.find(name);
    if (text == texts.end() && number == numbers.end()) throw InputError(name, ": no such flag; --help lists them");
    if (equals == std::string::npos && i + 1 == arguments.size()) throw InputError(name, ": wants a value");
    const std::string value = equals == std::string::npos ? arguments[++i] : argument.substr(equals + 1);
    if (!IsUtf8(value)) throw InputError(name, ": not UTF-8, which answers could not say");
    if (text != texts.end()) {
      if (value.empty()) throw InputError(name, ": wants a value");
      *text->second = value;
    } else {
      *number->second.first = WholeNumber(name, value, number->second.second);
    }
  }
  if (flags.port > 65535) throw InputError("--port: a whole number from 0 to 65535, not '", flags.port, "'");
  if (flags.parallel > 256) throw InputError("--parallel: at most 256, since each has a cache; not '", flags.parallel, "'");
  if (flags.queue > 4096) throw InputError("--queue: at most 4096, since each waiting request has a thread; not '", flags.queue, "'");
  if (flags.body_mib > 1024) throw InputError("--body-mib: at most 1024, not '", flags.body_mib, "'");
  return flags;
}

}  // namespace kvq
