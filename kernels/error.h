// Errors that a user can mend: one clear line that names the file or flag, says what is wrong and
// what would be right. The executables print it and exit with code 2.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace kvq {

// Concatenates its arguments as operator<< prints them.
template <typename... Parts>
std::string StrCat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Bad input: a flag, a spec, a file. Anything else that is thrown is a defect of kvqbench itself.
class InputError : public std::runtime_error {
 public:
  template <typename... Parts>
  explicit InputError(const Parts&... parts) : std::runtime_error(StrCat(parts...)) {}
};

}  // namespace kvq
