# datasets/catalogue.json as a header, so that the executables know it wherever they run.
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/datasets/catalogue.json")
file(READ "${CMAKE_SOURCE_DIR}/datasets/catalogue.json" KVQ_CATALOGUE)
file(CONFIGURE OUTPUT "${CMAKE_BINARY_DIR}/generated/catalogue.h" CONTENT
  "#pragma once\ninline constexpr char kCatalogue[] = R\"catalogue(@KVQ_CATALOGUE@)catalogue\";\n" @ONLY)
