// The dtypes of tensors that kernels read and write. No torch header: kernels are compiled without, because inline
// functions of other libraries must not be compiled once per instruction set.
#pragma once

namespace metakern {

enum class DType : int { float32, float64, bfloat16, float16 };

// Elements converted at once between memory and the arithmetic's dtype; also the coordinates per tile of a recurrent
// state, TILE_LANES in Python (a test compares the two).
constexpr int tile_lanes = 32;

}  // namespace metakern
