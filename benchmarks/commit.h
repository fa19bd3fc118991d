// The commit that was built, "-dirty" behind it where files differed.
#pragma once

namespace kvq {

const char* Commit();

}  // namespace kvq
