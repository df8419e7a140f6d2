// One pass of a task's MLP in shared memory by all threads of a block: forward, gradient, and the product of the
// Hessian with a vector, by forward over reverse (Pearlmutter 1994).
//
// Every function must be called by all threads; where it says so it ends in a barrier, after which all threads see what
// it wrote.
#pragma once
#include "../math/mlp.h"
#include "cuda_layout.h"
#include "cuda_product.cuh"

namespace metakern {
inline namespace MK_CAPABILITY {

template <class S>
class MlpPass {
 public:
  __device__ __forceinline__ MlpPass(const MlpInnerLoopProblem& p, const MlpLayout& m) : p_(p), m_(m) {}

  static __device__ __forceinline__ S* memory() { return shared_elements<S>(); }

  // use(i) for the numbers below `count`, each by one thread.
  template <class Use>
  static __device__ __forceinline__ void each(int count, const Use& use) {
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) use(i);
  }

  // Computes all activations up to the predictions, from the parameters at `theta`. Ends in a barrier.
  __device__ __forceinline__ void forward(int theta, const MlpSet& set) const {
    for (int l = 0; l < p_.num_layers; ++l) {
      const bool last = l + 1 == p_.num_layers;
      const int h = set.h + m_.rows[l] * set.row, z = set.z + m_.rows[l] * set.row, row = set.row;
      const Activation activation = p_.activations[l];
      const S leak = S(p_.slopes[l]);
      product<S>(p_.widths[l + 1], set.count, {matrix(theta, l), input(set, l), p_.widths[l] + 1}, {},
                 [=](int unit, int s, S value) {
                   const int at = unit * row + s;
                   memory()[h + at] = last ? value : activation_value(activation, leak, value);
                   if (z != h) memory()[z + at] = value;
                 });
      if (!last) each(set.count, [=](int s) { memory()[h + p_.widths[l + 1] * row + s] = S(1); });
      __syncthreads();
    }
  }

  // Losses of the samples to [count]; needs a barrier before they are read by others.
  __device__ __forceinline__ void losses(const MlpSet& set, int out) const {
    each(set.count, [&](int s) { memory()[out + s] = loss_value(p_.loss, sample(set, s)); });
  }

  // Gradients by all pre-activations, after forward. Ends in a barrier.
  __device__ __forceinline__ void backward(int theta, const MlpSet& set) const {
    const int top = set.delta + m_.rows[p_.num_layers - 1] * set.row;
    each(set.count, [&](int s) { loss_gradient(p_.loss, sample(set, s), memory() + top + s); });
    __syncthreads();
    for (int l = p_.num_layers - 1; l > 0; --l) {
      product<S>(p_.widths[l], set.count, {matrix(theta, l).transposed(), rows(set.delta, set, l), p_.widths[l + 1]},
                 {}, [&](int unit, int s, S value) {
                   const int at = (m_.rows[l - 1] + unit) * set.row + s;
                   if (set.e >= 0) memory()[set.e + at] = value;
                   memory()[set.delta + at] = unit_at(set, l - 1, at).slope_times(value);
                 });
      __syncthreads();
    }
  }

  // sink(unit, input, gradient) for every element of a layer's matrix, after backward; input `inputs` is the bias.
  template <class Sink>
  __device__ __forceinline__ void layer_gradient(int l, const MlpSet& set, const Sink& sink) const {
    product<S>(p_.widths[l + 1], p_.widths[l] + 1, {rows(set.delta, set, l), input(set, l).transposed(), set.count}, {},
               sink);
  }

  // adjoint, in the layout of the parameters, += the Hessian of the support loss times the direction, after backward.
  // Ends in a barrier.
  __device__ __forceinline__ void add_hessian_product(int theta, const MlpSet& set, S* adjoint) const {
    tangent_forward(theta, set);
    tangent_backward(theta, set);
    for (int l = 0; l < p_.num_layers; ++l) {
      const int first = m_.weights[l], row = matrix_row(p_.widths[l]);
      product<S>(p_.widths[l + 1], p_.widths[l] + 1,
                 {rows(m_.tangent_delta, set, l), input(set, l).transposed(), set.count},
                 {rows(set.delta, set, l), input_tangent(set, l).transposed(), l == 0 ? 0 : set.count},
                 [=](int unit, int n, S value) { adjoint[first + unit * row + n] += value; });
    }
    __syncthreads();
  }

 private:
  const MlpInnerLoopProblem& p_;
  const MlpLayout& m_;

  __device__ __forceinline__ SharedMatrix matrix(int params, int l) const {
    return {params + m_.weights[l], matrix_row(p_.widths[l]), 1};
  }
  __device__ __forceinline__ SharedMatrix rows(int units, const MlpSet& set, int l) const {
    return {units + m_.rows[l] * set.row, set.row, 1};
  }
  __device__ __forceinline__ SharedMatrix input(const MlpSet& set, int l) const {
    return l == 0 ? SharedMatrix{set.x, set.row, 1} : rows(set.h, set, l - 1);
  }
  __device__ __forceinline__ LossSample<S> sample(const MlpSet& set, int s) const {
    const int top = set.h + m_.rows[p_.num_layers - 1] * set.row;
    return {memory() + top + s, memory() + set.y + s, set.row, p_.outputs(), memory()[set.weight + s]};
  }
  // A layer's activation at element `at` of the passes' arrays.
  __device__ __forceinline__ ActivationAt<S> unit_at(const MlpSet& set, int l, int at) const {
    return {p_.activations[l], S(p_.slopes[l]), memory()[set.z + at], memory()[set.h + at]};
  }
  // Tangent of the inputs of a layer other than the first, whose inputs have none.
  __device__ __forceinline__ SharedMatrix input_tangent(const MlpSet& set, int l) const {
    return rows(m_.tangent_h, set, l == 0 ? 0 : l - 1);
  }

  __device__ __forceinline__ void tangent_forward(int theta, const MlpSet& set) const {
    for (int l = 0; l < p_.num_layers; ++l) {
      const bool last = l + 1 == p_.num_layers;
      product<S>(p_.widths[l + 1], set.count, {matrix(m_.direction, l), input(set, l), p_.widths[l] + 1},
                 {matrix(theta, l), input_tangent(set, l), l == 0 ? 0 : p_.widths[l]}, [&](int unit, int s, S value) {
                   const int at = (m_.rows[l] + unit) * set.row + s;
                   memory()[m_.tangent_z + at] = value;
                   if (!last) memory()[m_.tangent_h + at] = unit_at(set, l, at).slope_times(value);
                 });
      const int ones = m_.tangent_h + (m_.rows[l] + p_.widths[l + 1]) * set.row;
      if (!last) each(set.count, [=](int s) { memory()[ones + s] = S(0); });
      __syncthreads();
    }
  }

  __device__ __forceinline__ void tangent_backward(int theta, const MlpSet& set) const {
    const int top = m_.rows[p_.num_layers - 1] * set.row;
    each(set.count, [&](int s) {
      loss_gradient_tangent(p_.loss, sample(set, s), memory() + m_.tangent_z + top + s,
                            memory() + m_.tangent_delta + top + s);
    });
    __syncthreads();
    for (int l = p_.num_layers - 1; l > 0; --l) {
      product<S>(p_.widths[l], set.count,
                 {matrix(theta, l).transposed(), rows(m_.tangent_delta, set, l), p_.widths[l + 1]},
                 {matrix(m_.direction, l).transposed(), rows(set.delta, set, l), p_.widths[l + 1]},
                 [&](int unit, int s, S value) {
                   const int at = (m_.rows[l - 1] + unit) * set.row + s;
                   memory()[m_.tangent_delta + at] =
                       unit_at(set, l - 1, at).tangent(value, memory()[set.e + at], memory()[m_.tangent_z + at]);
                 });
      __syncthreads();
    }
  }
};

}  // namespace MK_CAPABILITY
}  // namespace metakern
