// Files, read as a whole.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "kernels/error.h"

namespace kvq {

// Throws InputError naming the file where it is not there or cannot be read, and where it is no regular file: a pipe would
// have to be waited for, and a device may never end.
inline std::string ReadFile(const std::string& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) {
    throw InputError(path, ": not there, or cannot be read (", std::strerror(errno), ")");
  }
  struct stat status;
  std::string text;
  const bool regular = ::fstat(file, &status) == 0 && S_ISREG(status.st_mode);
  char block[1 << 16];
  ssize_t count = 0;
  while (regular && (count = ::read(file, block, sizeof block)) > 0) text.append(block, static_cast<size_t>(count));
  const int error = errno;
  ::close(file);
  if (!regular) throw InputError(path, ": no regular file");
  if (count < 0) throw InputError(path, ": cannot be read: ", std::strerror(error));
  return text;
}

}  // namespace kvq
