#include "kernels/runtime/scratch.h"

#include <stdexcept>

#include "kernels/runtime/launch.h"

namespace kvq {
namespace {

// Zeroed before anything runs, so that another file's static object can set it.
constinit ScratchAllocator the_allocator;

const ScratchAllocator& Allocator() {
  if (the_allocator.allocate == nullptr) throw std::logic_error("scratch memory: nobody has named an allocator");
  return the_allocator;
}

}  // namespace

ScratchAllocator SetScratchAllocator(const ScratchAllocator& allocator) {
  return std::exchange(the_allocator, allocator);
}

thread_local ScratchKeeper* ScratchKeeper::current_ = nullptr;

ScratchKeeper::~ScratchKeeper() {
  for (const Block& block : blocks_) the_allocator.free(block.memory);
}

int64_t ScratchKeeper::bytes() const {
  int64_t total = 0;
  for (const Block& block : blocks_) total += block.bytes;
  return total;
}

void* ScratchKeeper::Take(int64_t bytes, void* stream) {
  Block* best = nullptr;
  for (Block& block : blocks_) {
    if (block.taken || block.stream != stream || block.bytes < bytes) continue;
    if (best == nullptr || block.bytes < best->bytes) best = &block;
  }
  if (best == nullptr) {
    blocks_.reserve(blocks_.size() + 1);  // so that nothing can throw between the allocation and its entry
    blocks_.push_back({Allocator().allocate(bytes, stream), bytes, stream, false});
    best = &blocks_.back();
  }
  best->taken = true;
  return best->memory;
}

void ScratchKeeper::GiveBack(void* memory) {
  for (Block& block : blocks_) {
    if (block.memory == memory) block.taken = false;
  }
}

Scratch::Scratch(int64_t bytes, void* stream)
    : keeper_(ScratchKeeper::current_),
      memory_(Gathering()           ? nullptr
              : keeper_ != nullptr ? keeper_->Take(bytes, stream)
                                   : Allocator().allocate(bytes, stream)) {}

Scratch::~Scratch() {
  if (memory_ == nullptr) return;
  if (keeper_ != nullptr) {
    keeper_->GiveBack(memory_);
  } else {
    the_allocator.free(memory_);
  }
}

}  // namespace kvq
