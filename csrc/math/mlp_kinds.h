// Names of the activations and losses of an MLP's inner loop.
#pragma once

namespace metakern {

enum class Activation : int { relu, tanh, sigmoid, gelu, leaky_relu };
enum class TaskLoss : int { mse, cross_entropy, binary_cross_entropy };

}  // namespace metakern
