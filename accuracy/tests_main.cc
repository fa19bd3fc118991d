// kvqbench_tests: GoogleTest's own main, but for its end.
#include <gtest/gtest.h>

#include "fixtures/machine/host_load.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  kvq::Leave(RUN_ALL_TESTS());
}
