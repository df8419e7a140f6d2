// Memory of large results, kept for the next result of its size.
//
// A fresh result of hundreds of megabytes comes from the system page by page, and goes back when it is freed; an
// optimizer step then spends more time in page faults than in arithmetic (METAKERN_CPU_CACHE_MB=0 make bench shows
// it). So freed blocks stay here, up to a limit, the oldest leaving first.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace metakern {

// A contiguous tensor of the shape and dtype of `like`, on the CPU, its contents undefined.
torch::stable::Tensor empty_result(const torch::stable::Tensor& like);

// Free what is kept.
void empty_cache();

// Bytes that are kept.
int64_t cached_bytes();

}  // namespace metakern
