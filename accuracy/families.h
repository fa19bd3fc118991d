// The model families as data: what accuracy/families/*.json say of each (its tiny models, by the arguments of transformers'
// config class; why a decoding graph refuses one; bytes of its published shapes, by hand), and what transformers made of it
// (accuracy/golden/families/, by make_golden_models.py). The tests walk both and name no family.
#pragma once

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "accuracy/golden.h"

namespace kvq {

struct Family {
  std::string name;
  nlohmann::json says, golden;
};

inline const std::vector<Family>& Families() {
  static const std::vector<Family> families = [] {
    std::map<std::string, Family> sorted;
    for (const auto& entry : std::filesystem::directory_iterator(KVQ_SOURCE_DIR "/accuracy/families")) {
      std::ifstream file(entry.path());
      const std::string name = entry.path().stem();
      sorted[name] = {name, nlohmann::json::parse(file), Golden("families/" + name + ".json")};
    }
    std::vector<Family> all;
    for (const auto& [name, family] : sorted) all.push_back(family);
    return all;
  }();
  return families;
}

// What transformers computes with the tiny models, by their names: folders of accuracy/golden/models/.
inline const std::map<std::string, nlohmann::json>& GoldenModels() {
  static const std::map<std::string, nlohmann::json> models = [] {
    std::map<std::string, nlohmann::json> all;
    for (const Family& family : Families()) {
      for (const auto& [name, computed] : family.golden["cases"].items()) all[name] = computed;
    }
    return all;
  }();
  return models;
}

inline std::vector<std::string> GoldenModelNames() {
  std::vector<std::string> names;
  for (const auto& [name, computed] : GoldenModels()) names.push_back(name);
  return names;
}

}  // namespace kvq
