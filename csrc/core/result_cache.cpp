#include "result_cache.h"

#include <pthread.h>
#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <mutex>
#include <new>

#include "checks.h"

namespace metakern {
namespace {

constexpr int64_t smallest = int64_t(1) << 16;  // smaller blocks are cached by malloc itself
constexpr int64_t header = 64;                  // before the data, which stays aligned
constexpr int64_t huge_page = int64_t(1) << 21;

// Header of a block. Cached blocks form a linked list, so that freeing a block allocates nothing and cannot fail:
// torch's deleters must not throw.
struct Block {
  int64_t bytes;
  Block* older;
  Block* newer;

  char* data() { return reinterpret_cast<char*>(this) + header; }
  static Block* of(void* data) { return reinterpret_cast<Block*>(static_cast<char*>(data) - header); }
};
static_assert(sizeof(Block) <= header, "a block's header must hold it");

int64_t limit_from_environment() {
  const char* text = std::getenv("METAKERN_CPU_CACHE_MB");
  if (!text || !*text) return int64_t(1024) << 20;
  char* end = nullptr;
  const long long megabytes = std::strtoll(text, &end, 10);
  if (*end || megabytes < 0 || megabytes > (1 << 24))
    fail_value("METAKERN_CPU_CACHE_MB must be a number of mebibytes of at least 0, got '", text, "'");
  return int64_t(megabytes) << 20;
}

// Null if there is not enough memory. Large blocks ask for huge pages: a step streams through tens of megabytes, and a
// tenth of its time would go into looking up small pages.
void* allocate(int64_t bytes) noexcept {
  void* memory = nullptr;
  const bool large = bytes >= huge_page;
  if (posix_memalign(&memory, size_t(large ? huge_page : header), size_t(bytes)) != 0) return nullptr;
#ifdef MADV_HUGEPAGE
  if (large) madvise(memory, size_t(bytes), MADV_HUGEPAGE);  // a hint: its failure changes nothing
#endif
  return memory;
}

class Cache {
 public:
  char* take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (limit_ < 0) limit_ = limit_from_environment();
      for (Block* block = newest_; block != nullptr; block = block->older)
        if (block->bytes >= bytes && block->bytes <= bytes + bytes / 8) {
          remove(block);
          return block->data();
        }
    }
    void* memory = allocate(bytes + header);
    if (memory == nullptr) {
      clear();
      memory = allocate(bytes + header);
    }
    if (memory == nullptr) fail("out of memory: could not allocate ", bytes, " bytes");
    return (new (memory) Block{bytes, nullptr, nullptr})->data();
  }

  void give(void* data) noexcept {
    Block* block = Block::of(data);
    const std::lock_guard<std::mutex> lock(mutex_);
    block->older = newest_;
    block->newer = nullptr;
    (newest_ == nullptr ? oldest_ : newest_->newer) = block;
    newest_ = block;
    bytes_ += block->bytes;
    shrink(limit_);
  }

  void clear() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    shrink(0);
  }

  int64_t bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

  // Called around a fork.
  void hold() { mutex_.lock(); }
  void release() { mutex_.unlock(); }

 private:
  void remove(Block* block) noexcept {
    (block->older == nullptr ? oldest_ : block->older->newer) = block->newer;
    (block->newer == nullptr ? newest_ : block->newer->older) = block->older;
    bytes_ -= block->bytes;
  }

  void shrink(int64_t limit) noexcept {
    while (bytes_ > limit) {
      Block* block = oldest_;
      remove(block);
      std::free(block);
    }
  }

  std::mutex mutex_;
  Block* newest_ = nullptr;
  Block* oldest_ = nullptr;
  int64_t bytes_ = 0;
  int64_t limit_ = -1;  // read at the first result, so that the call can report an error
};

// Created when the library is loaded, so that no fork can interrupt its creation. Never destroyed: tensors may be freed
// after static objects are destroyed.
Cache& cache = *new Cache;

// A forked child has only the forking thread: a lock held by another thread would stay locked for ever.
[[maybe_unused]] const int fork_handlers =
    pthread_atfork([] { cache.hold(); }, [] { cache.release(); }, [] { cache.release(); });

void give_back(void* data) noexcept { cache.give(data); }

}  // namespace

namespace {

// An operator that returns hundreds of small tensors would spend most of its time in the dispatcher, which new_empty
// goes through.
Tensor small_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                    const std::vector<int64_t>& strides) {
  int32_t dtype;
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &result));
  return Tensor(result);
}

Tensor empty_of_shape(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1, numel = 1;
  for (size_t axis = shape.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= shape[axis] > 0 ? shape[axis] : 1;
    numel *= shape[axis];
  }
  const int64_t bytes = numel * int64_t(like.element_size());
  if (bytes < smallest) return small_tensor(like, shape, strides);
  return torch::stable::from_blob(cache.take(bytes), shape, {strides.data(), strides.size()}, like.device(),
                                  like.scalar_type(), &give_back);
}

}  // namespace

Tensor empty_result(const Tensor& like) { return empty_of_shape(like, like.sizes()); }

Tensor empty_result(const Tensor& like, std::initializer_list<int64_t> shape) {
  return empty_of_shape(like, {shape.begin(), shape.size()});
}

CachedMemory::CachedMemory(int64_t bytes) : data_(cache.take(bytes)) {}
CachedMemory::~CachedMemory() { give_back(data_); }

void empty_cache() { cache.clear(); }
int64_t cached_bytes() { return cache.bytes(); }

}  // namespace metakern
