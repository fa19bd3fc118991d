#include "benchmarks/commit.h"

#include "built_commit.h"  // benchmarks/commit.cmake

namespace kvq {

const char* Commit() { return KVQ_COMMIT; }

}  // namespace kvq
