// Which thread multiplies which blocks of rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

namespace llava_fa {

// The blocks of rows that are left of a thread's part. It takes them from the front, so that its reading of codes runs on
// without a break, which memory is fastest at; threads that have done theirs take from the end.
class alignas(64) Part {
 public:
  void set(uint32_t first, uint32_t last) { ends = uint64_t{last} << 32 | first; }

  // At most so many: the first, and how many.
  std::pair<int64_t, int64_t> take(uint32_t most, bool from_end) {
    for (uint64_t now = ends;;) {
      const uint32_t first = static_cast<uint32_t>(now), last = static_cast<uint32_t>(now >> 32);
      const uint32_t some = std::min(most, last - first);
      if (!some) return {0, 0};
      const uint64_t rest = from_end ? uint64_t{last - some} << 32 | first : uint64_t{last} << 32 | (first + some);
      if (ends.compare_exchange_weak(now, rest)) return {from_end ? last - some : first, some};
    }
  }

  int64_t left() const {
    const uint64_t now = ends;
    return static_cast<int64_t>((now >> 32) - (now & 0xffffffff));
  }

 private:
  std::atomic<uint64_t> ends{0};
};

}  // namespace llava_fa
