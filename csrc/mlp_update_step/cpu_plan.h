// How a call's segments are cut into blocks, and the working memory of the passes. Host code, compiled once.
#pragma once
#include <algorithm>
#include <vector>

#include "../core/result_cache.h"
#include "cpu.h"

namespace metakern {

constexpr int64_t longest_span = 8192, block_target = 32768, fewest_spans = 16;
constexpr int64_t most_column_biases = 65536;  // of a block: W for each coordinate of a span (cpu_row_update.h)

// Every segment with coordinates, and its blocks.
class MlpPlan {
 public:
  explicit MlpPlan(const MlpUpdateProblem& p, int sum_rows)
      : sum_rows_(sum_rows), longest_factored_(std::min(longest_span, most_column_biases / p.width)) {
    for (int64_t tensor = 0; tensor < p.num_tensors; ++tensor) {
      const FactoredShape& shape = p.tensors[tensor].shape;
      if (shape.numel() == 0) continue;
      for (int64_t task = 0; task < p.num_tasks; ++task) add(shape, tensor, task);
    }
  }

  const std::vector<MlpSegment>& segments() const { return segments_; }
  const std::vector<MlpBlock>& blocks() const { return blocks_; }
  int64_t entries() const { return entries_; }  // of r and c together
  int64_t sums() const { return sums_; }
  int64_t coordinates() const { return coordinates_; }
  int64_t longest_column() const { return longest_column_; }  // coordinates of a factored block's span

 private:
  void add(const FactoredShape& s, int64_t tensor, int64_t task) {
    const int64_t first_block = int64_t(blocks_.size());
    // Spans take whole rows of `second` if they can.
    const int64_t row = s.second * s.inner, longest = s.is_factored ? longest_factored_ : longest_span;
    const int64_t middles = std::max<int64_t>(1, std::min(s.middle, longest / row));
    const int64_t pieces = std::min(s.second, (row + longest - 1) / longest);
    const int64_t seconds = (s.second + pieces - 1) / pieces;
    const int64_t firsts = std::max(fewest_spans, block_target / (middles * seconds * s.inner));
    for (int64_t outer = 0; outer < s.outer; ++outer)
      for (int64_t f = 0; f < s.first; f += firsts)
        for (int64_t m = 0; m < s.middle; m += middles)
          for (int64_t i = 0; i < s.second; i += seconds) {
            MlpBlock b{int64_t(segments_.size()),
                       outer,
                       {f, std::min(f + firsts, s.first)},
                       {m, std::min(m + middles, s.middle)},
                       {i, std::min(i + seconds, s.second)},
                       sums_};
            if (s.is_factored) {
              sums_ += sum_rows_ * (b.x_size(s) + b.y_size(s));
              longest_column_ = std::max(longest_column_, b.y_size(s));
            }
            blocks_.push_back(b);
          }
    segments_.push_back({tensor, task, first_block, int64_t(blocks_.size()) - first_block, entries_, coordinates_});
    coordinates_ += s.numel();
    if (s.is_factored) entries_ += s.x_size() + s.y_size();
  }

  int sum_rows_;
  int64_t longest_factored_, longest_column_ = 0;
  std::vector<MlpSegment> segments_;
  std::vector<MlpBlock> blocks_;
  int64_t entries_ = 0, sums_ = 0, coordinates_ = 0;
};

constexpr int64_t one_vector = 64;  // bytes: tables are read in whole vectors

// Working memory of a call, kept from call to call as results are.
class MlpWorkspace {
 public:
  MlpWorkspace(const MlpPlan& plan, int sum_rows, int64_t element_bytes)
      : tables_(plan.entries() * table_rows * element_bytes + one_vector),
        sums_(plan.sums() * element_bytes),
        entry_sums_(plan.entries() * sum_rows * int64_t(sizeof(double))),
        block_sums_(plan.blocks().size() * block_numbers * int64_t(sizeof(double))),
        segment_sums_(plan.segments().size() * tensor_features * int64_t(sizeof(double))) {}

  void set(MlpUpdateCall* call) const {
    call->tables = tables_.data();
    call->sums = sums_.data();
    call->entry_sums = static_cast<double*>(entry_sums_.data());
    call->block_sums = static_cast<double*>(block_sums_.data());
    call->segment_sums = static_cast<double*>(segment_sums_.data());
  }

 private:
  CachedMemory tables_, sums_, entry_sums_, block_sums_, segment_sums_;
};

}  // namespace metakern
