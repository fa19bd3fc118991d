// What scheme.h promises of every row of the table, as functions that look at a codec and say what is broken. EveryScheme
// (scheme_test.cc) holds the rows to it; contract_test.cc plants defects and sees that they are found. None of it knows a
// scheme: what differs between them is said by their rows.
//
// A golden file, accuracy/golden/schemes/<name>.json, is made by code that we did not write (make_golden_*.py):
//   source     what made it
//   differing  how many decoded numbers may differ at all (0: none does), and
//   tolerance  by how much, as a share of the largest magnitude of their token
//   cases      each with: what; shape [batch, heads, tokens, head_dim]; group; and, where the source has blocks, the bytes of a token of one head; and, as the bytes
//              of little-endian numbers in hexadecimal digits, x and decoded (float32), and where the source has them
//                codes    a byte each, in the order of x, as the scheme keeps them (with its offset)
//                numbers  one text for each plane of metadata: its bytes in the order of groups (of tokens: "vector")
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "accuracy/golden.h"
#include "kernels/code_row.h"
#include "kernels/error.h"
#include "kernels/groups.h"
#include "kernels/scheme.h"

namespace kvq::contract {

using Values = std::vector<float>;

// What is broken, a line each; only the first few of many.
class Findings {
 public:
  template <typename... Parts>
  void Add(const Parts&... parts) {
    if (++count_ <= 5) text_ += StrCat(parts...) + "\n";
  }
  std::string text() const { return count_ <= 5 ? text_ : StrCat(text_, "and ", count_ - 5, " more\n"); }

 private:
  int64_t count_ = 0;
  std::string text_;
};

struct Shape {
  int64_t batch, heads, tokens, head_dim;
  int64_t count() const { return batch * heads * tokens * head_dim; }
  std::string text() const { return StrCat(batch, "x", heads, "x", tokens, "x", head_dim); }
};

// ---- storage with guards

// Numbers as a DenseView: one after the other, or as attention hands them over, heads within tokens, with gaps everywhere.
// All bytes are 0xFF before, which is a NaN in every type.
class Dense {
 public:
  explicit Dense(const Shape& shape, DType dtype = DType::kFloat32, bool spread = false) : shape_(shape) {
    view_.dtype = dtype;
    view_.batch = shape.batch, view_.heads = shape.heads, view_.tokens = shape.tokens, view_.head_dim = shape.head_dim;
    view_.token_stride = spread ? shape.heads * (shape.head_dim + 24) + 40 : shape.head_dim;
    view_.head_stride = spread ? shape.head_dim + 24 : shape.tokens * shape.head_dim;
    view_.batch_stride = spread ? shape.tokens * view_.token_stride + 72 : shape.heads * view_.head_stride;
    bytes_.assign((kGap + shape.batch * view_.batch_stride + kGap) * SizeOf(dtype), 0xFF);
    view_.data = bytes_.data() + kGap * SizeOf(dtype);
  }
  Dense(const Shape& shape, const Values& values, DType dtype = DType::kFloat32, bool spread = false)
      : Dense(shape, dtype, spread) {
    ForAll([&](int64_t i, int64_t offset) { StoreElement(view_.data, view_.dtype, offset, values[i]); });
  }
  Dense(Dense&&) = default;
  const DenseView& view() const { return view_; }
  Values values() const {
    Values values(shape_.count());
    ForAll([&](int64_t i, int64_t offset) { values[i] = LoadElement(view_.data, view_.dtype, offset); });
    return values;
  }
  // Whether nothing was written but the numbers.
  bool GapsAreUntouched() const {
    std::vector<uint8_t> rest = bytes_;
    const int64_t size = SizeOf(view_.dtype);
    ForAll([&](int64_t, int64_t offset) { std::memset(&rest[(kGap + offset) * size], 0xFF, size); });
    return std::all_of(rest.begin(), rest.end(), [](uint8_t byte) { return byte == 0xFF; });
  }

 private:
  static constexpr int64_t kGap = 64;  // elements before and behind

  template <typename Work>
  void ForAll(const Work& work) const {
    int64_t i = 0;
    for (int64_t b = 0; b < shape_.batch; ++b) {
      for (int64_t h = 0; h < shape_.heads; ++h) {
        for (int64_t t = 0; t < shape_.tokens; ++t) {
          for (int64_t d = 0; d < shape_.head_dim; ++d) work(i++, Offset(view_, b, h, t, d));
        }
      }
    }
  }

  Shape shape_;
  DenseView view_;
  std::vector<uint8_t> bytes_;
};

// Encoded tokens, with guards around what a head has in each plane; `fill` is everywhere before.
class Encoded {
 public:
  Encoded(const Codec& codec, const CodecParams& params, const Shape& shape, int64_t capacity, int64_t block, uint8_t fill = 0xA5)
      : planes_(codec.planes(shape.heads, shape.head_dim, params)), fill_(fill), pairs_(shape.batch * shape.heads) {
    view_.batch = shape.batch, view_.heads = shape.heads, view_.head_dim = shape.head_dim;
    view_.capacity = capacity, view_.block_tokens = block;
    bytes_.resize(planes_.size());
    for (size_t p = 0; p < planes_.size(); ++p) {
      view_.plane_stride[p] = (Bytes(p) + kGuard + 15) / 16 * 16;
      bytes_[p].assign(kGuard + pairs_ * view_.plane_stride[p] + kBehind, fill);
      view_.planes[p] = reinterpret_cast<std::byte*>(bytes_[p].data() + kGuard);
    }
  }
  Encoded(Encoded&&) = default;
  KvView view() const { return view_; }
  const std::vector<Plane>& planes() const { return planes_; }
  // All bytes of a head in a plane, or those of some tokens.
  std::string Of(size_t p, int64_t pair, int64_t first = 0, int64_t tokens = -1) const {
    if (tokens < 0) tokens = view_.capacity;
    const auto at = [&](int64_t token) { return token / planes_[p].tokens * planes_[p].bytes; };
    return {reinterpret_cast<const char*>(&bytes_[p][kGuard + pair * view_.plane_stride[p] + at(first)]),
            static_cast<size_t>(at(first + tokens) - at(first))};
  }
  // The planes' bytes of some tokens of some pairs of sequence and head, without the guards.
  std::string All(int64_t first_pair, int64_t pairs, int64_t first = 0, int64_t tokens = -1) const {
    std::string all;
    for (size_t p = 0; p < planes_.size(); ++p) {
      for (int64_t pair = first_pair; pair < first_pair + pairs; ++pair) all += Of(p, pair, first, tokens);
    }
    return all;
  }
  std::string All() const { return All(0, pairs_); }
  bool IsUntouched(int64_t first, int64_t tokens) const {
    const std::string all = All(0, pairs_, first, tokens);
    return std::all_of(all.begin(), all.end(), [&](char c) { return static_cast<uint8_t>(c) == fill_; });
  }
  bool GuardsAreUntouched() const {
    for (size_t p = 0; p < planes_.size(); ++p) {
      std::vector<uint8_t> rest = bytes_[p];
      for (int64_t pair = 0; pair < pairs_; ++pair) std::memset(&rest[kGuard + pair * view_.plane_stride[p]], fill_, Bytes(p));
      if (!std::all_of(rest.begin(), rest.end(), [&](uint8_t byte) { return byte == fill_; })) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kGuard = 64, kBehind = 1 << 14;  // behind the last: so that a test fails instead of crashing

  int64_t Bytes(size_t p) const { return view_.capacity / planes_[p].tokens * planes_[p].bytes; }

  std::vector<Plane> planes_;
  uint8_t fill_;
  int64_t pairs_;
  KvView view_;
  std::vector<std::vector<uint8_t>> bytes_;
};

// ---- what is tried

inline int64_t UpTo(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The group sizes a row names.
inline std::vector<int64_t> GroupsOf(const Codec& codec) {
  return codec.groups.empty() ? std::vector<int64_t>{codec.default_group} : std::vector<int64_t>(codec.groups.begin(), codec.groups.end());
}

inline bool Takes(const Codec& codec, int64_t group, int64_t head_dim) {
  const auto only = codec.head_dims;
  if (!only.empty() && std::find(only.begin(), only.end(), head_dim) == only.end()) return false;
  return head_dim % codec.head_dim_multiple == 0 && (group == 0 || head_dim % group == 0);
}

// The smallest head_dim from `least` on that it takes; the largest one where it takes none of these.
inline int64_t HeadDim(const Codec& codec, int64_t group, int64_t least) {
  if (!codec.head_dims.empty()) least = std::min(least, *std::max_element(codec.head_dims.begin(), codec.head_dims.end()));
  while (!Takes(codec, group, least)) ++least;
  return least;
}

// Elements that share a scale.
inline int64_t Sharing(int64_t group, int64_t head_dim) { return group == 0 ? head_dim : group; }

// Smallest block and the tokens of a block in tests of how tokens arrive.
inline std::vector<int64_t> BlocksOf(const Codec& codec) {
  const int64_t smallest = codec.min_block_tokens;
  if (codec.block_wide) return {UpTo(32, smallest)};
  return smallest == 1 ? std::vector<int64_t>{1, 2, 32} : std::vector<int64_t>{smallest, 2 * smallest};
}

struct Options {
  DType dtype = DType::kFloat32;
  bool spread = false;
  int64_t block = 0;     // 0: all tokens
  uint8_t fill = 0xA5;
};

inline Encoded Encode(const Codec& codec, int64_t group, const Shape& shape, const Values& x, const Options& options = {}) {
  const CodecParams params{.group_size = group};
  Encoded encoded(codec, params, shape, shape.tokens, options.block == 0 ? shape.tokens : options.block, options.fill);
  codec.encode(params, Dense(shape, x, options.dtype, options.spread).view(), 0, encoded.view());
  return encoded;
}
inline Values Decode(const Codec& codec, int64_t group, const Shape& shape, const Encoded& encoded, int64_t first = 0,
                     DType dtype = DType::kFloat32) {
  const Dense out(shape, dtype);
  codec.decode({.group_size = group}, encoded.view(), first, out.view());
  return out.values();
}
inline Values RoundTrip(const Codec& codec, int64_t group, const Shape& shape, const Values& x, const Options& options = {}) {
  return Decode(codec, group, shape, Encode(codec, group, shape, x, options), 0, options.dtype);
}

inline double Nmse(const Values& x, const Values& out) {
  double error = 0, squares = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    error += (double{out[i]} - x[i]) * (double{out[i]} - x[i]);
    squares += double{x[i]} * x[i];
  }
  return error / squares;
}

inline bool Same(float a, float b) { return a == b || (a != a && b != b); }
inline bool Same(const Values& a, const Values& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](float x, float y) { return Same(x, y); });
}

// ---- the row itself

inline std::string CheckRow(const Codec& codec) {
  Findings findings;
  if (codec.planes == nullptr || codec.encode == nullptr || codec.decode == nullptr) findings.Add("planes, encode or decode is not there");
  if (codec.encode_cuda == nullptr || codec.decode_cuda == nullptr) findings.Add("no CUDA twin");
  if (codec.grouping.empty()) findings.Add("grouping says nothing");
  if (!codec.groups.empty() && std::find(codec.groups.begin(), codec.groups.end(), codec.default_group) == codec.groups.end()) {
    findings.Add("groups of ", GroupsText(codec.groups), " without the default, ", codec.default_group);
  }
  if (!(codec.nmse > 0) || *codec.nmse_source == '\0') findings.Add("no nmse, or not where it comes from");
  if (!(codec.nmse_tolerance > 0 && codec.nmse_tolerance <= 0.1)) findings.Add("an nmse that may be off by ", codec.nmse_tolerance, " guards nothing");
  if ((codec.golden == nullptr) == (codec.no_golden == nullptr)) findings.Add("a golden file, or the reason why there is none");
  return findings.text();
}

// It takes what the row names, and nothing else.
inline std::string CheckShapes(const Codec& codec) {
  Findings findings;
  const auto takes = [&](int64_t group, int64_t head_dim) {
    try {
      const std::vector<Plane> planes = codec.planes(2, head_dim, {.group_size = group});
      if (planes.empty() || planes.size() > static_cast<size_t>(kMaxPlanes)) findings.Add(planes.size(), " planes");
      for (const Plane& plane : planes) {
        if (plane.bytes <= 0 || plane.tokens <= 0) findings.Add(plane.name, ": no bytes");
      }
      return true;
    } catch (const InputError&) {
      return false;
    }
  };
  const std::vector<int64_t> named = GroupsOf(codec);
  for (const int64_t group : {0, 1, 8, 16, 24, 32, 48, 64, 96, 128, 256}) {
    const bool is_named = std::find(named.begin(), named.end(), group) != named.end();
    for (int64_t head_dim = 8; head_dim <= 512; head_dim += 8) {
      const bool expected = is_named && Takes(codec, group, head_dim);
      if (takes(group, head_dim) != expected) {
        findings.Add(expected ? "refuses" : "takes", " head_dim ", head_dim, " in groups of ", group, ", and the row says otherwise");
      }
    }
  }
  return findings.text();
}

// ---- sizes, places, guards

// Every size is written whole and nothing else is, whatever was there before, however the numbers lie.
inline std::string CheckSizes(const Codec& codec) {
  Findings findings;
  for (const int64_t group : GroupsOf(codec)) {
    for (const int64_t head_dim : {16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 512}) {
      if (!Takes(codec, group, head_dim)) continue;
      for (const int64_t batch : {1, 2}) {
        for (const int64_t heads : {1, 3}) {
          for (const int64_t count : {1, 2, 3, 33}) {
            const Shape shape{batch, heads, UpTo(count, codec.min_block_tokens), head_dim};
            const std::string what = StrCat(shape.text(), " in groups of ", group, ": ");
            const CodecParams params{.group_size = group};
            const Values x = NormalNumbers(shape.count(), 1);
            const Encoded one = Encode(codec, group, shape, x);
            const Encoded two = Encode(codec, group, shape, x, {.spread = true, .fill = 0x5A});
            if (!one.GuardsAreUntouched() || !two.GuardsAreUntouched()) findings.Add(what, "writes outside of its planes");
            if (one.All() != two.All()) findings.Add(what, "bytes are not written, or depend on strides");
            const Dense near(shape), far(shape, DType::kFloat32, /*spread=*/true);
            codec.decode(params, one.view(), 0, near.view());
            codec.decode(params, one.view(), 0, far.view());
            if (!near.GapsAreUntouched() || !far.GapsAreUntouched()) findings.Add(what, "decodes to outside of the output");
            if (!Same(near.values(), far.values())) findings.Add(what, "decoded numbers depend on strides");
            // A single group may have more than the mean; what is not written or lies elsewhere has 1 and more.
            const double nmse = Nmse(x, near.values()), limit = std::min(0.8, 6 * codec.nmse);
            if (!(nmse <= limit)) findings.Add(what, "nmse ", nmse, ", expected is ", codec.nmse);
          }
        }
      }
    }
  }
  return findings.text();
}

// A token's bytes are in its slot, and the same however tokens arrive in calls, in which sequence, with what beside them.
inline std::string CheckCalls(const Codec& codec) {
  Findings findings;
  const int64_t group = codec.default_group, head_dim = HeadDim(codec, group, 64);
  const CodecParams params{.group_size = group};
  for (const int64_t block : BlocksOf(codec)) {
    const Shape shape{2, 3, 3 * block, head_dim};
    const std::string what = StrCat("blocks of ", block, ": ");
    const Values x = NormalNumbers(shape.count(), 2);
    const Dense all(shape, x);
    const auto part = [&](int64_t first, int64_t tokens, int64_t b = 0, int64_t batch = 2, int64_t h = 0, int64_t heads = 3) {
      DenseView view = all.view();
      view.data = static_cast<float*>(view.data) + Offset(view, b, h, first, 0);
      view.batch = batch, view.heads = heads, view.tokens = tokens;
      return view;
    };
    const Encoded whole = Encode(codec, group, shape, x, {.block = block});
    // In two calls, the later one first, to slots one block on.
    Encoded parts(codec, params, shape, 5 * block, block);
    codec.encode(params, part(block, 2 * block), 2 * block, parts.view());
    if (!parts.IsUntouched(0, 2 * block) || !parts.IsUntouched(4 * block, block)) findings.Add(what, "writes to slots that it was not given");
    codec.encode(params, part(0, block), block, parts.view());
    if (!parts.IsUntouched(0, block) || !parts.IsUntouched(4 * block, block)) findings.Add(what, "writes to slots that it was not given");
    if (parts.All(0, 6, block, 3 * block) != whole.All()) findings.Add(what, "bytes depend on slots or on calls");
    if (!parts.GuardsAreUntouched()) findings.Add(what, "writes outside of its planes");
    const Values decoded = Decode(codec, group, shape, whole);
    if (!Same(Decode(codec, group, shape, parts, block), decoded)) findings.Add(what, "decoded numbers depend on slots");
    const Shape some{2, 3, block, head_dim};
    const Values last = Decode(codec, group, some, whole, 2 * block);
    for (int64_t pair = 0; pair < 6; ++pair) {
      const auto from = decoded.begin() + (pair * 3 + 2) * block * head_dim;
      if (!std::equal(from, from + block * head_dim, last.begin() + pair * block * head_dim, [](float a, float b) { return Same(a, b); })) {
        findings.Add(what, "decoded numbers depend on where decoding begins");
      }
    }
    // A sequence by itself; a head, where groups are of one.
    const Shape alone{1, 3, 3 * block, head_dim};
    Encoded second(codec, params, alone, 3 * block, block);
    codec.encode(params, part(0, 3 * block, 1, 1), 0, second.view());
    if (second.All() != whole.All(3, 3)) findings.Add(what, "a sequence's bytes depend on the batch");
    if (!Same(Decode(codec, group, alone, second), Values(decoded.begin() + alone.count(), decoded.end()))) {
      findings.Add(what, "a sequence's decoded numbers depend on the batch");
    }
  }
  return findings.text();
}

// ---- types

// Numbers that float16 and bfloat16 hold: the same bytes from every type; decoded into 16 bits, what float32 gives, rounded.
inline std::string CheckTypes(const Codec& codec) {
  Findings findings;
  const int64_t group = codec.default_group;
  const Shape shape{1, 2, UpTo(33, codec.min_block_tokens), HeadDim(codec, group, 64)};
  Values x = NormalNumbers(shape.count(), 3);
  for (float& v : x) v = std::fabs(v) < 0x1p-6f ? 0.5f : BFloat16ToFloat(FloatToBFloat16(v));
  const Encoded exact = Encode(codec, group, shape, x);
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    const char* what = dtype == DType::kFloat16 ? "float16: " : "bfloat16: ";
    for (const bool spread : {false, true}) {
      const Encoded encoded = Encode(codec, group, shape, x, {.dtype = dtype, .spread = spread});
      if (!codec.typed && encoded.All() != exact.All()) findings.Add(what, "other bytes than from float32");
      Values expected = Decode(codec, group, shape, encoded);
      for (float& v : expected) {
        v = dtype == DType::kFloat16 ? HalfToFloat(FloatToHalf(v)) : BFloat16ToFloat(FloatToBFloat16(v));
      }
      const Dense out(shape, dtype, spread);
      codec.decode({.group_size = group}, encoded.view(), 0, out.view());
      if (!codec.typed && !Same(out.values(), expected)) findings.Add(what, "decoded numbers are not float32's, rounded");
      if (!out.GapsAreUntouched()) findings.Add(what, "decodes to outside of the output");
      // 8 bits of a bfloat16: a share of 2^-9, and another for what is computed in it.
      const double nmse = Nmse(x, out.values());
      if (!(nmse < 2 * codec.nmse + 0x1p-16)) findings.Add(what, "nmse ", nmse, ", expected is ", codec.nmse);
    }
  }
  return findings.text();
}

// ---- numbers that are none, and numbers that are unusual

// Where `bad` stands alone among normal numbers. What shares nothing with it decodes to normal numbers as well as ever.
inline void CheckOneBad(const Codec& codec, float bad, Findings& findings) {
  const int64_t group = codec.default_group, head_dim = HeadDim(codec, group, std::max<int64_t>(64, 2 * group));
  const Shape shape{2, 2, UpTo(4, codec.min_block_tokens), head_dim};
  const int64_t share = Sharing(codec.vector_wide ? 0 : group, head_dim);
  for (const int64_t place : {int64_t{0}, share / 2 + 1, share - 1, head_dim - 1}) {
    Values x = NormalNumbers(shape.count(), 4);
    const int64_t at = (shape.tokens + 1) * head_dim + place;  // of the second head's second token
    x[at] = bad;
    const std::string what = StrCat(bad, " at channel ", place, ": ");
    const Encoded encoded = Encode(codec, group, shape, x);
    if (!encoded.GuardsAreUntouched()) findings.Add(what, "writes outside of its planes");
    const Values out = Decode(codec, group, shape, encoded);
    Values near_x, near_out;
    int64_t lost = 0;
    for (int64_t i = 0; i < shape.count(); ++i) {
      const bool shares = codec.block_wide ? !std::isfinite(out[i]) : i / share == at / share;
      lost += shares;
      if (shares) continue;
      near_x.push_back(x[i] == bad ? 0 : x[i]), near_out.push_back(out[i]);
      if (!std::isfinite(out[i])) findings.Add(what, "element ", i, " shares nothing with it, and decodes to ", out[i]);
    }
    if (lost > share) findings.Add(what, lost, " numbers are lost, ", share, " share a scale");
    const double nmse = Nmse(near_x, near_out);
    if (!codec.block_wide && !(nmse < 2 * codec.nmse)) findings.Add(what, "nmse of what shares nothing with it is ", nmse, ", expected is ", codec.nmse);
    if (bad != bad && out[at] == out[at]) findings.Add(what, "it decodes to ", out[at]);
  }
}

inline std::string CheckNotFinite(const Codec& codec) {
  Findings findings;
  for (const float bad : {NAN, -NAN, INFINITY, -INFINITY, 1e5f, -3e6f, 1e30f, 3.4e38f, -3.4e38f}) CheckOneBad(codec, bad, findings);
  return findings.text();
}

inline std::string CheckUnusual(const Codec& codec) {
  Findings findings;
  const int64_t group = codec.default_group, head_dim = HeadDim(codec, group, std::max<int64_t>(64, 2 * group));
  const Shape shape{1, 2, UpTo(3, codec.min_block_tokens), head_dim};
  const int64_t share = Sharing(group, head_dim);
  const auto decoded = [&](const std::string& what, const Values& x) {
    const Encoded encoded = Encode(codec, group, shape, x);
    if (!encoded.GuardsAreUntouched()) findings.Add(what, ": writes outside of its planes");
    const Values out = Decode(codec, group, shape, encoded);
    for (const float v : out) {
      if (std::isfinite(v)) continue;
      findings.Add(what, ": a number decodes to ", v);
      break;
    }
    return out;
  };
  // Whether each token lies at most `error` of its length from what it was, and its length at most doubles: all that is to be
  // said of single numbers where they are turned. (Constant ones become one large number and zeros; without a code for zero
  // that costs up to sqrt(2) of the length, with 2 bits and 32 channels.)
  const auto near_as_a_whole = [&](const Values& x, const Values& out, double error) {
    for (int64_t first = 0; first < shape.count(); first += head_dim) {
      double off = 0, before = 0, after = 0;
      for (int64_t i = first; i < first + head_dim; ++i) {
        off += (double{out[i]} - x[i]) * (double{out[i]} - x[i]);
        before += double{x[i]} * x[i], after += double{out[i]} * out[i];
      }
      if (!(std::sqrt(off) <= error * std::sqrt(before) + 1e-3 && std::sqrt(after) <= 2 * std::sqrt(before) + 1e-3)) return false;
    }
    return true;
  };
  // Constant numbers decode to one number, near them; zeros to zero.
  for (const float value : {0.0f, -0.0f, 0.75f, -3.0f, 1000.0f, -30000.0f}) {
    const std::string what = StrCat("all ", value);
    const Values constant(shape.count(), value), out = decoded(what, constant);
    if (codec.turned && value != 0) {
      if (std::fabs(value) <= 400 && !near_as_a_whole(constant, out, 1.5)) findings.Add(what, ": decodes to something far from it");
      continue;
    }
    for (const float v : out) {
      const bool near = value == 0 ? v == 0 : std::fabs(v - value) <= std::fabs(value) / 2;
      if (near || std::fabs(value) > 400 || codec.one_sign_saturates) continue;  // fp8 ends at 448
      findings.Add(what, ": decodes to ", v);
      break;
    }
  }
  // A group of zeros among others; the last one, too.
  for (const int64_t zeros : {int64_t{0}, (shape.count() / share - 1) * share}) {
    if (codec.block_wide || codec.vector_wide) break;
    Values x = NormalNumbers(shape.count(), 5);
    std::fill_n(x.begin() + zeros, share, 0.0f);
    const Values out = decoded("a group of zeros", x);
    for (int64_t i = zeros; i < zeros + share; ++i) {
      if (out[i] != 0) findings.Add("a group of zeros: one decodes to ", out[i]);
    }
  }
  for (const auto& [what, scale, shift] :
       {std::tuple("all positive", 1.0f, 20.0f), std::tuple("all negative", 1.0f, -20.0f), std::tuple("up to 30000", 5000.0f, 0.0f),
        std::tuple("tiny", 1e-5f, 0.0f), std::tuple("of fp16's subnormals", 1e-7f, 0.0f), std::tuple("too small for fp16", 1e-10f, 0.0f),
        std::tuple("subnormal", 1e-40f, 0.0f), std::tuple("the smallest", 1e-45f, 0.0f)}) {
    Values x = NormalNumbers(shape.count(), 6);
    float largest = 0;
    for (float& v : x) {
      v = v * scale + shift;
      largest = std::max(largest, std::fabs(v));
    }
    const Values out = decoded(what, x);
    if (codec.turned) {
      if (!near_as_a_whole(x, out, 2)) findings.Add(what, ": decodes to something far from it");
      continue;
    }
    for (const float v : out) {
      // A scale has a smallest number; what lies far below may become nothing, but not much.
      if (std::fabs(v) <= 2 * largest + 1e-3f) continue;
      findings.Add(what, ": of at most ", largest, " one decodes to ", v);
      break;
    }
  }
  // One number of each group, the others zero: whatever its sign and place, it is near what it was.
  for (const float value : {3.0f, -3.0f}) {
    if (codec.vector_wide) break;
    Values x(shape.count(), 0);
    for (int64_t g = 0; g < shape.count() / share; ++g) x[g * share + g % share] = value;
    const Values out = decoded("one number of a group", x);
    for (int64_t i = 0; i < shape.count() && !codec.block_wide; ++i) {
      if (x[i] != 0 && !(std::fabs(out[i] - x[i]) <= 1)) findings.Add("one number of a group: ", x[i], " decodes to ", out[i]);
    }
  }
  return findings.text();
}

// ---- the error

// 0.3 % is how sure the nmse of so many numbers is.
inline std::string CheckError(const Codec& codec) {
  Findings findings;
  const int64_t group = codec.default_group;
  const Shape shape{2, 4, UpTo(256, codec.min_block_tokens), HeadDim(codec, group, 128)};
  const Values x = NormalNumbers(shape.count(), 7);
  const double nmse = Nmse(x, RoundTrip(codec, group, shape, x, {.block = UpTo(128, codec.min_block_tokens)}));
  if (!(std::fabs(nmse / codec.nmse - 1) <= codec.nmse_tolerance)) {
    findings.Add("nmse of normal numbers is ", nmse, ", the row says ", codec.nmse, " to ", codec.nmse_tolerance, " of it (", codec.nmse_source, ")");
  }
  return findings.text();
}

// ---- golden files

inline std::string FromHex(const std::string& text) {
  const auto digit = [](char c) { return c <= '9' ? c - '0' : c - 'a' + 10; };
  std::string bytes(text.size() / 2, '\0');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(digit(text[2 * i]) * 16 + digit(text[2 * i + 1]));
  return bytes;
}
inline Values FloatsFromHex(const std::string& text) {
  const std::string bytes = FromHex(text);
  Values values(bytes.size() / 4);
  std::memcpy(values.data(), bytes.data(), 4 * values.size());
  return values;
}

// The codes of a head's tokens, a byte each: plane 0 and the odd bits.
inline std::string CodesOf(const Codec& codec, const Encoded& encoded, int64_t pair, int64_t tokens, int64_t head_dim) {
  const int low = codec.bits == 8 ? 8 : codec.bits >= 4 ? 4 : 2;
  const std::string rows = encoded.Of(0, pair), odd = low == codec.bits ? "" : encoded.Of(1, pair);
  std::string codes;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t d = 0; d < head_dim; ++d) {
      // As code_row.h says, once more: step, half, chunk and side of the channel.
      const int64_t step = d / 16, half = d % 16 / 8, chunk = d % 8 / 2, side = d % 2, steps = 8 / low, words = head_dim * low / 128;
      const int64_t word = chunk * words + step / steps, bit = 16 * side + (step % steps * 2 + half) * low;
      int code = static_cast<uint8_t>(rows[t * head_dim * low / 8 + word * 4 + bit / 8]) >> bit % 8 & ((1 << low) - 1);
      for (int i = 0; i < codec.bits - low; ++i) {
        const int64_t odd_bit = word * (32 / low) + bit / low, row = (t * (codec.bits - low) + i) * head_dim / 8;
        code |= (static_cast<uint8_t>(odd[row + odd_bit / 8]) >> odd_bit % 8 & 1) << (low + i);
      }
      codes.push_back(static_cast<char>(code));
    }
  }
  return codes;
}

inline std::string CheckGolden(const Codec& codec) {
  Findings findings;
  if (codec.golden == nullptr) return "";
  const nlohmann::json file = Golden(StrCat("schemes/", codec.golden));
  int64_t numbers = 0, differing = 0;
  const double tolerance = file["tolerance"];
  for (const auto& c : file["cases"]) {
    const Shape shape{c["shape"][0], c["shape"][1], c["shape"][2], c["shape"][3]};
    const int64_t group = c["group"], pairs = shape.batch * shape.heads;
    const std::string what = StrCat(std::string(c["what"]), " ", shape.text(), ": ");
    const Values x = FloatsFromHex(c["x"]), theirs = FloatsFromHex(c["decoded"]);
    if (static_cast<int64_t>(x.size()) != shape.count() || theirs.size() != x.size()) {
      findings.Add(what, "a golden file with ", x.size(), " and ", theirs.size(), " numbers");
      continue;
    }
    const int64_t block = c.value("block", shape.tokens);  // where the file does not say: all tokens
    const int64_t bytes = EncodedBytes(codec, {.group_size = group}, 1, shape.heads, shape.head_dim, block);
    if (c.contains("bytes") && bytes != c["bytes"].get<int64_t>() * shape.heads * block) {
      findings.Add(what, bytes, " bytes, not ", c["bytes"], " a token and head");
    }
    const Encoded encoded = Encode(codec, group, shape, x, {.block = block});
    if (c.contains("codes")) {
      std::string codes;
      for (int64_t pair = 0; pair < pairs; ++pair) codes += CodesOf(codec, encoded, pair, shape.tokens, shape.head_dim);
      const std::string expected = FromHex(c["codes"]);
      for (size_t i = 0; i < codes.size(); ++i) {
        if (codes[i] != expected.at(i)) findings.Add(what, "code ", i, " of ", x[i], " is ", codes[i] & 0xFF, ", not ", expected[i] & 0xFF);
      }
    }
    if (c.contains("numbers")) {
      const size_t first = codec.bits == 3 || (codec.bits > 4 && codec.bits < 8) ? 2 : 1;
      for (size_t p = first; p < encoded.planes().size(); ++p) {
        std::string ours;
        for (int64_t pair = 0; pair < pairs; ++pair) ours += encoded.Of(p, pair);
        if (ours != FromHex(c["numbers"].at(p - first))) findings.Add(what, "other bytes of metadata in plane ", p);
      }
    }
    const Values ours = Decode(codec, group, shape, encoded);
    for (int64_t i = 0; i < shape.count(); ++i, ++numbers) {
      if (Same(ours[i], theirs[i])) continue;
      ++differing;
      float largest = 0;
      const int64_t first = i / shape.head_dim * shape.head_dim;
      for (int64_t d = first; d < first + shape.head_dim; ++d) largest = std::max(largest, std::fabs(theirs[d]));
      if (!(std::fabs(double{ours[i]} - theirs[i]) <= tolerance * largest)) {
        findings.Add(what, "number ", i, ", ", x[i], ", decodes to ", ours[i], ", not ", theirs[i]);
      }
    }
  }
  if (numbers < 1000) findings.Add(numbers, " golden numbers are too few");
  const int64_t may_differ = file["differing"];
  if (differing > may_differ) findings.Add(differing, " of ", numbers, " golden numbers differ, ", may_differ, " may");
  return findings.text();
}

// All of it, by name.
struct Check {
  const char* name;
  std::string (*run)(const Codec&);
};
inline constexpr Check kChecks[] = {{"Row", CheckRow}, {"Shapes", CheckShapes}, {"Sizes", CheckSizes}, {"Calls", CheckCalls},
                                    {"Types", CheckTypes}, {"NotFinite", CheckNotFinite}, {"Unusual", CheckUnusual},
                                    {"Error", CheckError}, {"Golden", CheckGolden}};

}  // namespace kvq::contract
