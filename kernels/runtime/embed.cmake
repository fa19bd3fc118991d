# Writes OUT, which holds the text of FILES of ROOT (kernels/runtime/sources.h).
set(rows "")
foreach(file IN LISTS FILES)
  file(READ "${ROOT}/${file}" text)
  string(APPEND rows "    {\"${file}\", R\"kvqtext(${text})kvqtext\"},\n")
endforeach()
file(WRITE "${OUT}.part" "#include \"kernels/runtime/sources.h\"\n\nnamespace kvq {\n\nstd::vector<EmbeddedSource> EmbeddedSources() {\n  return {\n${rows}  };\n}\n\n}  // namespace kvq\n")
file(RENAME "${OUT}.part" "${OUT}")
