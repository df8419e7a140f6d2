// Fibers, barriers and the runtime's calls of the emulated device; cuda_runtime.h says what it is for.
#include <setjmp.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

namespace {

constexpr size_t stack_bytes = 64 * 1024;
constexpr int max_threads = 1024;
constexpr size_t guard_bytes = 4096;
constexpr unsigned char poison = 0xff;  // as a float, double or bfloat16 it is NaN

enum class Waiting { no, block, warp, done };

struct Copy {
  void* to;
  const void* from;
};

// Once it runs, a fiber is entered and left by setjmp, which makes no system call. It serves one block after another.
struct Fiber {
  ucontext_t context;
  jmp_buf resume_at;
  bool started = false;
  Waiting waiting = Waiting::no;
  const void* site = nullptr;
  unsigned char value[2][64];  // of two warp operations in turn: a lane may be one ahead of those that still read
  int operations = 0;
  std::vector<Copy> copies;
  std::vector<size_t> group_ends;
};

struct State {
  Device device;
  std::string report;
  bool max_shared_set = false;
  jmp_buf scheduler;
  std::vector<Fiber> fibers;
  char* stacks = nullptr;
  std::vector<unsigned char> shared;
  int current = -1;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  cudaError_t last_error = cudaSuccess;
};

State& state() {
  static State s;
  return s;
}

// Back to the scheduler; returns when the scheduler picks this fiber again.
void leave(Fiber& f) {
  if (_setjmp(f.resume_at) == 0) _longjmp(state().scheduler, 1);
}

void fiber_main() {
  State& s = state();
  for (;;) {
    s.body(s.argument);
    s.fibers[s.current].waiting = Waiting::done;
    leave(s.fibers[s.current]);
  }
}

void suspend(Waiting kind, const void* site) {
  Fiber& f = state().fibers[state().current];
  f.waiting = kind;
  f.site = site;
  leave(f);
}

void resume(int i) {
  State& s = state();
  s.current = i;
  threadIdx = dim3(unsigned(i));
  Fiber& f = s.fibers[i];
  f.waiting = Waiting::no;
  if (_setjmp(s.scheduler) == 0) {
    if (f.started) _longjmp(f.resume_at, 1);
    f.started = true;
    setcontext(&f.context);
  }
  s.current = -1;
}

std::string where(const char* what, int thread) {
  return std::string(what) + " in block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(thread);
}

// Lets threads [first, last) go on that wait for `kind`, if all of them do. False, with a report, if that can never be.
bool release(int first, int last, Waiting kind, const char* name) {
  State& s = state();
  int arrived = 0, done = 0;
  for (int i = first; i < last; ++i) {
    arrived += s.fibers[i].waiting == kind;
    done += s.fibers[i].waiting == Waiting::done;
  }
  if (arrived == 0) return true;
  if (done > 0) {
    s.report = where((std::string("a thread ended while others wait at ") + name).c_str(), first);
    return false;
  }
  if (arrived < last - first) return true;
  for (int i = first; i < last; ++i)
    if (s.fibers[i].site != s.fibers[first].site) {
      s.report = where((std::string("divergent ") + name).c_str(), i);
      return false;
    }
  for (int i = first; i < last; ++i) s.fibers[i].waiting = Waiting::no;
  return true;
}

// First threads of the warps that can go on. Between two operations of a warp, all of its lanes can or none.
std::vector<int> ready_warps(int threads) {
  std::vector<int> ready;
  for (int first = 0; first < threads; first += warp_lanes)
    if (state().fibers[first].waiting == Waiting::no) ready.push_back(first);
  return ready;
}

// The lanes of one warp, each until it waits or ends.
void run_warp(int first, int last, std::mt19937& random) {
  std::vector<int> lanes;
  for (int i = first; i < last; ++i) lanes.push_back(i);
  const Order order = state().device.order;
  if (order == Order::reverse) std::reverse(lanes.begin(), lanes.end());
  if (order == Order::shuffled) std::shuffle(lanes.begin(), lanes.end(), random);
  for (const int i : lanes) resume(i);
}

// One warp goes as far as it can before another does, or, shuffled, any warp goes on until its next operation.
bool run_block() {
  State& s = state();
  const int threads = int(blockDim.x);
  std::mt19937 random(s.device.seed + blockIdx.x);
  for (;;) {
    std::vector<int> ready = ready_warps(threads);
    if (ready.empty()) {
      if (!release(0, threads, Waiting::block, "__syncthreads()")) return false;
      ready = ready_warps(threads);
      if (ready.empty()) break;
    }
    const Order order = s.device.order;
    const int first = order == Order::forward   ? ready.front()
                      : order == Order::reverse ? ready.back()
                                                : ready[random() % ready.size()];
    const int last = std::min(first + warp_lanes, threads);
    run_warp(first, last, random);
    if (!release(first, last, Waiting::warp, "a warp-wide operation")) return false;
  }
  for (int i = 0; i < threads; ++i)
    if (s.fibers[i].waiting != Waiting::done) {
      s.report = where("threads wait at different kinds of barriers", i);
      return false;
    }
  return true;
}

// As many fibers as threads, at their start. Those that a failed launch left in the middle are made anew.
void prepare_fibers(int threads) {
  State& s = state();
  if (s.stacks == nullptr) {
    s.stacks = static_cast<char*>(mmap(nullptr, max_threads * stack_bytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    s.fibers.resize(max_threads);
  }
  for (int i = 0; i < threads; ++i) {
    Fiber& f = s.fibers[i];
    if (f.started && f.waiting != Waiting::done) f.started = false;
    f.waiting = Waiting::no;
    f.operations = 0;
    f.copies.clear();
    f.group_ends.clear();
    if (f.started) continue;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = s.stacks + i * stack_bytes;
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
}

bool guards_are_whole(size_t bytes) {
  const auto& memory = state().shared;
  const auto whole = [&](size_t from, size_t to) {
    return std::all_of(memory.begin() + from, memory.begin() + to, [](unsigned char c) { return c == poison; });
  };
  return whole(0, guard_bytes) && whole(guard_bytes + bytes, memory.size());
}

cudaError_t failure_if_due() {
  Device& d = state().device;
  if (d.fail_call == 0 || --d.fail_call > 0) return cudaSuccess;
  state().last_error = d.failure;
  return d.failure;
}

}  // namespace

Device& device() { return state().device; }
std::string& report() { return state().report; }
char* shared_memory() { return reinterpret_cast<char*>(state().shared.data() + guard_bytes); }
int lane() { return state().current % warp_lanes; }

void block_barrier(const void* site) { suspend(Waiting::block, site); }

void warp_barrier(const void* site, const void* in) {
  Fiber& f = state().fibers[state().current];
  ++f.operations;
  if (in != nullptr) memcpy(f.value[f.operations % 2], in, sizeof(f.value[0]));
  suspend(Waiting::warp, site);
}

const void* lane_value(int lane) {
  State& s = state();
  const int turn = s.fibers[s.current].operations % 2;
  return s.fibers[s.current / warp_lanes * warp_lanes + lane].value[turn];
}

void require_alignment(const void* p, uintptr_t bytes) {
  State& s = state();
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  s.report = where(("an access to an address that is no multiple of " + std::to_string(bytes)).c_str(), s.current);
}
void copy_16(void* shared, const void* global) {
  State& s = state();
  require_alignment(shared, 16);
  require_alignment(global, 16);
  if (s.device.eager_copies) memcpy(shared, global, 16);
  s.fibers[s.current].copies.push_back({shared, global});
}
void commit_copies() {
  Fiber& f = state().fibers[state().current];
  f.group_ends.push_back(f.copies.size());
}
void wait_for_copies(int pending_groups) {
  Fiber& f = state().fibers[state().current];
  const size_t pending = size_t(pending_groups);
  if (f.group_ends.size() <= pending) return;
  const size_t groups = f.group_ends.size() - pending, landed = f.group_ends[groups - 1];
  if (!state().device.eager_copies)
    for (size_t i = 0; i < landed; ++i) memcpy(f.copies[i].to, f.copies[i].from, 16);
  f.copies.erase(f.copies.begin(), f.copies.begin() + landed);
  f.group_ends.erase(f.group_ends.begin(), f.group_ends.begin() + groups);
  for (size_t& end : f.group_ends) end -= landed;
}

cudaError_t run(const cudaLaunchConfig_t& config, void (*body)(void*), void* argument) {
  State& s = state();
  s.report.clear();
  const cudaError_t injected = failure_if_due();
  if (injected != cudaSuccess) return injected;
  const int threads = int(config.blockDim.x);
  if (threads < 1 || threads > max_threads || config.gridDim.x < 1) return s.last_error = cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > size_t(s.device.shared_bytes)) return s.last_error = cudaErrorInvalidValue;
  s.body = body;
  s.argument = argument;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx = dim3(block);
    s.shared.assign(config.dynamicSmemBytes + 2 * guard_bytes, poison);
    prepare_fibers(threads);
    if (run_block() && !guards_are_whole(config.dynamicSmemBytes)) s.report = where("a write outside shared memory", 0);
    if (!s.report.empty()) return s.last_error = cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulation

cudaError_t cudaGetDevice(int* device) {
  *device = emulation::device().ordinal;
  return emulation::failure_if_due();
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto& d = emulation::device();
  *value = attribute == cudaDevAttrMultiProcessorCount ? d.multiprocessors : d.shared_bytes;
  return emulation::failure_if_due();
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  if (value > emulation::device().shared_bytes) return emulation::state().last_error = cudaErrorInvalidValue;
  return emulation::failure_if_due();
}
cudaError_t cudaGetLastError() { return std::exchange(emulation::state().last_error, cudaSuccess); }

extern "C" {

void emulation_configure(const emulation::Device* device) { emulation::device() = *device; }
const char* emulation_report() { return emulation::report().c_str(); }

}  // extern "C"
