// The random numbers of Python's `random` and of numpy's legacy generator, call by call, so that what a Python program
// draws from a seed can be drawn here. Both run the Mersenne Twister (Matsumoto & Nishimura 1998) and differ in how
// they seed it and in how many numbers a call takes: CPython 3.11 Lib/random.py, Modules/_randommodule.c; numpy
// random/src/mt19937/mt19937.c, random/src/distributions/distributions.c.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace kvq {

class MersenneTwister {
 public:
  explicit MersenneTwister(uint32_t seed) {  // init_genrand
    for (uint32_t i = 0; i < kWords; ++i, seed = 1812433253u * (seed ^ (seed >> 30)) + i) state_[i] = seed;
  }
  explicit MersenneTwister(const std::vector<uint32_t>& key) : MersenneTwister(19650218u) {  // init_by_array
    const uint32_t length = static_cast<uint32_t>(key.size());
    uint32_t i = 1, j = 0;
    const auto mixed = [&](uint32_t factor) { return state_[i] ^ ((state_[i - 1] ^ (state_[i - 1] >> 30)) * factor); };
    const auto next = [&] {
      if (++i == kWords) state_[0] = state_[kWords - 1], i = 1;
    };
    for (uint32_t k = std::max(kWords, length); k > 0; --k, j = (j + 1) % length)
      state_[i] = mixed(1664525u) + key[j] + j, next();
    for (uint32_t k = kWords - 1; k > 0; --k) state_[i] = mixed(1566083941u) - i, next();
    state_[0] = 0x80000000u;
  }

  uint32_t Next() {
    if (at_ == kWords) Twist();
    uint32_t y = state_[at_++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
  }

 private:
  static constexpr uint32_t kWords = 624, kShift = 397;
  void Twist() {
    for (uint32_t i = 0; i < kWords; ++i) {
      const uint32_t y = (state_[i] & 0x80000000u) | (state_[(i + 1) % kWords] & 0x7fffffffu);
      state_[i] = state_[(i + kShift) % kWords] ^ (y >> 1) ^ (y & 1 ? 0x9908b0dfu : 0);
    }
    at_ = 0;
  }
  std::array<uint32_t, kWords> state_;
  uint32_t at_ = kWords;
};

// random.Random(seed), seed a whole number from 0.
class PythonRandom {
 public:
  explicit PythonRandom(uint64_t seed)
      : twister_(seed >> 32 ? std::vector<uint32_t>{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}
                            : std::vector<uint32_t>{static_cast<uint32_t>(seed)}) {}

  double Random() {  // random(): 53 bits
    const uint32_t a = twister_.Next() >> 5, b = twister_.Next() >> 6;
    return (a * 67108864.0 + b) * (1.0 / 9007199254740992.0);
  }
  uint32_t Bits(int k) { return twister_.Next() >> (32 - k); }  // getrandbits(k), k from 1 to 32
  int64_t Below(int64_t n) {                                    // _randbelow(n), n from 1 to 2^32 - 1
    int bits = 0;
    while (n >> bits) ++bits;
    int64_t r;
    do r = Bits(bits);
    while (r >= n);
    return r;
  }
  int64_t Int(int64_t low, int64_t high) { return low + Below(high - low + 1); }  // randint
  template <typename T>
  const T& Choice(const std::vector<T>& of) {
    return of[static_cast<size_t>(Below(static_cast<int64_t>(of.size())))];
  }
  // ''.join(choices(alphabet, k=k))
  std::string Letters(const std::string& alphabet, int64_t k) {
    std::string letters;
    for (int64_t i = 0; i < k; ++i)
      letters += alphabet[static_cast<size_t>(Random() * static_cast<double>(alphabet.size()))];
    return letters;
  }
  // sample(range(n), k). Throws std::length_error where Python raises ValueError: k > n.
  std::vector<int64_t> Sample(int64_t n, int64_t k) {
    if (k > n || k < 0) throw std::length_error("a sample larger than what it is drawn from");
    std::vector<int64_t> result;
    int64_t set_size = 21;
    if (k > 5) set_size += std::llround(std::pow(4, std::ceil(std::log(static_cast<double>(k * 3)) / std::log(4.0))));
    if (n <= set_size) {
      std::vector<int64_t> pool(static_cast<size_t>(n));
      for (int64_t i = 0; i < n; ++i) pool[static_cast<size_t>(i)] = i;
      for (int64_t i = 0; i < k; ++i) {
        int64_t& drawn = pool[static_cast<size_t>(Below(n - i))];
        result.push_back(drawn);
        drawn = pool[static_cast<size_t>(n - i - 1)];
      }
      return result;
    }
    std::unordered_set<int64_t> selected;
    for (int64_t i = 0; i < k; ++i) {
      int64_t j = Below(n);
      while (!selected.insert(j).second) j = Below(n);
      result.push_back(j);
    }
    return result;
  }
  template <typename T>
  void Shuffle(std::vector<T>& x) {
    for (int64_t i = static_cast<int64_t>(x.size()) - 1; i > 0; --i) {
      std::swap(x[static_cast<size_t>(i)], x[static_cast<size_t>(Below(i + 1))]);
    }
  }
  std::string Uuid4() {  // str(uuid.UUID(int=getrandbits(128), version=4)): the first word drawn is the lowest
    uint32_t words[4];
    for (uint32_t& word : words) word = Bits(32);
    words[1] = (words[1] & 0x3fffffffu) | 0x80000000u;  // the variant
    words[2] = (words[2] & 0xffff0fffu) | 0x00004000u;  // the version
    char text[37];
    std::snprintf(text, sizeof text, "%08x-%04x-%04x-%04x-%04x%08x", words[3], words[2] >> 16, words[2] & 0xffff,
                  words[1] >> 16, words[1] & 0xffff, words[0]);
    return text;
  }

 private:
  MersenneTwister twister_;
};

// numpy.random.RandomState(seed).
class NumpyRandom {
 public:
  explicit NumpyRandom(uint32_t seed) : twister_(seed) {}
  // randint(low, high): numbers of the range's bits until one is below high.
  int64_t Int(int64_t low, int64_t high) {
    const uint32_t range = static_cast<uint32_t>(high - 1 - low);
    if (range == 0) return low;
    uint32_t mask = range, drawn;
    for (int shift = 1; shift < 32; shift *= 2) mask |= mask >> shift;
    do drawn = twister_.Next() & mask;
    while (drawn > range);
    return low + drawn;
  }

 private:
  MersenneTwister twister_;
};

}  // namespace kvq
