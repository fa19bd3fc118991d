// Specs of parts of a cache, and the profile that `sensitivity` draws, number by number: against
// attention and logits of runs under those specs.
#include "accuracy/sensitivity.h"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "accuracy/error_sum.h"
#include "accuracy/text_windows.h"
#include "accuracy/tiny_model.h"
#include "kernels/error.h"

namespace kvq {
namespace {

TEST(Sensitivity, PartsOfSpecsAreSpecs) {
  const auto part = [](const std::string& text, int64_t first, int64_t last, bool keys,
                       bool values) {
    const std::string result = PartOfSpec(ParseSpec(text), CacheShape::Uniform(4, 1, 2, 128), [&](int64_t layer, bool of_values) {
      return first <= layer && layer <= last && (of_values ? values : keys);
    });
    if (!result.empty()) EXPECT_FALSE(ParseSpec(result).stores_dense()) << result;
    return result;
  };
  EXPECT_EQ(part("int4-hqq", 2, 2, true, false), "none@layers=2-2:int4-hqq+none");
  EXPECT_EQ(part("int4-hqq", 2, 2, false, true), "none@layers=2-2:none+int4-hqq");
  EXPECT_EQ(part("int4-hqq", 0, 1, true, true),
            "none@layers=0-0:int4-hqq+int4-hqq@layers=1-1:int4-hqq+int4-hqq");
  EXPECT_EQ(part("int2-hqq+int8-hqq@group=32@residual=64@sinks=4", 3, 3, true, true),
            "none@group=32@residual=64@sinks=4@layers=3-3:int2-hqq+int8-hqq");
  EXPECT_EQ(part("int4-hqq@layers=0-1:none+int8-hqq@policy=hf", 0, 2, true, true),
            "none@policy=hf@layers=0-0:none+int8-hqq@layers=1-1:none+int8-hqq@layers=2-2:int4-hqq+"
            "int4-hqq");
  EXPECT_EQ(part("int4-hqq@layers=0-1:none+int8-hqq", 0, 1, true, false), "")
      << "nothing would be encoded";
  EXPECT_EQ(part("none+int4-hqq@group=32", 1, 1, true, false), "");
  EXPECT_EQ(part("int4-hqq@dense=1@residual=64+0", 0, 3, true, true),
            "none@residual=64+0@layers=1-1:int4-hqq+int4-hqq@layers=2-2:int4-hqq+int4-hqq");
  // Of a preset, what it means.
  EXPECT_EQ(part("llamacpp-q8_0-q4_0", 3, 3, true, true),
            "none@residual=0@rotate=hadamard+hadamard:64@layers=3-3:q8_0+q4_0");
  const auto all_but_one = [](int64_t layer, bool values) { return layer != 1 || values; };
  EXPECT_EQ(PartOfSpec(ParseSpec("int4-hqq@sinks=4"), CacheShape::Uniform(2, 1, 2, 128), all_but_one),
            "none@sinks=4@layers=0-0:int4-hqq+int4-hqq@layers=1-1:none+int4-hqq");
  // Of latents, whose rotary keys a spec encodes only where it says so.
  const CacheShape latents{1, {{1, 512, 64}, {1, 512, 64}}};
  EXPECT_EQ(PartOfSpec(ParseSpec("int4-hqq@sinks=4"), latents, all_but_one), "none@sinks=4@layers=0-0:int4-hqq+none");
  EXPECT_EQ(PartOfSpec(ParseSpec("int4-hqq+int8-hqq"), latents, all_but_one),
            "none@layers=0-0:int4-hqq+int8-hqq@layers=1-1:none+int8-hqq");
}

class SensitivityOfTinyModel : public TinyModel {};

// Each number of the profile against runs under the spec of that layer and part: the same attention
// outputs, bit for bit, whose inputs nothing has touched, and perplexity's own kld.
TEST_F(SensitivityOfTinyModel, EqualsRunsOfItsSpecs) {
  const c10::InferenceMode guard;
  WidenHeads(dir_ / "tiny");
  const std::string spec = "int2-hqq@residual=16@sinks=2";
  const std::string part = "none@residual=16@sinks=2@layers=1-1:int2-hqq+none";
  const std::string arguments =
      Tiny() + " --contexts=64 --windows=3 --batch=2 --dtype=float32 --benchmark_format=json";
  const Outcome outcome = Execute(arguments + " --schemes=" + spec +
                                  ",int2-hqq@residual=16@layers=0-0:none,int4-hqq "
                                  "--benchmark_filter=sensitivity");
  ASSERT_EQ(outcome.code, 0) << outcome.err;
  const auto runs = ByName(outcome.out);
  const auto& run = runs.at("sensitivity/tiny/sdpa/" + spec + "/ctx:64/batch:2");

  Options options{.models = {(dir_ / "tiny").string()},
                  .corpus_file = (dir_ / "text.txt").string(),
                  .windows = 3,
                  .dtype = "float32"};
  Session session(options);
  const Cell cell{options.models[0], "sdpa", spec, 64, 2};
  const Work work = WorkOf(session, cell);
  for (int64_t layer = 0; layer < 2; ++layer) {
    for (const auto& [name, keys, values] :
         {std::tuple("k", true, false), std::tuple("v", false, true),
          std::tuple("kv", true, true)}) {
      const auto attended = [&, keys = keys, values = values](const at::Tensor& ids,
                                                              const std::string& text) {
        KvCache cache(ParseSpec(text), work.model.cache_shape(ids.size(0)), 64, at::kFloat,
                      at::kCPU);
        std::vector<at::Tensor> calls;
        FeedAsDecoding(
            work.model, work.backend, ParseSpec(spec), ids, cache,
            [](int64_t, const at::Tensor&) {},
            [&](const LayerView& view) {
              if (view.cached_layer == layer) calls.push_back(view.attended.clone());
            });
        // The first call reads 2 sinks and 16 tokens as they are.
        return at::cat(calls, 2).narrow(2, 18, 64 - 18);
      };
      ErrorSum error;
      for (const std::vector<Window>& group : SideBySide(WindowsOf(work, cell, options), 2)) {
        const at::Tensor ids = WindowIds(work, group);
        const std::string encoded = PartOfSpec(ParseSpec(spec), CacheShape::Uniform(2, 1, 2, 64), [&, layer = layer, keys = keys, values = values](
                                                                       int64_t at, bool of_values) {
          return at == layer && (of_values ? values : keys);
        });
        error.Add(ErrorSum::Of(attended(ids, "none"), attended(ids, encoded)));
      }
      const double nmse = run[StrCat("attention_nmse_", name, "/layer:", layer)];
      EXPECT_GT(nmse, 1e-4);
      EXPECT_NEAR(nmse, error.nmse(), 1e-12 * nmse);  // sums of float64 in another order
    }
  }
  const auto perplexity =
      ByName(Execute(arguments + " --schemes=" + part + " --benchmark_filter=perplexity").out);
  const auto& of_part = perplexity.at("perplexity/tiny/sdpa/" + part + "/ctx:64/batch:2");
  // Its reference comes from one call: float32 sums in another order, as in kld_floor_nats.
  EXPECT_NEAR(run["kld_nats_k/layer:1"].get<double>(), of_part["kld_nats"].get<double>(), 1e-6);
  EXPECT_NEAR(run["top1_agreement_k/layer:1"].get<double>(),
              of_part["top1_agreement"].get<double>(), 1e-12);
  EXPECT_GT(run["kld_nats_k/layer:1"].get<double>(), 1e-5);
  EXPECT_LT(run["kld_nats_k_lo/layer:1"].get<double>(), run["kld_nats_k/layer:1"].get<double>());
  EXPECT_GT(run["logits_nmse_v/layer:0"].get<double>(), 1e-6);
  EXPECT_EQ(
      run["kld_nats_v_max"].get<double>(),
      run[StrCat("kld_nats_v/layer:", run["most_sensitive_layer_v"].get<int>())].get<double>());
  EXPECT_EQ(run["windows"], 3);

  const auto& half =
      runs.at("sensitivity/tiny/sdpa/int2-hqq@residual=16@layers=0-0:none/ctx:64/batch:2");
  EXPECT_FALSE(half.contains("kld_nats_k/layer:0")) << "nothing is encoded there";
  EXPECT_TRUE(half.contains("kld_nats_k/layer:1"));
  EXPECT_NE(runs.at("sensitivity/tiny/sdpa/int4-hqq/ctx:64/batch:2")["error_message"]
                .get<std::string>()
                .find("nothing is encoded"),
            std::string::npos)
      << "128 tokens of residual";

  // All of it, and all but one side of a layer: what perplexity says of the same.
  const auto whole = ByName(Execute(arguments + " --schemes=" + spec + " --parts=all,k,v,without-k,without-v "
                                    "--benchmark_filter=sensitivity").out)
                         .at("sensitivity/tiny/sdpa/" + spec + "/ctx:64/batch:2");
  const std::string without = "none@residual=16@sinks=2@layers=0-0:int2-hqq+int2-hqq@layers=1-1:int2-hqq+none";
  const auto others = ByName(Execute(arguments + " --schemes=" + spec + "," + without + " --benchmark_filter=perplexity").out);
  const double all = whole["kld_nats_all"];
  EXPECT_NEAR(all, others.at("perplexity/tiny/sdpa/" + spec + "/ctx:64/batch:2")["kld_nats"].get<double>(), 1e-6);
  EXPECT_NEAR(whole["kld_nats_without_v/layer:1"].get<double>(),
              others.at("perplexity/tiny/sdpa/" + without + "/ctx:64/batch:2")["kld_nats"].get<double>(), 1e-6);
  EXPECT_GT(std::abs(whole["kld_nats_without_v/layer:1"].get<double>() - all), 1e-5);
  double sum = 0;
  for (const char* side : {"k", "v"}) {
    for (const int layer : {0, 1}) sum += whole[StrCat("kld_nats_", side, "/layer:", layer)].get<double>();
  }
  EXPECT_NEAR(whole["interaction"].get<double>(), all / sum, 1e-12);
  EXPECT_FALSE(whole.contains("kld_nats_kv_mean"));
  EXPECT_EQ(whole["kld_nats_k/layer:1"], run["kld_nats_k/layer:1"]);
  const Outcome wrong = Execute(arguments + " --schemes=int4-hqq --parts=k,w --benchmark_filter=sensitivity");
  EXPECT_EQ(wrong.code, 2);
  EXPECT_NE(wrong.err.find("--parts: of all, k, v, kv, without-k, without-v, not 'w'"), std::string::npos) << wrong.err;

  // Other windows of the same text: none is scored twice.
  const auto ppl = [&](const std::string& flags) {
    return ByName(Execute(arguments + " --schemes=none --benchmark_filter=perplexity " + flags).out)
        .at("perplexity/tiny/sdpa/none/ctx:64/batch:2")["ppl"].get<double>();
  };
  EXPECT_NEAR(std::log(ppl("--windows=2")),
              (std::log(ppl("--windows=1")) + std::log(ppl("--windows=1 --skip-windows=1"))) / 2, 1e-9);
  EXPECT_NE(Execute(arguments + " --schemes=none --benchmark_filter=perplexity --skip-windows=100000").out.find(
                "--skip-windows leaves out"), std::string::npos);

  const std::string list = Tiny() + " --schemes=none --contexts=32 --benchmark_list_tests";
  EXPECT_EQ(Execute(list).out.find("sensitivity"), std::string::npos)
      << "it costs too much to run unasked";
  EXPECT_NE(Execute(list + " --benchmark_filter='error|sensitivity'").out.find("sensitivity"),
            std::string::npos);
}

}  // namespace
}  // namespace kvq
