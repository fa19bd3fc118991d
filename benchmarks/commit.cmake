# Writes OUT, a header that names the commit of ROOT, where it names another one. "-dirty" behind it: files differ.
execute_process(COMMAND git -C "${ROOT}" describe --always --dirty --abbrev=12
  OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
set(text "#define KVQ_COMMIT \"${commit}\"\n")
set(before "")
if(EXISTS "${OUT}")
  file(READ "${OUT}" before)
endif()
if(NOT text STREQUAL before)
  file(WRITE "${OUT}.part" "${text}")
  file(RENAME "${OUT}.part" "${OUT}")
endif()
