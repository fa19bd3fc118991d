#include "benchmarks/commit.h"

namespace kvq {

const char* Commit() { return KVQ_COMMIT; }

}  // namespace kvq
