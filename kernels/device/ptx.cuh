// PTX instructions that CUDA C++ has no name for, and short names for what the kernels use all the time. Device code
// alone, and without CUDA's own headers: NVRTC then needs none.
// sm_80 and later.
#pragma once

#include <cstdint>

#include "kernels/device/tensor_map.h"

namespace kvq {

// Lets the successor begin once all blocks have come here; it still waits for this kernel's end before it reads.
__device__ __forceinline__ void LaunchDependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until all that was launched before has ended, and sees what it wrote. What it wrote is read past the L1
// cache (__ldcg): there could be older lines.
__device__ __forceinline__ void WaitForPredecessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

namespace ptx {

// ---- shared memory by its own 32-bit addresses, so that a lane keeps one register and constant offsets

using Shared = uint32_t;
__device__ __forceinline__ Shared SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// n words, 4 n bytes aligned.
template <int n>
__device__ __forceinline__ void LoadShared(Shared at, uint32_t (&words)[n]) {
  static_assert(n == 1 || n == 2 || n == 4 || n == 8);
  if constexpr (n >= 4) {
#pragma unroll
    for (int i = 0; i < n; i += 4) {
      asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                   : "r"(at + 4 * i));
    }
  } else if constexpr (n == 2) {
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(at));
  } else {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(at));
  }
}

__device__ __forceinline__ uint32_t LoadShared16(Shared at) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(at));
  return x;
}
__device__ __forceinline__ void StoreShared(Shared at, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(word) : "memory");
}
__device__ __forceinline__ void ZeroShared16(Shared at) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(static_cast<uint16_t>(0)) : "memory");
}

// Of this thread in its block. The compiler then knows that a warp's lanes have one number: where they branch by it they stay together,
// and shuffles behind that need no code for lanes that came apart.
__device__ __forceinline__ int WarpNumber() { return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0); }
// blockIdx.x, read here: what follows from it needs no registers before.
__device__ __forceinline__ int BlockNumber() {
  int block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

// Waits until so many threads of the block have come to its barrier `id`, 1 to 15.
__device__ __forceinline__ void SyncThreads(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- asynchronous copies of 16 bytes from global to shared memory, both aligned to 16

__device__ __forceinline__ void CopyAsync(Shared shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
// How the L2 cache treats lines. Of what is read once, as a step's weights are, they are the first that it gives up: on an H200 a
// step is 0.2 to 2 % shorter so.
struct CachePolicy {
  uint64_t bits;
};
__device__ __forceinline__ CachePolicy ReadOnce() {
  CachePolicy policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy.bits));
  return policy;
}
// The same, but no compiler knows whether it is the same in all lanes. An address whose parts are known to be makes ptxas 13.0 write an
// instruction that no card has, for a copy with a policy (a descriptor in an odd register).
__device__ __forceinline__ Shared OfLanes(Shared shared) {
  Shared nothing;
  asm("{ .reg .u32 lane; mov.u32 lane, %%laneid; shr.u32 %0, lane, 5; }" : "=r"(nothing));
  return shared + nothing;
}
__device__ __forceinline__ void CopyAsync(Shared shared, const void* global, CachePolicy policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "l"(policy.bits)
               : "memory");
}
// Zeros instead, and nothing read, where not `there`.
__device__ __forceinline__ void CopyAsyncOrZero(Shared shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(there ? 16 : 0)
               : "memory");
}
// Ends a group of copies of this thread.
__device__ __forceinline__ void CopyCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Asks for the line of `global` to be in the L2 cache by the time it is read.
__device__ __forceinline__ void Prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global) : "memory");
}
// Waits until all but the newest n groups of this thread have arrived.
template <int n>
__device__ __forceinline__ void CopyWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// ---- bulk copies, from sm_90 on: one thread asks, a barrier in shared memory says when all bytes have arrived

__device__ __forceinline__ void InitBarrier(Shared barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
#endif
}
// Copies find what this thread has initialized.
__device__ __forceinline__ void FenceBarriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// A phase of the barrier ends when so many bytes have come.
__device__ __forceinline__ void ExpectBytes(Shared barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}
// A phase of the barrier ends.
__device__ __forceinline__ void Arrive(Shared barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}
// Waits until the phase with that parity, 0 of the first, has ended.
__device__ __forceinline__ void WaitFor(Shared barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t ended = 0;
  while (ended == 0) {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(ended)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  }
#endif
}
// Rows by their tensor map (kernels/runtime/tensor_map.h), from row `first` of [b] on, to a multiple of 1024.
__device__ __forceinline__ void CopyBoxes(Shared shared, const TensorMap& map, int first, int b, Shared barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %2, %4}], [%5];" ::"r"(shared),
               "l"(&map), "r"(0), "r"(first), "r"(b), "r"(barrier)
               : "memory");
#endif
}

// ---- d += a b: a [16, 16] row by row, b [16, 8] column by column, 16-bit pairs along the 16; d [16, 8] in
// float32. Lane 4 g + t holds of a: rows g (a0, a2) and g + 8 (a1, a3), columns 2 t, 2 t + 1 (a0, a1) and
// 8 more (a2, a3); of b: column g, rows 2 t, 2 t + 1 (b0) and 8 more (b1); of d: columns 2 t, 2 t + 1 of
// rows g (d0, d1) and g + 8 (d2, d3). Subnormal numbers count in full.

__device__ __forceinline__ void MmaHalf(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                        uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void MmaBFloat16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d += a b in whole numbers: a [16, 32] row by row, b [32, 8] column by column, four signed bytes a word along the 32.
// As above with 4 t ... 4 t + 3 for 2 t, 2 t + 1, and 16 more for 8 more; d as there.
__device__ __forceinline__ void MmaInt8(int32_t (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                        uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane 8 i + r says where row r of matrix i is (16 bytes,
// aligned); word i of lane 4 g + t is columns 2 t, 2 t + 1 of row g of matrix i, transposed: rows 2 t, 2 t + 1 of
// column g.
__device__ __forceinline__ void LoadMatrices(Shared row, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row));
}
__device__ __forceinline__ void LoadMatricesTransposed(Shared row, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row));
}

// The 8 x 8 matrix of 16-bit numbers whose row g has columns 2 t, 2 t + 1 in lane 4 g + t, transposed.
__device__ __forceinline__ uint32_t Transpose(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// Adds to a number in global memory and returns what it was: what this block wrote before (up to a
// __syncthreads) is seen by whoever adds later, and what those before had written is seen from here on.
__device__ __forceinline__ int AddInOrder(int* to, int x) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(x) : "memory");
  return before;
}

// Numbers in global memory by which one block waits for another: each is seen as a whole, once it is seen, and says nothing of others.
__device__ __forceinline__ void StoreSeen(float4* to, const float4& x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}
__device__ __forceinline__ void StoreSeen(float2* to, const float2& x) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1,%2};" ::"l"(to), "f"(x.x), "f"(x.y) : "memory");
}
// Only where `wanted`, and without a branch: so that several are on their way at once.
__device__ __forceinline__ void LoadSeen(const float4* from, bool wanted, float4& x) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];}"
               : "+f"(x.x), "+f"(x.y), "+f"(x.z), "+f"(x.w)
               : "l"(from), "r"(static_cast<int>(wanted))
               : "memory");
}
__device__ __forceinline__ void LoadSeen(const float2* from, bool wanted, float2& x) {
  asm volatile("{.reg .pred p; setp.ne.s32 p, %3, 0; @p ld.relaxed.gpu.global.v2.f32 {%0,%1}, [%2];}"
               : "+f"(x.x), "+f"(x.y)
               : "l"(from), "r"(static_cast<int>(wanted))
               : "memory");
}

// ---- clusters: blocks that run at the same time and see each other's shared memory, from sm_90 on

// All threads of all blocks arrive, and then wait for each other. Where one of a block's threads arrives with `release`, after these have
// met, all see what that block wrote before; it waits for all that is on its way to device memory.
__device__ __forceinline__ void ArriveInCluster(bool release) {
#if __CUDA_ARCH__ >= 900
  if (release) {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
#endif
}
__device__ __forceinline__ void WaitForCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// Where another block of the cluster has what this one has at `p` in its shared memory.
template <typename T>
__device__ __forceinline__ const T* InBlock(const T* p, int block) {
  const T* there = p;
#if __CUDA_ARCH__ >= 900
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(block));
#endif
  return there;
}

// ---- arithmetic

// 2^x and log2 x by the special function unit: relative error 2^-22; 2^-inf = 0.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float Log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Bytes of the eight in (low, high), picked by the four low digits of `selector`.
__device__ __forceinline__ uint32_t PickBytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// Two 16-bit numbers in a word, the first in the low half.
__device__ __forceinline__ uint32_t PackHalf(float first, float second) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
__device__ __forceinline__ uint32_t PackBFloat16(float first, float second) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
}
__device__ __forceinline__ float HalfAt(uint32_t word, int index) {
  float x;
  if (index == 0) {
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(x) : "r"(word));
  } else {
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(x) : "r"(word));
  }
  return x;
}
__device__ __forceinline__ float BFloat16At(uint32_t word, int index) {
  return __uint_as_float(index == 0 ? word << 16 : word & 0xFFFF0000u);
}
// The larger of each half; a number before NaN.
__device__ __forceinline__ uint32_t MaxHalf(uint32_t a, uint32_t b) {
  uint32_t word;
  asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}
__device__ __forceinline__ uint32_t MaxBFloat16(uint32_t a, uint32_t b) {
  uint32_t word;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}
// 1 / x of normal numbers, relative error 2^-23.
__device__ __forceinline__ float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / sqrt(x), relative error 2^-22.
__device__ __forceinline__ float InverseRoot(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Of pairs of float16, their squares' sum in float16 by halves: of numbers around 1, few enough to stay below 2^10.
template <int n>
__device__ __forceinline__ float SumOfSquares(const uint32_t (&pairs)[n]) {
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) asm("fma.rn.f16x2 %0, %1, %1, %0;" : "+r"(sum) : "r"(pairs[i]));
  return HalfAt(sum, 0) + HalfAt(sum, 1);
}
__device__ __forceinline__ uint32_t MultiplyHalf(uint32_t a, uint32_t b) {
  uint32_t word;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
  return word;
}

}  // namespace ptx
}  // namespace kvq
