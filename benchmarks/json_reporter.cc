#include "benchmarks/json_reporter.h"

#include <charconv>
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
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
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
