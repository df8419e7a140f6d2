// A parallel loop that keeps the messages of exceptions.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>

namespace metakern {

// f(first, last) over ranges of begin to end, as torch::stable::parallel_for, which would lose the message of an
// exception of f: the first exception is kept and rethrown when all ranges are done.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    if (failed.load(std::memory_order_relaxed)) return;
    try {
      f(first, last);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace metakern
