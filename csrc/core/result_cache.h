// Memory of large results, kept for the next result of its size.
//
// A fresh result of hundreds of megabytes comes from the system page by page, and goes back when it is freed; an
// optimizer step then spends more time in page faults than in arithmetic (METAKERN_CPU_CACHE_MB=0 make bench shows
// it). So freed blocks stay here, up to a limit, the oldest leaving first.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

namespace metakern {

// A contiguous tensor of the shape and dtype of `like`, on the CPU, its contents undefined.
torch::stable::Tensor empty_result(const torch::stable::Tensor& like);

// The same of another shape, one axis.
torch::stable::Tensor empty_result(const torch::stable::Tensor& like, std::initializer_list<int64_t> shape);

// Working memory, aligned to 64 bytes and kept like a result's.
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

// Free what is kept.
void empty_cache();

// Bytes that are kept.
int64_t cached_bytes();

}  // namespace metakern
