#include "kernels/device/sage.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "kernels/device/sage.cuh"
#include "kernels/error.h"
#include "kernels/runtime/launch.h"

namespace kvq {
namespace {

using namespace sage;

// Logits are base 2: the factor goes into the queries before they are rounded.
float QueryFactor(const SageArgs& a) { return static_cast<float>(a.scale * 1.4426950408889634); }

void CheckArgs(const SageArgs& a) {
  const DenseView &q = a.queries, &k = a.keys;
  const auto alike = [](const DenseView& x, const DenseView& y) {
    return x.batch == y.batch && x.heads == y.heads && x.tokens == y.tokens && x.head_dim == y.head_dim &&
           x.dtype == y.dtype;
  };
  if (k.head_dim != 64 && k.head_dim != 128) {
    throw InputError("sage knows a head_dim of 64 and 128, not ", k.head_dim);
  }
  if (!alike(k, a.values) || !alike(q, a.out) || q.batch != k.batch || q.dtype != k.dtype || q.head_dim != k.head_dim ||
      k.heads < 1 || q.heads % k.heads != 0 || q.tokens > k.tokens) {
    throw InputError("sage wants queries of the last of the keys' tokens, some heads a KV head, all of one type");
  }
  if (!(a.scale > 0)) throw InputError("sage wants a scale above 0, not ", a.scale);
}

}  // namespace

SageWorkspace LayOutSage(const SageArgs& a) {
  SageWorkspace w = {};
  const int64_t queries = a.queries.batch * a.queries.heads, keys = a.keys.batch * a.keys.heads, dim = a.keys.head_dim;
  const int64_t query_blocks = queries * BlocksOf(a.queries.tokens, kSageQueries);
  const int64_t key_blocks = keys * BlocksOf(a.keys.tokens, kSageKeys);
  const auto take = [&](auto*& part, int64_t count) {
    part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(static_cast<std::byte*>(a.workspace) + w.bytes);
    w.bytes += (count * static_cast<int64_t>(sizeof *part) + 15) / 16 * 16;
  };
  take(w.query_codes, query_blocks * kSageQueries * dim);
  take(w.key_codes, key_blocks * kSageKeys * dim);
  take(w.query_scales, query_blocks);
  take(w.key_scales, key_blocks);
  take(w.key_sums, key_blocks * dim);
  take(w.key_means, keys * dim);
  return w;
}

// ---- CPU

namespace {

// Adds rows 0 ... count - 1 of `dim` floats into `sum`, in strands.
template <typename Row>
void AddInStrands(int64_t count, int64_t dim, const Row& row, float* sum) {
  std::vector<float> strands(kStrands * dim), one(dim);
  for (int64_t i = 0; i < count; ++i) {
    row(i, one.data());
    float* strand = strands.data() + i % kStrands * dim;
    for (int64_t c = 0; c < dim; ++c) strand[c] += one[c];
  }
  std::fill(sum, sum + dim, 0.0f);
  for (int64_t s = 0; s < kStrands; ++s) {
    for (int64_t c = 0; c < dim; ++c) sum[c] += strands[s * dim + c];
  }
}

void LoadRow(const DenseView& x, int64_t b, int64_t head, int64_t token, float* row) {
  const int64_t at = RowOf(x, b, head, token);
  for (int64_t c = 0; c < x.head_dim; ++c) row[c] = LoadElement(x.data, x.dtype, at + c);
}

// The mean over all tokens of every channel of one head.
void KeyMeans(const SageArgs& a, const SageWorkspace& w, int64_t b, int64_t head) {
  const DenseView& k = a.keys;
  const int64_t pair = b * k.heads + head, blocks = BlocksOf(k.tokens, kSageKeys), dim = k.head_dim;
  float *sums = w.key_sums + pair * blocks * dim, *means = w.key_means + pair * dim;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kSageKeys;
    AddInStrands(std::min(kSageKeys, k.tokens - first), dim,
                 [&](int64_t i, float* row) { LoadRow(k, b, head, first + i, row); }, sums + block * dim);
  }
  AddInStrands(blocks, dim, [&](int64_t i, float* row) { std::copy_n(sums + i * dim, dim, row); }, means);
  for (int64_t c = 0; c < dim; ++c) means[c] /= static_cast<float>(k.tokens);
}

// Codes and scale of one block of one head: (x - mean) * factor, mean null for none.
void Quantize(const DenseView& x, int64_t b, int64_t head, int64_t block, int64_t block_tokens, const float* means,
              float factor, int8_t* codes, float* scales) {
  const int64_t dim = x.head_dim, at = (b * x.heads + head) * BlocksOf(x.tokens, block_tokens) + block;
  const int64_t first = block * block_tokens, count = std::min(block_tokens, x.tokens - first);
  std::vector<float> rows(static_cast<size_t>(block_tokens * dim));
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    float* row = rows.data() + i * dim;
    LoadRow(x, b, head, first + i, row);
    for (int64_t c = 0; c < dim; ++c) {
      row[c] = means != nullptr ? row[c] - means[c] : row[c] * factor;
      largest = std::max(largest, Magnitude(row[c]));
    }
  }
  scales[at] = ScaleOf(largest);
  int8_t* to = codes + at * block_tokens * dim;
  for (int64_t i = 0; i < block_tokens * dim; ++i) to[i] = CodeOf(rows[i], scales[at]);
}

KVQ_VECTOR int32_t Dot(const int8_t* a, const int8_t* b, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

KVQ_VECTOR void AddScaled(float* to, const float* x, float by, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += x[i] * by;
}

float Rounded(float x, DType dtype) {
  return dtype == DType::kFloat16    ? HalfToFloat(FloatToHalf(x))
         : dtype == DType::kBFloat16 ? BFloat16ToFloat(FloatToBFloat16(x))
                                     : x;
}

// The queries of one block, over all tiles of keys that one of them sees.
void AttendBlock(const SageArgs& a, const SageWorkspace& w, int64_t b, int64_t head, int64_t block) {
  const DenseView &q = a.queries, &k = a.keys;
  const int64_t dim = q.head_dim, history = k.tokens - q.tokens, kv_head = head / (q.heads / k.heads);
  const int64_t first = block * kSageQueries, count = std::min(kSageQueries, q.tokens - first);
  const int64_t of_queries = (b * q.heads + head) * BlocksOf(q.tokens, kSageQueries) + block;
  const int64_t of_keys = (b * k.heads + kv_head) * BlocksOf(k.tokens, kSageKeys);
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  std::vector<float> sums(kSageQueries * dim), values(kSageKeys * dim), m(kSageQueries, kNothing), l(kSageQueries);
  const int64_t tiles = BlocksOf(history + first + count, kSageKeys);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first_key = tile * kSageKeys;
    for (int64_t j = 0; j < std::min(kSageKeys, k.tokens - first_key); ++j) {
      LoadRow(a.values, b, kv_head, first_key + j, values.data() + j * dim);
    }
    const int8_t* keys = w.key_codes + (of_keys + tile) * kSageKeys * dim;
    const float unit = w.query_scales[of_queries] * w.key_scales[of_keys + tile];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t seen = std::min(kSageKeys, history + first + i + 1 - first_key);
      if (seen <= 0) continue;
      const int8_t* query = w.query_codes + (of_queries * kSageQueries + i) * dim;
      float dots[kSageKeys], top = kNothing;
      for (int64_t j = 0; j < seen; ++j) {
        dots[j] = static_cast<float>(Dot(query, keys + j * dim, dim));
        top = std::max(top, dots[j]);
      }
      const float before = m[i];
      m[i] = Larger(top * unit, before);
      const float factor = std::exp2(before - m[i]);
      float* sum = sums.data() + i * dim;
      l[i] *= factor;
      for (int64_t c = 0; c < dim; ++c) sum[c] *= factor;
      for (int64_t j = 0; j < seen; ++j) {
        const float p = std::exp2(std::fma(dots[j], unit, -m[i]));
        l[i] += p;
        AddScaled(sum, values.data() + j * dim, Rounded(p, q.dtype), dim);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = RowOf(a.out, b, head, first + i);
    const float inverse = 1 / l[i];
    for (int64_t c = 0; c < dim; ++c) StoreElement(a.out.data, q.dtype, at + c, sums[i * dim + c] * inverse);
  }
}

}  // namespace

void SageAttention(const SageArgs& a) {
  CheckArgs(a);
  const DenseView &q = a.queries, &k = a.keys;
  const SageWorkspace w = LayOutSage(a);
  const int64_t key_blocks = BlocksOf(k.tokens, kSageKeys), query_blocks = BlocksOf(q.tokens, kSageQueries);
#pragma omp parallel
  {
#pragma omp for schedule(dynamic)
    for (int64_t pair = 0; pair < k.batch * k.heads; ++pair) KeyMeans(a, w, pair / k.heads, pair % k.heads);
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < k.batch * k.heads * key_blocks; ++i) {
      const int64_t pair = i / key_blocks;
      Quantize(k, pair / k.heads, pair % k.heads, i % key_blocks, kSageKeys, w.key_means + pair * k.head_dim, 1,
               w.key_codes, w.key_scales);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < q.batch * q.heads * query_blocks; ++i) {
      const int64_t pair = i / query_blocks;
      Quantize(q, pair / q.heads, pair % q.heads, i % query_blocks, kSageQueries, nullptr, QueryFactor(a),
               w.query_codes, w.query_scales);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < q.batch * q.heads * query_blocks; ++i) {
      const int64_t pair = i / query_blocks;
      AttendBlock(a, w, pair / q.heads, pair % q.heads, i % query_blocks);
    }
  }
}

// ---- GPU

void SageAttentionCuda(const SageArgs& a, void* stream) {
  CheckArgs(a);
  if (a.queries.dtype == DType::kFloat32) throw InputError("sage on a GPU wants float16 or bfloat16");
  bool aligned = reinterpret_cast<uintptr_t>(a.workspace) % 16 == 0;
  for (const DenseView* x : {&a.queries, &a.keys, &a.values, &a.out}) {
    aligned &= (reinterpret_cast<uintptr_t>(x->data) | (x->batch_stride | x->head_stride | x->token_stride) * 2) % 16 == 0;
  }
  if (!aligned) throw InputError("sage wants all rows aligned to 16 bytes");
  if (a.queries.batch == 0 || a.queries.tokens == 0) return;
  const SageWorkspace w = LayOutSage(a);
  const int dim = static_cast<int>(a.keys.head_dim);
  const bool bfloat16 = a.queries.dtype == DType::kBFloat16;
  const auto blocks = [](const DenseView& x, int64_t tokens) {
    return static_cast<unsigned>(x.batch * x.heads * BlocksOf(x.tokens, tokens));
  };
  const unsigned keys = blocks(a.keys, kSageKeys), queries = blocks(a.queries, kSageQueries);
  const unsigned heads = static_cast<unsigned>(a.keys.batch * a.keys.heads);
  const auto kernel = [](const std::string& name, unsigned grid, int threads, int shared_bytes = 0) {
    return KernelLaunch{.instance = {{"kernels/device/sage.cuh"}, name},
                        .grid = grid,
                        .threads = threads,
                        .shared_bytes = static_cast<size_t>(shared_bytes),
                        .early = false};
  };
  constexpr char kWhat[] = "sage";
  Launch(kWhat, kernel(InstanceName("kvq::sage::KeySumsKernel", dim, bfloat16), keys, kStrands * dim / 8), stream, a, w);
  Launch(kWhat, kernel(InstanceName("kvq::sage::KeyMeansKernel", dim), heads, kStrands * dim / 4), stream, a, w);
  Launch(kWhat, kernel(InstanceName("kvq::sage::QuantizeKernel", dim, bfloat16, true), keys, kQuantizeThreads), stream, a, w,
         1.0f);
  Launch(kWhat, kernel(InstanceName("kvq::sage::QuantizeKernel", dim, bfloat16, false), queries, kQuantizeThreads), stream, a,
         w, QueryFactor(a));
  Launch(kWhat,
         kernel(InstanceName("kvq::sage::AttendKernel", dim, bfloat16), queries, kThreads,
                dim == 64 ? Tiles<64>::kBytes : Tiles<128>::kBytes),
         stream, a, w);
}

}  // namespace kvq
