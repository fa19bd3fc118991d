#include "benchmarks/json_reporter.h"

#include <charconv>
#include <cmath>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>

namespace kvq {
namespace {

using Lists = std::map<std::string, std::vector<float>>;

// Takes the elements of lists out of the counters.
Lists TakeLists(benchmark::UserCounters& counters) {
  Lists lists;
  for (auto counter = counters.begin(); counter != counters.end();) {
    const std::string& name = counter->first;
    const size_t bracket = name.find('[');
    if (bracket == std::string::npos) {
      ++counter;
      continue;
    }
    const size_t index = std::stoul(name.substr(bracket + 1));
    std::vector<float>& list = lists[name.substr(0, bracket)];
    if (list.size() <= index) list.resize(index + 1);
    list[index] = static_cast<float>(counter->second.value);
    counter = counters.erase(counter);
  }
  return lists;
}

std::string Text(float value) {  // the shortest that reads back as it
  if (!std::isfinite(value)) return "null";
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}

// Google Benchmark writes numbers that are none as words that JSON does not know. A value ends its line, and
// no text holds a line's end, so only values are found.
void ReplaceNonFinite(std::string& object) {
  for (const std::string word : {"NaN", "-NaN", "Infinity", "-Infinity"}) {
    for (const std::string end : {",\n", "\n"}) {
      const std::string found = ": " + word + end, null = ": null" + end;
      for (size_t at = 0; (at = object.find(found, at)) != std::string::npos; at += null.size()) {
        object.replace(at, found.size(), null);
      }
    }
  }
}

}  // namespace

void JsonReporter::ReportRuns(const std::vector<Run>& runs) {
  std::ostream& out = GetOutputStream();
  for (Run run : runs) {
    const Lists lists = TakeLists(run.counters);
    std::ostringstream text;
    SetOutputStream(&text);
    JSONReporter::ReportRuns({run});
    SetOutputStream(&out);
    std::string object = text.str();
    ReplaceNonFinite(object);
    const size_t end = object.find_last_not_of(" \n}") + 1;  // behind the last value
    if (end == 0) throw std::logic_error("Google Benchmark's JSON reporter wrote no object");
    out << object.substr(0, end);
    for (const auto& [name, list] : lists) {
      out << ",\n      \"" << name << "\": [";
      for (size_t i = 0; i < list.size(); ++i) out << (i == 0 ? "" : ", ") << Text(list[i]);
      out << "]";
    }
    out << object.substr(end);
  }
}

}  // namespace kvq
