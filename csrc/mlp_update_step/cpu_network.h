// The network of a tile: coordinates in SIMD lanes, weights broadcast, products in blocks of registers.
#pragma once
#include "../math/lane_product.h"
#include "../math/mlp.h"
#include "cpu_tile.h"

namespace metakern {
inline namespace MK_CAPABILITY {
namespace {

// Arrays of the network are [rows][tile_vectors] of vectors.
template <class V>
MK_INLINE LaneMatrix<V> tile_rows(const V* data) {
  return {data, tile_vectors<V>, 1};
}

template <class V>
struct AddBias {
  V* out;
  const lane_t<V>* bias;
  bool is_hidden;
  MK_INLINE void operator()(int m, int n, V value) const {
    value += bias[m];
    out[m * tile_vectors<V> + n] = is_hidden ? at_least(value, lane_t<V>(0)) : value;
  }
};

template <class V>
struct StoreRows {
  V* out;
  MK_INLINE void operator()(int m, int n, V value) const { out[m * tile_vectors<V> + n] = value; }
};

// Gradient of a ReLU's input, from that of its output and from the output.
template <class V>
struct MaskRows {
  V* out;
  const V* hidden;
  MK_INLINE void operator()(int m, int n, V value) const {
    const int64_t at = m * tile_vectors<V> + n;
    out[at] = hidden[at] > broadcast<V>(0) ? value : broadcast<V>(0);
  }
};

template <class S>
struct Network {
  using V = vec_t<S>;
  const MlpUpdateProblem& problem;
  int64_t task;
  const S* first_bias;  // [W], with the time features' part
  S exp_mult;

  MK_INLINE Network(const MlpUpdateCall& call, int64_t own_task)
      : problem(*call.problem),
        task(own_task),
        first_bias(static_cast<const S*>(call.biases) + task * problem.width),
        exp_mult(S(problem.exp_mult)) {}

  MK_INLINE LaneMatrix<S> weight(int layer) const {
    const int columns = layer == 0 ? mlp_inputs : problem.width;
    return {problem.template own<S>(problem.weights[2 * layer], task, problem.outputs(layer) * columns), columns, 1};
  }
  MK_INLINE const S* bias(int layer) const {
    if (layer == 0) return first_bias;
    return problem.template own<S>(problem.weights[2 * layer + 1], task, problem.outputs(layer));
  }
  template <class Pointer>
  MK_INLINE Pointer layer(Pointer hidden, int l) const {
    return hidden + int64_t(l) * problem.width * tile_vectors<V>;
  }

  // x [28], hidden [L, W], out [2]: direction and magnitude.
  void forward(const V* x, V* hidden, V* out, int vectors) const {
    const LaneTerm<V, S> terms[1] = {{weight(0), tile_rows(x), tensor_features}};
    product(terms, problem.width, vectors, AddBias<V>{hidden, bias(0), true});
    after_first(hidden, out, vectors);
  }

  // The other layers, from the first one's units.
  void after_first(V* hidden, V* out, int vectors) const {
    const V* x = hidden;
    for (int l = 1; l <= problem.hidden_layers; ++l) {
      const bool is_hidden = l < problem.hidden_layers;
      V* to = is_hidden ? layer(hidden, l) : out;
      const LaneTerm<V, S> terms[1] = {{weight(l), tile_rows(x), problem.width}};
      product(terms, problem.outputs(l), vectors, AddBias<V>{to, bias(l), is_hidden});
      x = to;
    }
  }

  // From the gradients of `out`: writes those of the hidden layers' sums and of x.
  void backward(const V* grad_out, const V* hidden, V* grad_hidden, V* grad_x, int vectors) const {
    const V* from = grad_out;
    for (int l = problem.hidden_layers; l >= 0; --l) {
      const LaneTerm<V, S> terms[1] = {{weight(l).transposed(), tile_rows(from), problem.outputs(l)}};
      if (l == 0) return product(terms, problem.inputs(0), vectors, StoreRows<V>{grad_x});
      V* to = layer(grad_hidden, l - 1);
      product(terms, problem.width, vectors, MaskRows<V>{to, layer(hidden, l - 1)});
      from = to;
    }
  }
};

}  // namespace
}  // namespace MK_CAPABILITY
}  // namespace metakern
