// Defects planted in a plain scheme: the contract (contract.h) finds each without knowing the scheme. Those in a formula are
// variants of q8_0's, held to its row; those in what moves bytes are wrapped around its functions, or q4_0's.
#include <gtest/gtest.h>

#include "accuracy/contract.h"
#include "kernels/plain.h"

namespace kvq {
namespace {

// The name of the first check that finds something; a check that throws has found it.
std::string FoundBy(const Codec& codec) {
  for (const contract::Check& check : contract::kChecks) {
    try {
      if (!check.run(codec).empty()) return check.name;
    } catch (const std::exception&) {
      return check.name;
    }
  }
  return "";
}

const Codec& Q8() { return FindScheme("q8_0").keys; }

// ---- in the formula

enum class Defect { kNone, kConstant, kHalfToEven, kTruncates, kRoundedScale, kZeroGroup, kLostNan };

// q8_0 once more, and with one thing wrong.
template <Defect kDefect>
struct Broken8 {
  static constexpr char kFile[] = "", kName[] = "", kLabel[] = "broken q8_0";
  static constexpr int kBits = 8;
  static constexpr int64_t kGroups[] = {32};
  struct Stored {
    uint16_t d;
  };
  static constexpr int kStored[] = {2};
  struct Fit {
    float inverse;
    Stored stored;
  };
  template <typename Numbers>
  static Fit FitGroup(const Numbers& x, int n) {
    float d = plain::Magnitude(x, n) / (kDefect == Defect::kConstant ? 120.0f : 127.0f);
    if (kDefect == Defect::kLostNan && d != d) d = 1;
    if (kDefect == Defect::kRoundedScale) d = plain::AsHalf(d);
    const float of_zero = kDefect == Defect::kZeroGroup ? 1 / d : 0;  // 0 times infinity
    return {d != 0 ? 1 / d : of_zero, {FloatToHalf(kDefect == Defect::kZeroGroup && d == 0 ? 1 : d)}};
  }
  static uint32_t Code(const Fit& fit, float x) {
    const float v = plain::Clamped(x * fit.inverse, -127, 127);
    const float rounded = kDefect == Defect::kHalfToEven ? RoundToEven(v)
                          : kDefect == Defect::kTruncates ? static_cast<float>(static_cast<int>(v))
                                                          : static_cast<float>(plain::Nearest(v));
    return static_cast<uint32_t>(static_cast<int>(rounded) + 128);
  }
  static float Value(const Stored& stored, uint32_t code) { return (static_cast<float>(code) - 128) * HalfToFloat(stored.d); }
};

template <Defect kDefect>
Codec Broken() {
  Codec codec = plain::MakeCodec<Broken8<kDefect>>();
  codec.nmse = Q8().nmse, codec.nmse_source = Q8().nmse_source, codec.golden = Q8().golden;
  return codec;
}

// ---- in what moves bytes: the functions of q8_0 with other arguments

Codec With(decltype(Codec::encode) encode, decltype(Codec::decode) decode) {
  Codec codec = Q8();
  if (encode != nullptr) codec.encode = encode;
  if (decode != nullptr) codec.decode = decode;
  return codec;
}

DenseView WithoutStrides(DenseView x) {
  x.token_stride = x.head_dim, x.head_stride = x.tokens * x.head_dim, x.batch_stride = x.heads * x.head_stride;
  return x;
}
KvView WithoutPlaneStrides(KvView view) {
  for (size_t p = 0; p < 2; ++p) {
    view.plane_stride[p] = view.capacity * Q8().planes(view.heads, view.head_dim, {.group_size = 32})[p].bytes;
  }
  return view;
}
KvView Shifted(KvView view, int plane, int64_t bytes) {
  view.planes[plane] += bytes;
  return view;
}

// The two nibbles of each byte of 4-bit codes, in all rows of a view.
void SwapNibbles(const KvView& view, int64_t first, int64_t tokens) {
  for (int64_t pair = 0; pair < view.batch * view.heads; ++pair) {
    uint8_t* row = reinterpret_cast<uint8_t*>(view.planes[0]) + pair * view.plane_stride[0] + first * view.head_dim / 2;
    for (int64_t i = 0; i < tokens * view.head_dim / 2; ++i) row[i] = static_cast<uint8_t>(row[i] << 4 | row[i] >> 4);
  }
}

TEST(Contract, CatchesPlantedDefects) {
  ASSERT_EQ(FoundBy(Q8()), "");
  ASSERT_EQ(FoundBy(Broken<Defect::kNone>()), "") << "the variants are q8_0 but for their defects";
  const auto encode = [](const CodecParams& p, const DenseView& x, int64_t first, const KvView& out) { Q8().encode(p, x, first, out); };
  const auto decode = [](const CodecParams& p, const KvView& in, int64_t first, const DenseView& out) { Q8().decode(p, in, first, out); };
  ASSERT_EQ(FoundBy(With(encode, decode)), "");

  std::vector<std::pair<std::string, Codec>> defects = {
      {"127 is 120", Broken<Defect::kConstant>()},
      {"half to even for half away from zero", Broken<Defect::kHalfToEven>()},
      {"truncated codes", Broken<Defect::kTruncates>()},
      {"d is rounded before the reciprocal", Broken<Defect::kRoundedScale>()},
      {"a group of zeros decodes to something", Broken<Defect::kZeroGroup>()},
      {"a NaN becomes a number", Broken<Defect::kLostNan>()},
      {"encode and decode ignore first_token",
       With([](const CodecParams& p, const DenseView& x, int64_t, const KvView& out) { Q8().encode(p, x, 0, out); },
            [](const CodecParams& p, const KvView& in, int64_t, const DenseView& out) { Q8().decode(p, in, 0, out); })},
      {"encode and decode are a slot on",
       With([](const CodecParams& p, const DenseView& x, int64_t first, const KvView& out) { Q8().encode(p, x, first + 1, out); },
            [](const CodecParams& p, const KvView& in, int64_t first, const DenseView& out) { Q8().decode(p, in, first + 1, out); })},
      {"encode ignores strides",
       With([](const CodecParams& p, const DenseView& x, int64_t first, const KvView& out) { Q8().encode(p, WithoutStrides(x), first, out); }, nullptr)},
      {"decode ignores strides",
       With(nullptr, [](const CodecParams& p, const KvView& in, int64_t first, const DenseView& out) { Q8().decode(p, in, first, WithoutStrides(out)); })},
      {"strides of planes are ignored",
       With([](const CodecParams& p, const DenseView& x, int64_t first, const KvView& out) { Q8().encode(p, x, first, WithoutPlaneStrides(out)); },
            [](const CodecParams& p, const KvView& in, int64_t first, const DenseView& out) { Q8().decode(p, WithoutPlaneStrides(in), first, out); })},
      {"encode and decode have the group's index off by one",
       With([](const CodecParams& p, const DenseView& x, int64_t first, const KvView& out) { Q8().encode(p, x, first, Shifted(out, 1, 2)); },
            [](const CodecParams& p, const KvView& in, int64_t first, const DenseView& out) { Q8().decode(p, Shifted(in, 1, 2), first, out); })},
      {"decode reads the neighbour's metadata",
       With(nullptr, [](const CodecParams& p, const KvView& in, int64_t first, const DenseView& out) { Q8().decode(p, Shifted(in, 1, -2), first, out); })},
      {"only the first sequence of a batch is written",
       With([](const CodecParams& p, DenseView const& x, int64_t first, const KvView& out) {
              DenseView one = x;
              one.batch = 1;
              Q8().encode(p, one, first, out);
            }, nullptr)},
      {"every sequence of a batch is the first",
       With([](const CodecParams& p, DenseView const& x, int64_t first, const KvView& out) {
              DenseView same = x;
              same.batch_stride = 0;
              Q8().encode(p, same, first, out);
            }, nullptr)},
      {"the last token of a call is lost",
       With([](const CodecParams& p, DenseView const& x, int64_t first, const KvView& out) {
              DenseView fewer = x;
              --fewer.tokens;
              Q8().encode(p, fewer, first, out);
            }, nullptr)},
      {"bytes depend on how many tokens come in a call",
       With([](const CodecParams& p, DenseView const& x, int64_t first, const KvView& out) {
              Q8().encode(p, x, first, out);
              for (int64_t t = 0; t < x.tokens; ++t) {
                if (x.tokens % 2 == 0 && t == x.tokens - 1) *(out.planes[0] + (first + t) * x.head_dim) ^= std::byte{1};
              }
            }, nullptr)},
      {"a NaN spreads to the next group",
       With(nullptr, [](const CodecParams& p, const KvView& in, int64_t first, const DenseView& out) {
              Q8().decode(p, in, first, out);
              for (int64_t b = 0; b < out.batch; ++b) {
                for (int64_t h = 0; h < out.heads; ++h) {
                  for (int64_t t = 0; t < out.tokens; ++t) {
                    for (int64_t d = out.head_dim - 1; d >= 32; --d) {
                      const int64_t at = Offset(out, b, h, t, d);
                      const float before = LoadElement(out.data, out.dtype, at - 32);
                      if (before != before) StoreElement(out.data, out.dtype, at, before);
                    }
                  }
                }
              }
            })},
      {"16-bit inputs are taken for float16",
       With([](const CodecParams& p, DenseView const& x, int64_t first, const KvView& out) {
              DenseView other = x;
              if (x.dtype == DType::kBFloat16) other.dtype = DType::kFloat16;
              Q8().encode(p, other, first, out);
            }, nullptr)},
      {"rows are those of head_dim 64",
       With([](const CodecParams& p, DenseView const& x, int64_t first, const KvView& out) {
              DenseView narrow = x;
              narrow.head_dim = std::min<int64_t>(64, x.head_dim);
              Q8().encode(p, narrow, first, out);
            }, nullptr)},
      {"nibbles are swapped", [] {
         Codec codec = FindScheme("q4_0").keys;
         codec.encode = [](const CodecParams& p, const DenseView& x, int64_t first, const KvView& out) {
           FindScheme("q4_0").keys.encode(p, x, first, out);
           SwapNibbles(out, first, x.tokens);
         };
         codec.decode = [](const CodecParams& p, const KvView& in, int64_t first, const DenseView& out) {
           SwapNibbles(in, first, out.tokens);
           FindScheme("q4_0").keys.decode(p, in, first, out);
           SwapNibbles(in, first, out.tokens);
         };
         return codec;
       }()},
  };
  const auto row = [&](const char* what, const auto& change) {
    Codec codec = Q8();
    change(codec);
    defects.emplace_back(what, codec);
  };
  row("nmse ten times too large", [](Codec& codec) { codec.nmse *= 10; });
  row("nmse ten times too small", [](Codec& codec) { codec.nmse /= 10; });
  row("nmse 3 % too large", [](Codec& codec) { codec.nmse *= 1.03; });
  row("an nmse that may be off by half of it", [](Codec& codec) { codec.nmse_tolerance = 0.5; });
  row("nobody says where the nmse comes from", [](Codec& codec) { codec.nmse_source = ""; });
  row("no golden file and no reason", [](Codec& codec) { codec.golden = nullptr; });
  row("another scheme's golden file", [](Codec& codec) { codec.golden = "q4_0.json"; });
  row("no CUDA twin", [](Codec& codec) { codec.encode_cuda = nullptr; });
  row("groups that it does not take", [](Codec& codec) { codec.groups = kThreeGroups; });
  row("head_dims that it takes and does not name", [](Codec& codec) { codec.head_dim_multiple = 64; });
  row("a plane of codes that is too small", [](Codec& codec) {
    codec.planes = [](int64_t heads, int64_t head_dim, const CodecParams& p) {
      std::vector<Plane> planes = Q8().planes(heads, head_dim, p);
      planes[0].bytes -= 1;
      return planes;
    };
  });
  row("a plane of metadata that is too small", [](Codec& codec) {
    codec.planes = [](int64_t heads, int64_t head_dim, const CodecParams& p) {
      std::vector<Plane> planes = Q8().planes(heads, head_dim, p);
      planes[1].bytes /= 2;
      return planes;
    };
  });
  row("a plane that is too large", [](Codec& codec) {
    codec.planes = [](int64_t heads, int64_t head_dim, const CodecParams& p) {
      std::vector<Plane> planes = Q8().planes(heads, head_dim, p);
      planes[1].bytes += 1;
      return planes;
    };
  });
  for (const auto& [what, codec] : defects) {
    const std::string found = FoundBy(codec);
    std::printf("%-55s %s\n", what.c_str(), found.empty() ? "NOT FOUND" : found.c_str());
    EXPECT_NE(found, "") << what;
  }
  EXPECT_GT(defects.size(), 30u);
}

}  // namespace
}  // namespace kvq
