// Memory that kernels of a scheme want for the length of a call.
//
// It comes from the allocator that the process's tensors come from, which fixtures/ names here: a second one beside
// it would keep memory that the first lacks. Such an allocator gives a block out again as soon as the host has freed
// it, to what is enqueued on the same stream from then on. That is right as long as the work runs in the order in
// which it was enqueued, and wrong for a captured graph, which runs again later: then the block may be anybody's. So
// scratch that is taken while a graph is captured belongs to a ScratchKeeper, which lives as long as the graph.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace kvq {

struct ScratchAllocator {
  // On the current device, for work on `stream` (a cudaStream_t).
  void* (*allocate)(int64_t bytes, void* stream) = nullptr;
  void (*free)(void* memory) = nullptr;
};

// Returns the one before.
ScratchAllocator SetScratchAllocator(const ScratchAllocator& allocator);

// The scratch of a graph, or of several that never run at the same time. Calls on one stream take turns in one block,
// as their kernels do; streams do not share, because a graph runs them side by side.
class ScratchKeeper {
 public:
  ScratchKeeper() = default;
  ScratchKeeper(const ScratchKeeper&) = delete;
  ScratchKeeper& operator=(const ScratchKeeper&) = delete;
  // Nothing that was captured may run any more.
  ~ScratchKeeper();

  // Calls `work`; scratch that this thread takes in it is this keeper's. Work that takes the same on the same streams a
  // second time allocates nothing then: so what is captured is run once before, and the capture finds its memory.
  template <typename Work>
  void Keep(Work&& work) {
    struct Restore {
      ScratchKeeper* before;
      ~Restore() { current_ = before; }
    } restore{std::exchange(current_, this)};
    std::forward<Work>(work)();
  }

  int64_t bytes() const;

 private:
  friend class Scratch;
  struct Block {
    void* memory;
    int64_t bytes;
    void* stream;
    bool taken;
  };
  void* Take(int64_t bytes, void* stream);
  void GiveBack(void* memory);

  std::vector<Block> blocks_;
  static thread_local ScratchKeeper* current_;  // null: scratch is nobody's but the call's
};

// `bytes` for work that is enqueued on `stream` as long as this object lives.
class Scratch {
 public:
  Scratch(int64_t bytes, void* stream);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return memory_; }

 private:
  ScratchKeeper* keeper_;
  void* memory_;
};

}  // namespace kvq
