// How a token's channels are turned by a Hadamard matrix, the same bits on host and device; and which turn attention over turned
// tokens takes, by Rotation (rotation.h) or by the scheme itself.
#pragma once

#include <cstdint>
#ifndef __CUDACC__
#include <cmath>
#endif

#include "kernels/vector_math.h"

namespace kvq {

// By which a token was turned before it was encoded: its channels' signs first, where `signs`; then Hadamard matrices over
// neighbouring `block` channels, a power of two. block 0: it was not.
struct Turn {
  int32_t block = 0;
  bool signs = false;
};

// Bit i of the words says whether channel i keeps its sign (rotation.h says which vector that is). A shorter vector of that
// generator is a longer one's beginning.
inline constexpr int64_t kMostSigns = 512;
inline constexpr uint64_t kKeepsSign[kMostSigns / 64] = {0x808035b16573590d, 0x6b7f5438a6443d6c, 0xabafc4414aa48b81,
                                                         0xfa2043a0320b9848, 0xa8a9c7cb4d6e1c33, 0x9803b3591b951dda,
                                                         0xcd26200e3038796e, 0x8a9dacb9c9a02476};

namespace plain {

// The one thread that turns a token's numbers on a CPU.
struct Alone {
  static constexpr int rank = 0, size = 1;
  KVQ_HD void Sync() const {}
  KVQ_HD static int Seen(int n) { return n; }
};

// Number i of those that this thread sees.
template <typename Numbers>
KVQ_HD inline decltype(auto) PartOf(Numbers&& x, int i) {
  if constexpr (requires { x.Part(i); }) {
    return x.Part(i);
  } else {
    return x[i];
  }
}

// Each of a token's n numbers becomes change(number). A team's thread sees Seen(n) of them.
template <typename Numbers, typename Team, typename Change>
KVQ_HD inline void ForEachNumber(Numbers&& x, int n, const Team& team, const Change& change) {
  KVQ_UNROLL_OWN
  for (int i = team.rank; i < team.Seen(n); i += team.size) PartOf(x, i) = change(PartOf(x, i));
  team.Sync();
}

#ifndef __CUDACC__
// Butterflies of n numbers, a multiple of 8, as below.
KVQ_VECTOR inline void EightButterflies(float* x, int n, int block) {
  using Eight = float __attribute__((vector_size(32), aligned(4), may_alias));
  auto* const of = reinterpret_cast<Eight*>(x);
  for (int i = 0; i < n / 8; ++i) {
    Eight v = of[i];
    if (block > 1) v = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6) + v * Eight{1, -1, 1, -1, 1, -1, 1, -1};
    if (block > 2) v = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5) + v * Eight{1, 1, -1, -1, 1, 1, -1, -1};
    if (block > 4) v = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3) + v * Eight{1, 1, 1, 1, -1, -1, -1, -1};
    of[i] = v;
  }
  for (int distance = 1; distance < block / 8; distance *= 2) {
    for (int pair = 0; pair < n / 16; ++pair) {
      const int i = 2 * pair - (pair & (distance - 1));
      const Eight u = of[i], v = of[i + distance];
      of[i] = u + v, of[i + distance] = u - v;
    }
  }
}
#endif

// Each `block` of n numbers times the Sylvester matrix of (-1)^popcount(i & j), in place: butterflies over distances 1, 2, 4, ...
template <typename Numbers, typename Team>
KVQ_HD inline void Butterflies(Numbers&& x, int n, int block, const Team& team) {
  if constexpr (requires { team.Butterflies(x, n, block); }) {
    team.Butterflies(x, n, block);
  } else {
#ifndef __CUDACC__
    if constexpr (requires(float* numbers) { numbers = x; }) {
      if (n % 8 == 0) return EightButterflies(x, n, block);
    }
#endif
    for (int distance = 1; distance < block; distance *= 2) {
      for (int pair = team.rank; pair < n / 2; pair += team.size) {
        const int i = 2 * pair - (pair & (distance - 1));
        const float u = x[i], v = x[i + distance];
        x[i] = u + v, x[i + distance] = u - v;
      }
      team.Sync();
    }
  }
}

// Each number of a token times a factor.
template <typename Numbers, typename Team>
KVQ_HD inline void Scale(Numbers&& x, int n, float factor, const Team& team) {
  ForEachNumber(x, n, team, [&](float v) { return v * factor; });
}

// Each `block` of n numbers times the Hadamard matrix, Sylvester's over sqrt(block), which is its own inverse: first the
// factor, then butterflies, as ggml does it.
template <typename Numbers, typename Team>
KVQ_HD inline void Hadamard(Numbers&& x, int n, int block, const Team& team) {
#ifdef __CUDACC__
  if constexpr (requires { team.InRegisters(x, n, block); }) {
    if (team.InRegisters(x, n, block)) return;
  }
#endif
  Scale(x, n, 1 / sqrtf(static_cast<float>(block)), team);
  Butterflies(x, n, block, team);
}

#ifdef __CUDACC__
// 1 / sqrtf(x) of a power of two, to the same bits: 2^-n or, between those, 1 / sqrtf(2) of it.
__device__ __forceinline__ float InverseRootOfPower(int x) {
  const int log = 31 - __clz(x);
  return BitsFloat(static_cast<uint32_t>(127 - log / 2) << 23) * (log % 2 != 0 ? 0.70710677f : 1.0f);
}

// A warp that does so.
struct Warp {
  static constexpr int size = 32;
  int rank;
  __device__ __forceinline__ void Sync() const { __syncwarp(); }
  __device__ static int Seen(int n) { return n; }

  // Hadamard of numbers that the warp's registers hold, without a trip to shared memory for each distance: the same
  // operations. False, and nothing is done, for an n that is none of 64, 128, 256 or 512.
  template <typename Numbers>
  __device__ __forceinline__ bool InRegisters(Numbers&& x, int n, int block) const {
    switch (n) {
      case 64: Butterfly<2>(x, block); return true;
      case 128: Butterfly<4>(x, block); return true;
      case 256: Butterfly<8>(x, block); return true;
      case 512: Butterfly<16>(x, block); return true;
      default: return false;
    }
  }
  template <int kEach, typename Numbers>
  __device__ __forceinline__ void Butterfly(Numbers&& x, int block) const {
    float v[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) v[i] = x[rank + 32 * i];
    Turn(v, block);
    Sync();
#pragma unroll
    for (int i = 0; i < kEach; ++i) x[rank + 32 * i] = v[i];
    Sync();
  }
  // The same of numbers rank, rank + 32, ...
  template <int kEach>
  __device__ __forceinline__ void Turn(float (&v)[kEach], int block) const {
    const float factor = InverseRootOfPower(block);
#pragma unroll
    for (int i = 0; i < kEach; ++i) v[i] *= factor;
    const int in_lanes = block < 32 ? block : 32;
#pragma unroll 1  // instructions that are seldom run take longer to be fetched than to run
    for (int distance = 1; distance < in_lanes; distance *= 2) {
      const float sign = (rank & distance) != 0 ? -1 : 1;  // the upper one has the difference
#pragma unroll
      for (int i = 0; i < kEach; ++i) v[i] = fmaf(v[i], sign, __shfl_xor_sync(~0u, v[i], distance));
    }
#pragma unroll
    for (int distance = 1; distance < kEach; distance *= 2) {
      if (32 * distance >= block) continue;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if ((i & distance) != 0) continue;
        const float u = v[i], w = v[i + distance];
        v[i] = u + w, v[i + distance] = u - w;
      }
    }
  }
};

// kLanes neighbouring lanes of a warp that have a token's numbers in registers, each its part, as all other lanes have other tokens'.
template <int kLanes>
struct OwnLanes {
  static constexpr int rank = 0, size = 1;
  __device__ __forceinline__ void Sync() const {}
  __device__ static constexpr int Seen(int n) { return n / kLanes; }

  template <typename Numbers>
  __device__ __forceinline__ void Butterflies(Numbers&& x, int n, int block) const {
    const int own = Seen(n);
    KVQ_UNROLL_OWN
    for (int distance = 1; distance < (block < own ? block : own); distance *= 2) {
      KVQ_UNROLL_OWN
      for (int pair = 0; pair < own / 2; ++pair) {
        const int i = 2 * pair - (pair & (distance - 1));
        const float u = x.Part(i), v = x.Part(i + distance);
        x.Part(i) = u + v, x.Part(i + distance) = u - v;
      }
    }
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) {
      if (lanes * own >= block) continue;
      const float sign = (threadIdx.x & lanes) != 0 ? -1 : 1;  // the upper one has the difference
      KVQ_UNROLL_OWN
      for (int i = 0; i < own; ++i) x.Part(i) = fmaf(x.Part(i), sign, __shfl_xor_sync(~0u, x.Part(i), lanes));
    }
  }
};
#endif

}  // namespace plain

#ifdef __CUDACC__
struct DeviceSigns {
  uint64_t keeps[kMostSigns / 64];
};
__device__ const DeviceSigns kDeviceSigns = {{kKeepsSign[0], kKeepsSign[1], kKeepsSign[2], kKeepsSign[3], kKeepsSign[4],
                                              kKeepsSign[5], kKeepsSign[6], kKeepsSign[7]}};

template <typename Numbers>
__device__ __forceinline__ void TurnSigns(Numbers&& x, int n, int lane) {
#pragma unroll 1
  for (int first = 0; first < n; first += 32) {
    const int i = first + lane;
    if (i < n) x[i] = kDeviceSigns.keeps[i / 64] >> i % 64 & 1 ? x[i] : -x[i];
  }
  __syncwarp();
}
// A warp turns a token's n numbers in place, which its lanes see, and back.
template <typename Numbers>
__device__ __forceinline__ void TurnBy(const Turn& turn, Numbers&& x, int n, int lane) {
  if (turn.signs) TurnSigns(x, n, lane);
  plain::Hadamard(x, n, turn.block, plain::Warp{lane});
}
template <typename Numbers>
__device__ __forceinline__ void TurnBack(const Turn& turn, Numbers&& x, int n, int lane) {
  plain::Hadamard(x, n, turn.block, plain::Warp{lane});
  if (turn.signs) TurnSigns(x, n, lane);
}
#endif

}  // namespace kvq
