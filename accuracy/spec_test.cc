// The grammar of specs, presets, and what is refused.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "fixtures/cache/presets.h"
#include "fixtures/cache/spec.h"
#include "kernels/error.h"

namespace kvq {
namespace {

TEST(Spec, ParsesEveryPart) {
  const Spec spec = ParseSpec("int2-hqq-kivi+int4-hqq@group=32@residual=64@sinks=4@layers=0-1:none");
  EXPECT_EQ(spec.schemes.keys->name, "int2-hqq-kivi");
  EXPECT_EQ(spec.schemes.values->name, "int4-hqq");
  EXPECT_EQ(spec.group_size, 32);
  EXPECT_EQ(spec.keys.residual_length, 64);
  EXPECT_EQ(spec.values.residual_length, 64);
  EXPECT_EQ(spec.sink_tokens, 4);
  EXPECT_EQ(spec.policy, Policy::kAppend);
  EXPECT_TRUE(spec.At(1, 4).keys->stores_dense());
  EXPECT_EQ(spec.At(2, 4).keys->name, "int2-hqq-kivi");
  EXPECT_EQ(ParseSpec("int4-hqq@policy=hf").policy, Policy::kHf);
  EXPECT_TRUE(ParseSpec("int4-hqq@policy=hf").raw_prefill);
  EXPECT_EQ(ParseSpec("int4-hqq@policy=kivi").policy, Policy::kKivi);
  EXPECT_TRUE(ParseSpec("int4-hqq@policy=kivi").raw_prefill);
  EXPECT_EQ(ParseSpec("int4-hqq").keys.residual_length, 128);
  EXPECT_FALSE(ParseSpec("int4-hqq").raw_prefill);
  EXPECT_TRUE(ParseSpec("int4-hqq@prefill=raw").raw_prefill);
  const Spec apart = ParseSpec("int2-hqq-kivi+int4-hqq@residual=128+0@rotate=hadamard+signs:32@dense=2+1");
  EXPECT_EQ(apart.keys.residual_length, 128);
  EXPECT_EQ(apart.values.residual_length, 0);
  EXPECT_EQ(apart.keys.rotation, (Rotation{Rotation::kHadamard, 0}));
  EXPECT_EQ(apart.values.rotation, (Rotation{Rotation::kSigns, 32}));
  std::string dense;
  for (int64_t layer = 0; layer < 6; ++layer) dense += apart.At(layer, 6).keys->stores_dense() ? '1' : '0';
  EXPECT_EQ(dense, "110001");
  const Spec both = ParseSpec("int4-hqq@rotate=hadamard:64@dense=2");
  EXPECT_EQ(both.values.rotation, (Rotation{Rotation::kHadamard, 64}));
  EXPECT_EQ(both.keys.rotation, both.values.rotation);
  EXPECT_EQ(both.dense_first, 2);
  EXPECT_EQ(both.dense_last, 2);
  EXPECT_FALSE(ParseSpec("int4-hqq@rotate=none").keys.rotation);
  // Calls in which every token reads what it would when decoding.
  for (const auto& [text, tokens] : std::vector<std::pair<const char*, int64_t>>{
           {"int4-hqq", 128}, {"int4-hqq@residual=0", 128}, {"int4-hqq@residual=64+0", 64}, {"int4-hqq@residual=96+64", 32},
           {"int4-hqq@policy=kivi", 8}, {"int4-hqq@policy=kivi@residual=4", 4}, {"int4-hqq@policy=hf", 128}}) {
    EXPECT_EQ(ParseSpec(text).CallTokens(), tokens) << text;
  }
  EXPECT_TRUE(ParseSpec("none").stores_dense());
  EXPECT_FALSE(ParseSpec("none+int4-hqq").stores_dense());
}

// A preset's name means its spec, and results say both; a name that is a scheme's, too, only when it stands alone.
TEST(Spec, PresetsMeanTheirSpecs) {
  std::set<std::string> names;
  for (const Preset& preset : Presets()) {
    SCOPED_TRACE(preset.name);
    EXPECT_TRUE(names.insert(preset.name).second);
    const Spec spec = ParseSpec(preset.name), plain = ParseSpec(StrCat(preset.spec, "@sinks=0"));
    EXPECT_EQ(spec.text, preset.name);
    EXPECT_EQ(spec.meaning, preset.spec);
    EXPECT_EQ(spec.schemes.keys, plain.schemes.keys);
    EXPECT_EQ(spec.schemes.values, plain.schemes.values);
    EXPECT_EQ(spec.keys, plain.keys);
    EXPECT_EQ(spec.values, plain.values);
    EXPECT_EQ(spec.policy, plain.policy);
  }
  EXPECT_EQ(ParseSpec("llamacpp-q4_0@sinks=4").sink_tokens, 4);
  EXPECT_EQ(ParseSpec("llamacpp-q4_0@sinks=4").keys.rotation.kind, Rotation::kHadamard);
  EXPECT_THROW(ParseSpec("llamacpp-q4_0@residual=4"), InputError) << "it says that already";
  // ik_llama.cpp turns what -khad and -vhad name, and nothing by itself.
  for (const auto& [name, keys, values] : {std::tuple("ik-llamacpp-q6_0", Rotation::kNone, Rotation::kNone),
                                           std::tuple("ik-llamacpp-q6_0-khad", Rotation::kHadamard, Rotation::kNone),
                                           std::tuple("ik-llamacpp-q6_0-khad-vhad", Rotation::kHadamard, Rotation::kHadamard)}) {
    EXPECT_EQ(ParseSpec(name).keys.rotation, (Rotation{keys, 0})) << name;
    EXPECT_EQ(ParseSpec(name).values.rotation, (Rotation{values, 0})) << name;
  }
  // Every token is encoded as it comes, and read as it is stored by its own prompt, too.
  for (const char* name : {"ik-llamacpp-q8_kv", "ik-llamacpp-q8_0-q6_0", "exllamav3-8", "exllamav3-5-4", "exllamav3-2"}) {
    const Spec spec = ParseSpec(name);
    EXPECT_EQ(spec.keys.residual_length, 0) << name;
    EXPECT_FALSE(spec.raw_prefill) << name;
  }
  EXPECT_EQ(ParseSpec("exllamav3-5-4").schemes.keys->name, "exl3-5");
  EXPECT_EQ(ParseSpec("exllamav3-5-4").schemes.values->name, "exl3-4");
  EXPECT_EQ(ParseSpec("ik-llamacpp-q8_kv").schemes.values->name, "none");
  EXPECT_EQ(ParseSpec("kivi-2").policy, Policy::kKivi);
  EXPECT_EQ(ParseSpec("kivi-2@residual=64").policy, Policy::kAppend);
  EXPECT_EQ(ParseSpec("q4_0").meaning, "");
}

TEST(Spec, NamesOfTheUsersMeanTheirSpecs) {
  const std::string file = testing::TempDir() + "/presets.json";
  const auto add = [&](const std::string& text) -> std::string {
    std::ofstream(file) << text;
    try {
      AddPresets(file);
    } catch (const InputError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(add(R"({"mine-4.5": "q8_0+q4_0@residual=0@layers=0-1:none", "mine_2": "none+q4_0"})"), "");
  EXPECT_EQ(ParseSpec("mine-4.5").meaning, "q8_0+q4_0@residual=0@layers=0-1:none");
  EXPECT_EQ(ParseSpec("mine-4.5@sinks=4").sink_tokens, 4);
  EXPECT_EQ(add(R"({"mine-4.5": "q8_0+q4_0@residual=0@layers=0-1:none"})"), "") << "the same again";
  EXPECT_NE(add(R"({"mine-4.5": "q8_0"})").find("'mine-4.5' has a meaning already"), std::string::npos);
  EXPECT_NE(add(R"({"q4_0": "q8_0"})").find("a scheme's"), std::string::npos);
  EXPECT_NE(add(R"({"kivi-2": "q8_0"})").find("has a meaning already"), std::string::npos);
  EXPECT_NE(add(R"({"a/b": "q8_0"})").find("not 'a/b'"), std::string::npos);
  EXPECT_NE(add(R"({"a": "q9_0"})").find("q9_0"), std::string::npos);
  EXPECT_NE(add(R"({"a": "llamacpp-q4_0"})").find("of another preset"), std::string::npos);
  EXPECT_NE(add(R"({"a": 4})").find("wants a spec as text"), std::string::npos);
  EXPECT_NE(add("[").find("is not a JSON object"), std::string::npos);
  std::filesystem::remove(file);
  EXPECT_NE(add("").find("is not a JSON object"), std::string::npos);
  EXPECT_THROW(AddPresets(file + ".none"), InputError);
}

TEST(Spec, RefusesWithTheReason) {
  const auto message = [](const std::string& spec) {
    try {
      ParseSpec(spec);
    } catch (const InputError& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_NE(message("").find("empty"), std::string::npos);
  EXPECT_NE(message("int5-hqq").find("int4-hqq"), std::string::npos) << "lists the known ones";
  EXPECT_NE(message("int8-quanto").find("2 and 4 bits"), std::string::npos);
  EXPECT_NE(message("int4-quanto-kivi").find("axis"), std::string::npos);
  EXPECT_NE(message("int4-hqq@").find("@key=value"), std::string::npos);
  EXPECT_NE(message("int4-hqq@residual").find("@key=value"), std::string::npos);
  EXPECT_NE(message("int4-hqq@residual=-1").find("whole number"), std::string::npos);
  EXPECT_NE(message("int4-hqq@residual=1x").find("whole number"), std::string::npos);
  EXPECT_NE(message("int4-hqq@bits=4").find("no key"), std::string::npos);
  EXPECT_NE(message("int4-hqq@policy=lazy").find("append, kivi or hf"), std::string::npos);
  for (const auto& [spec, why] : std::vector<std::pair<const char*, const char*>>{
           {"int4-hqq@residual=1+", "whole number"},
           {"int4-hqq@residual=+1", "whole number"},
           {"int4-hqq@residual=1+2+3", "whole number"},
           {"int4-hqq-kivi@residual=0+32", "residual must be at least"},
           {"int4-hqq@policy=kivi@sinks=4", "policy kivi knows no sink tokens"},
           {"int4-hqq@policy=kivi@residual=0", "at least 1 token"},
           {"int4-hqq@policy=kivi@residual=64+0", "at least 1 token"},
           {"int4-hqq@policy=kivi@prefill=stored", "leave out @prefill"},
           {"int4-hqq@policy=hf@prefill=stored", "leave out @prefill"},
           {"int4-hqq@policy=hf@residual=64+32", "one residual"},
           {"int4-hqq@prefill=dense", "stored or raw"},
           {"int4-hqq@rotate=turn", "hadamard:BLOCK"},
           {"int4-hqq@rotate=none:64", "hadamard:BLOCK"},
           {"int4-hqq@rotate=hadamard:48", "power of two"},
           {"int4-hqq@rotate=hadamard:0", "power of two"},
           {"int4-hqq@rotate=hadamard:", "whole number"},
           {"int4-hqq@dense=two", "whole number"},
           {"none@rotate=hadamard", "@rotate means nothing"},
           {"none@dense=1", "@dense means nothing"},
           {"none@prefill=raw", "@prefill means nothing"},
           {"int4-hqq@dense=1@dense=1", "given twice"}}) {
    EXPECT_NE(message(spec).find(why), std::string::npos) << spec << ": " << message(spec);
    EXPECT_EQ(message(spec).find('\n'), std::string::npos) << spec;
  }
  EXPECT_NE(message("int4-hqq@policy=hf@sinks=4").find("sink"), std::string::npos);
  EXPECT_NE(message("int4-hqq-kivi@residual=0").find("residual"), std::string::npos);
  EXPECT_NE(message("none@group=32").find("nothing is encoded"), std::string::npos);
  EXPECT_NE(message("int4-hqq@layers=3-1:none").find("ends before"), std::string::npos);
  EXPECT_NE(message("int4-hqq@layers=3").find("FIRST-LAST"), std::string::npos);
  for (const char* key : {"residual=16", "group=32", "sinks=4", "policy=hf"}) {
    const std::string once = StrCat("@", key);
    EXPECT_NE(message("int4-hqq" + once + once).find(once.substr(0, once.find('=')) + " is given twice"), std::string::npos) << key;
  }
  EXPECT_NE(message("int4-hqq@layers=0-3:none@layers=3-5:int8-hqq").find("layer 3 is given twice"), std::string::npos);
  EXPECT_EQ(ParseSpec("int4-hqq@layers=0-2:none@layers=3-5:int8-hqq").layers.size(), 2u);
  EXPECT_NE(message("int4-hqq+").find("scheme"), std::string::npos);
  EXPECT_NE(message("a/b").find("slash"), std::string::npos);
  EXPECT_THROW(CheckSpec(ParseSpec("int4-hqq"), CacheShape::Uniform(2, 1, 3, 80)), InputError);
  EXPECT_THROW(CheckSpec(ParseSpec("int4-hqq@layers=2-2:none"), CacheShape::Uniform(2, 1, 3, 64)), InputError);
  EXPECT_NO_THROW(CheckSpec(ParseSpec("none"), CacheShape::Uniform(2, 1, 3, 80)));
  EXPECT_NO_THROW(CheckSpec(ParseSpec("int4-hqq@dense=1"), CacheShape::Uniform(3, 1, 3, 64)));
  EXPECT_THROW(CheckSpec(ParseSpec("int4-hqq@dense=1"), CacheShape::Uniform(2, 1, 3, 64)), InputError);
  EXPECT_THROW(CheckSpec(ParseSpec("int4-hqq@dense=1+0@layers=0-0:int8-hqq"), CacheShape::Uniform(3, 1, 3, 64)), InputError);
  EXPECT_THROW(CheckSpec(ParseSpec("int4-hqq@dense=1@layers=1-2:int8-hqq"), CacheShape::Uniform(3, 1, 3, 64)), InputError);
  EXPECT_THROW(CheckSpec(ParseSpec("int4-hqq@group=32@rotate=hadamard:64"), CacheShape::Uniform(2, 1, 3, 96)), InputError);
  EXPECT_THROW(CheckSpec(ParseSpec("int4-hqq@rotate=signs"), CacheShape::Uniform(2, 1, 3, 1024)), InputError);
}

}  // namespace
}  // namespace kvq
