// Cache of memory for large results, reused for the next result of the same size.
//
// The system maps a new result of hundreds of megabytes page by page, and unmaps it when it is freed; an optimizer step
// then spends more time in page faults than in arithmetic (METAKERN_CPU_CACHE_MB=0 make bench shows it). So freed
// blocks are cached up to a limit; the oldest are evicted first.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

namespace metakern {

// A contiguous tensor of the shape and dtype of `like`, on the CPU, its contents undefined.
torch::stable::Tensor empty_result(const torch::stable::Tensor& like);

// A result of the dtype of `like` and another shape.
torch::stable::Tensor empty_result(const torch::stable::Tensor& like, std::initializer_list<int64_t> shape);

// Working memory, aligned to 64 bytes and cached like a result's.
class CachedMemory {
 public:
  explicit CachedMemory(int64_t bytes);
  ~CachedMemory();
  CachedMemory(const CachedMemory&) = delete;
  CachedMemory& operator=(const CachedMemory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

// Frees the cached memory.
void empty_cache();

// Bytes in the cache.
int64_t cached_bytes();

}  // namespace metakern
