// Errors that a user can mend: one clear line that names the file or flag, says what is wrong and
// what would be right. The executables print it and exit with code 2.
#pragma once

#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace kvq {

// Concatenates its arguments as operator<< prints them.
template <typename... Parts>
std::string StrCat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Bad input: a flag, a spec, a file. Anything else that is thrown, but for OutOfMemory, is a defect of kvqbench itself.
class InputError : public std::runtime_error {
 public:
  template <typename... Parts>
  explicit InputError(const Parts&... parts) : std::runtime_error(StrCat(parts...)) {}
};

// Memory that was asked for is not there. A defect of nobody: what asked for it is skipped.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string what) : what_(std::move(what)) {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

}  // namespace kvq
