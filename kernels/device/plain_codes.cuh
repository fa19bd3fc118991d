// The codec (codecs.cuh) of a plain scheme that says what its codes and the metadata of a group are to tensor cores
// (kElement and LineOf, kernels/plain.h). Device code alone.
#pragma once

#include "kernels/device/codecs.cuh"
#include "kernels/plain.h"
#include "kernels/small_float.h"

namespace kvq {

// A number as float16's bits, to the nearest, ties to even, of magnitudes from 2^-14 to 65504, and 0.
constexpr uint32_t ConstantHalf(float x) {
  const auto bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  const uint32_t half = magnitude == 0 ? 0 : (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  return half | (bits >> 16 & 0x8000);
}

// A scheme's table as bytes of float16: [low and high byte, four entries a word]; and as whole numbers.
template <class S, int kDim>
struct TableBytes {
  static constexpr int kWords = S::kBits == 4 ? 4 : 2;
  uint32_t bytes[2][kWords] = {}, whole[kWords] = {};
  constexpr TableBytes() {
    for (int code = 0; code < 4 * kWords; ++code) {
      const float entry = S::TableEntry(code, kDim);
      const uint32_t half = ConstantHalf(entry);
      whole[code / 4] |= (entry >= 0 && entry < 256 ? static_cast<uint32_t>(entry) : 0) << code % 4 * 8;
      bytes[0][code / 4] |= (half & 0xFF) << code % 4 * 8;
      bytes[1][code / 4] |= half >> 8 << code % 4 * 8;
    }
  }
};

template <class S, int kGroup_, int kDim>
struct PlainCodes {
  static constexpr int kOdd = plain::kOdd<S>;
  static constexpr bool kDense = false, kCentred = !plain::kHasZero<S>, kSigned = true;
  static constexpr bool kNormed = plain::kNormed<S>, kMayBreak = S::kElement == plain::Element::kE4M3 && plain::kMembers<S> == 0;
  static constexpr int kBits = plain::kLow<S>, kGroup = kGroup_, kTokens = 1;
  static constexpr bool kOfVector = plain::kHasVector<S>;
  static constexpr int kPlanes = kOfVector ? 1 : plain::kMembers<S>;
  static constexpr int kMetaBytes = [] {
    if constexpr (kOfVector) return static_cast<int>(sizeof(plain::Vector<S>));
    else if constexpr (plain::kMembers<S> > 0) return S::kStored[0];
    else return 0;
  }();
  static constexpr Zero kZero = [] {
    if constexpr (plain::kHasZero<S>) return S::kZero;
    else return Zero::kOfCodes;
  }();
  static constexpr plain::Element kElement = S::kElement;
  static constexpr plain::ScaleByte kScaleByte = plain::kScaleByte<S>;
  static constexpr bool kPoisons = kScaleByte == plain::ScaleByte::kE4M3;
  // What operands have too little; and scales, where a float16 of an E4M3's exponent is 2^8 too small.
  static constexpr float kElementUnit = kElement == plain::Element::kNumber || kElement == plain::Element::kBytes ? 16777216.0f
                                        : kElement == plain::Element::kE4M3 ? 256.0f
                                        : kElement == plain::Element::kE2M1 ? 16384.0f : 1.0f;
  static constexpr float kUnit = kElementUnit * (kPoisons ? 256.0f : 1.0f);

  // What a warp encodes a token with, in shared memory; and that: of `pair`, the KV head of a sequence, whose channels, 16-bit numbers,
  // are kDim / 2 words, turned before, to the last of so many slots; 0: nothing is encoded.
  using Room = plain::EncoderRoom<S, kDim, kDim / kGroup, 1>;
  template <bool kTurned>
  __device__ __forceinline__ static void Encode(Room& room, const uint32_t* token, bool half, const Turn& turn, const KvView& out,
                                                int pair, const int32_t* slots) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    uint32_t words[kDim / 64];
#pragma unroll
    for (int i = 0; i < kDim / 64; ++i) words[i] = __ldcg(token + lane + 32 * i);
    const int32_t slot = __ldcg(slots) - 1;
#pragma unroll
    for (int i = 0; i < kDim / 64; ++i) {
      const int at = 2 * (lane + 32 * i);
      room.tile[plain::Padded(at)] = half ? ptx::HalfAt(words[i], 0) : ptx::BFloat16At(words[i], 0);
      room.tile[plain::Padded(at + 1)] = half ? ptx::HalfAt(words[i], 1) : ptx::BFloat16At(words[i], 1);
    }
    if (__any_sync(~0u, slot < 0)) return;
    __syncwarp();
    if constexpr (kTurned && !plain::kTurns<S>) TurnBy(turn, plain::SharedNumbersToTurn{room.tile, 0}, kDim, lane);
    plain::EncodeTile<S>(room, 1, out, plain::FixedSplit<kDim, kGroup, kBits>(), 0, pair, slot, plain::Warp{lane});
  }

  __device__ static constexpr int FieldShift(int field) {
    return kElement == plain::Element::kNumber ? NumberFields::Shift<kBits>(field) : 0;
  }

  __device__ __forceinline__ static void Unpack(uint32_t word, const OddWords<kOdd>& odd, uint32_t (&pairs)[16 / kBits]) {
    if constexpr (kElement == plain::Element::kNumber) {
      NumberFields::Unpack<kBits, kOdd>(word, odd, pairs);
    } else if constexpr (kElement == plain::Element::kE4M3) {  // a float16 of the same exponent is 2^8 too small
      pairs[0] = (word << 7 & 0x3F803F80) | (word << 8 & 0x80008000);
      pairs[1] = (word >> 1 & 0x3F803F80) | (word & 0x80008000);
    } else if constexpr (kElement == plain::Element::kE5M2) {  // a float16's high byte
      pairs[0] = word << 8 & 0xFF00FF00;
      pairs[1] = word & 0xFF00FF00;
    } else if constexpr (kElement == plain::Element::kE2M1) {  // 2^14 too small
#pragma unroll
      for (int field = 0; field < 4; ++field) {
        const int up = 9 - 4 * field, sign_up = 12 - 4 * field;
        pairs[field] = ((up >= 0 ? word << up : word >> -up) & 0x0E000E00) | (word << sign_up & 0x80008000);
      }
    } else if constexpr (kElement == plain::Element::kBytes) {
      constexpr TableBytes<S, kDim> kTable;
      // In registers of each lane, which the 0 sees to: the compiler would copy them there for each word.
      uint32_t table[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) table[i] = kTable.whole[i] ^ threadIdx.z;
      const uint32_t low = word & 0x77777777, high = word >> 3 & 0x11111111;
      uint32_t halves[2];  // four entries each
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const uint32_t code = low >> 16 * side, mask = ptx::PickBytes(0xFF00, 0, high >> 16 * side);  // of the codes from 8 on
        halves[side] = (ptx::PickBytes(table[2], table[3], code) & mask) |
                       (ptx::PickBytes(table[0], table[1], code) & ~mask);
      }
#pragma unroll
      for (int field = 0; field < 4; field += 2) {  // two fields' entries of both halves
        const uint32_t four = ptx::PickBytes(halves[0], halves[1], field == 0 ? 0x5410 : 0x7632);
        pairs[field] = four & 0x00FF00FF;
        pairs[field + 1] = ptx::PickBytes(four, 0, 0x4341);
      }
    } else if constexpr (kBits == 4) {  // codes below 8 have the others' entries, the last one's first, and a sign
      static_assert([] {
        for (int code = 0; code < 8; ++code) {
          if (S::TableEntry(code, kDim) != -S::TableEntry(15 - code, kDim)) return false;
        }
        return true;
      }());
      const uint32_t below = ~word;  // in fields' highest bits
      Look((word ^ (below >> 3 & 0x11111111) * 7) & 0x77777777, pairs[0], pairs[1], pairs[2], pairs[3]);
#pragma unroll
      for (int field = 0; field < 4; ++field) pairs[field] |= below << (12 - 4 * field) & 0x80008000;
    } else {  // 2 bits and an odd one: fields 0, 2, 4, 6 of a half first, each with its odd bit above, then the others
#pragma unroll
      for (int first = 0; first < 2; ++first) {
        const uint32_t alternate = odd[0] >> first & 0x00550055;
        const uint32_t spread = (alternate & 0x00050005) | (alternate & 0x00500050) << 4;
        const uint32_t above = (spread & 0x01010101) << 2 | (spread & 0x04040404) << 4;
        Look((word >> 2 * first & 0x33333333) | above, pairs[first], pairs[2 + first], pairs[4 + first], pairs[6 + first]);
      }
    }
  }
  // The table's last eight entries, of a word of eight numbers of them in 4 bits each: pairs of fields 0 to 3 of both halves.
  __device__ __forceinline__ static void Look(uint32_t word, uint32_t& pair0, uint32_t& pair1, uint32_t& pair2, uint32_t& pair3) {
    Entries((word & 0x0F0F) | (word >> 12 & 0xF0F0), pair0, pair2);
    Entries((word >> 4 & 0x0F0F) | (word >> 16 & 0xF0F0), pair1, pair3);
  }
  // Of four, in the low 16 bits: the first two and the last two.
  __device__ __forceinline__ static void Entries(uint32_t codes, uint32_t& first, uint32_t& last) {
    constexpr TableBytes<S, kDim> kTable;
    constexpr int kLast = kTable.kWords - 2;
    uint32_t bytes[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) bytes[i] = ptx::PickBytes(kTable.bytes[i][kLast], kTable.bytes[i][kLast + 1], codes);
    first = ptx::PickBytes(bytes[0], bytes[1], 0x5140);
    last = ptx::PickBytes(bytes[0], bytes[1], 0x7362);
  }

  __device__ __forceinline__ static float Element(uint32_t code) {
    if constexpr (kElement == plain::Element::kNumber) return static_cast<float>(code);
    else if constexpr (kElement == plain::Element::kE4M3) return E4M3::Value(code);
    else if constexpr (kElement == plain::Element::kE5M2) return E5M2::Value(code);
    else if constexpr (kElement == plain::Element::kE2M1) return E2M1::Value(code);
    else return S::TableEntry(static_cast<int>(code), kDim);
  }

  // The NaN of E4M3, all bits but the sign's, carries into the highest bit of its byte.
  __device__ __forceinline__ static uint32_t Broken(uint32_t word) { return (word & 0x7F7F7F7F) + 0x01010101; }

  template <int kPlanes_, int kWords>
  __device__ __forceinline__ static plain::Line LineOf(const uint32_t (&words)[kPlanes_][kWords], int group) {
    plain::Kept<S> kept{};
    char* to = kOfVector ? reinterpret_cast<char*>(&kept.vector) : reinterpret_cast<char*>(&kept.stored);
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      const uint32_t bits = words[p][group * kMetaBytes / 4] >> group * kMetaBytes % 4 * 8;
      memcpy(to + p * kMetaBytes, &bits, kMetaBytes);
    }
    if constexpr (kOfVector) return S::LineOf(kept.vector, kDim);
    else return S::LineOf(kept.stored);
  }
  template <int kPlanes_, int kWords>
  __device__ __forceinline__ static float Scale(const uint32_t (&words)[kPlanes_][kWords], int group) {
    const uint32_t word = words[0][group * kMetaBytes / 4];
    if constexpr (kScaleByte == plain::ScaleByte::kE4M3) {  // none is negative; NaN is Poison's
      const uint32_t pair = (group % 2 == 0 ? word << 7 : word >> 1) & 0x3F803F80;
      return ptx::HalfAt(pair, group % 4 / 2);
    } else if constexpr (kScaleByte == plain::ScaleByte::kE8M0) {  // 0 for 2^-127; infinity becomes NaN
      const uint32_t bits = (group % 4 == 3 ? word >> 1 : word << (23 - 8 * (group % 4))) & 0x7F800000;
      const float power = BitsFloat(bits);
      return fmaf(power, 0.0f, power);
    } else {
      return LineOf(words, group).scale;
    }
  }
  // Bits where a word of scales has one that is NaN.
  __device__ __forceinline__ static uint32_t Poison(uint32_t word) { return Broken(word) & 0x80808080; }
  template <int kPlanes_, int kWords>
  __device__ __forceinline__ static float ZeroOf(const uint32_t (&words)[kPlanes_][kWords], int group) {
    return LineOf(words, group).zero;
  }
};

}  // namespace kvq
