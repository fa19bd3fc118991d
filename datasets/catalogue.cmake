# datasets/catalogue.json, and the converter of GGUF files, as headers, so that the executables have them wherever they run.
function(kvq_embed file name header)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/datasets/${file}")
  file(READ "${CMAKE_SOURCE_DIR}/datasets/${file}" text)
  file(CONFIGURE OUTPUT "${CMAKE_BINARY_DIR}/generated/${header}" CONTENT
    "#pragma once\ninline constexpr char @name@[] = R\"kvqtext(@text@)kvqtext\";\n" @ONLY)
endfunction()
kvq_embed(catalogue.json kCatalogue catalogue.h)
kvq_embed(gguf_to_hf.py kGgufToHf gguf_to_hf.h)
