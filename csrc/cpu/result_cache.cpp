#include "result_cache.h"

#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <deque>
#include <mutex>

#include "../checks.h"

namespace metakern {
namespace {

constexpr int64_t smallest = int64_t(1) << 16;  // below, malloc keeps memory itself
constexpr int64_t header = 64;                  // holds the block's size, and keeps the data aligned

struct Block {
  char* base;
  int64_t bytes;
};

int64_t limit_from_environment() {
  const char* text = std::getenv("METAKERN_CPU_CACHE_MB");
  if (!text || !*text) return int64_t(1024) << 20;
  char* end = nullptr;
  const long long megabytes = std::strtoll(text, &end, 10);
  if (*end || megabytes < 0 || megabytes > (1 << 24))
    fail("METAKERN_CPU_CACHE_MB must be a number of mebibytes of at least 0, got '", text, "'");
  return int64_t(megabytes) << 20;
}

class Cache {
 public:
  // Never destroyed: tensors may be freed after static objects are.
  static Cache& instance() {
    static Cache& cache = *new Cache;
    return cache;
  }

  char* take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = kept_.rbegin(); block != kept_.rend(); ++block)
        if (block->bytes >= bytes && block->bytes <= bytes + bytes / 8) {
          char* base = block->base;
          bytes_ -= block->bytes;
          kept_.erase(std::next(block).base());
          return base;
        }
    }
    void* base = nullptr;
    if (posix_memalign(&base, header, size_t(bytes + header)) != 0) {
      clear();
      if (posix_memalign(&base, header, size_t(bytes + header)) != 0)
        fail("out of memory: could not allocate a result of ", bytes, " bytes");
    }
    *static_cast<int64_t*>(base) = bytes;
    return static_cast<char*>(base);
  }

  void give(char* base) {
    const int64_t bytes = *reinterpret_cast<int64_t*>(base);
    const std::lock_guard<std::mutex> lock(mutex_);
    kept_.push_back({base, bytes});
    bytes_ += bytes;
    shrink(limit_);
  }

  void clear() {
    const std::lock_guard<std::mutex> lock(mutex_);
    shrink(0);
  }

  int64_t bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

 private:
  void shrink(int64_t limit) {
    for (; bytes_ > limit; kept_.pop_front()) {
      bytes_ -= kept_.front().bytes;
      std::free(kept_.front().base);
    }
  }

  std::mutex mutex_;
  std::deque<Block> kept_;  // oldest first
  int64_t bytes_ = 0;
  const int64_t limit_ = limit_from_environment();
};

void give_back(void* data) { Cache::instance().give(static_cast<char*>(data) - header); }

}  // namespace

namespace {

Tensor empty_of_shape(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t axis = shape.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= shape[axis];
  }
  const int64_t bytes = stride * int64_t(like.element_size());
  if (bytes < smallest) return torch::stable::new_empty(like, shape);
  char* base = Cache::instance().take(bytes);
  return torch::stable::from_blob(base + header, shape, {strides.data(), strides.size()}, like.device(),
                                  like.scalar_type(), &give_back);
}

}  // namespace

Tensor empty_result(const Tensor& like) { return empty_of_shape(like, like.sizes()); }

Tensor empty_result(const Tensor& like, std::initializer_list<int64_t> shape) {
  return empty_of_shape(like, {shape.begin(), shape.size()});
}

CachedMemory::CachedMemory(int64_t bytes) : data_(Cache::instance().take(bytes) + header) {}
CachedMemory::~CachedMemory() { give_back(data_); }

void empty_cache() { Cache::instance().clear(); }
int64_t cached_bytes() { return Cache::instance().bytes(); }

}  // namespace metakern
