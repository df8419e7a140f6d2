"""Small layers, functions and losses of torch.nn, for comparing the batched inner loop with a plain loop.

Axis legend: S samples of a task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Layer = Callable[[], nn.Module]


class Probe(nn.Module):
    """A layer after learned input weights, so that layers without parameters adapt too."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.scale, self.shift = (
            layer,
            nn.Parameter(torch.ones(shape)),
            nn.Parameter(torch.full(shape, 0.1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale + self.shift)


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.weights = function, nn.ParameterList([nn.Parameter(torch.randn(s) / 2) for s in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


def function(call: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Layer:
    """A module of a function of the input and parameters of these shapes."""
    return lambda: Function(call, *shapes)


class Around(nn.Module):
    """A layer among others, called as ``call(layer, x)``."""

    def __init__(self, layer: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


def around(make: Layer, call: Callable[[Any, Tensor], Tensor]) -> Layer:
    return lambda: Around(make(), call)


VECTOR, SIGNAL, IMAGE, VOLUME = (4,), (2, 6), (2, 5, 5), (2, 3, 4, 4)

#: By name: a module and the shape of one sample. torch.vmap runs all of them.
LAYERS: dict[str, tuple[Layer, tuple[int, ...]]] = {
    # --------------------------------------------------------------------------------------------------- linear
    "Linear": (lambda: nn.Linear(4, 3), VECTOR),
    "Linear of sequences": (lambda: nn.Linear(6, 3, bias=False), SIGNAL),
    "Bilinear": (around(lambda: nn.Bilinear(2, 2, 3), lambda m, x: m(x[:, :2], x[:, 2:])), VECTOR),
    "Identity": (nn.Identity, VECTOR),
    # ---------------------------------------------------------------------------------------------- convolutions
    "Conv1d": (lambda: nn.Conv1d(2, 3, 3), SIGNAL),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3, stride=2), IMAGE),
    "Conv2d dilated": (lambda: nn.Conv2d(2, 3, 2, dilation=2, padding="same"), IMAGE),
    "Conv2d grouped": (lambda: nn.Conv2d(2, 4, 3, groups=2, bias=False), IMAGE),
    "Conv3d": (lambda: nn.Conv3d(2, 2, 2), VOLUME),
    **{
        f"Conv2d {mode}": (lambda mode=mode: nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode), IMAGE)
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 3), SIGNAL),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1, groups=2), IMAGE),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 2, 2), VOLUME),
    "Unfold": (lambda: nn.Unfold(2), IMAGE),
    "Fold": (lambda: nn.Sequential(nn.Unfold(2), nn.Fold((5, 5), 2)), IMAGE),
    # --------------------------------------------------------------------------------------------------- pooling
    "MaxPool1d": (lambda: nn.MaxPool1d(2, 1), SIGNAL),
    "MaxPool2d": (lambda: nn.MaxPool2d(2, ceil_mode=True), IMAGE),
    "MaxPool2d dilated": (lambda: nn.MaxPool2d(2, 1, padding=1, dilation=2), IMAGE),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), VOLUME),
    "MaxUnpool2d": (
        around(lambda: nn.MaxPool2d(2, return_indices=True), lambda m, x: F.max_unpool2d(*m(x), 2, output_size=(5, 5))),
        IMAGE,
    ),
    "AvgPool1d": (lambda: nn.AvgPool1d(2), SIGNAL),
    "AvgPool2d": (lambda: nn.AvgPool2d(2, padding=1, count_include_pad=False), IMAGE),
    "AvgPool3d": (lambda: nn.AvgPool3d(2), VOLUME),
    "LPPool1d": (lambda: nn.LPPool1d(2, 2), SIGNAL),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), IMAGE),
    "AdaptiveMaxPool1d": (lambda: nn.AdaptiveMaxPool1d(4), SIGNAL),
    "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d((3, None)), IMAGE),
    "AdaptiveMaxPool3d": (lambda: nn.AdaptiveMaxPool3d(2), VOLUME),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(4), SIGNAL),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((3, 2)), IMAGE),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(2), VOLUME),
    # --------------------------------------------------------------------------------------------------- padding
    "ReflectionPad1d": (lambda: nn.ReflectionPad1d(2), SIGNAL),
    "ReflectionPad2d": (lambda: nn.ReflectionPad2d((1, 2, 0, 1)), IMAGE),
    "ReflectionPad3d": (lambda: nn.ReflectionPad3d(1), VOLUME),
    "ReplicationPad1d": (lambda: nn.ReplicationPad1d(2), SIGNAL),
    "ReplicationPad2d": (lambda: nn.ReplicationPad2d((1, 2, 0, 1)), IMAGE),
    "ReplicationPad3d": (lambda: nn.ReplicationPad3d(1), VOLUME),
    "CircularPad2d": (lambda: nn.CircularPad2d(2), IMAGE),
    "ConstantPad2d": (lambda: nn.ConstantPad2d((1, -1, 0, 2), 0.5), IMAGE),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), IMAGE),
    # ----------------------------------------------------------------------------------------------- activations
    **{
        name: (getattr(nn, name), VECTOR)
        for name in (
            *("ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Softplus", "Softsign", "Tanh", "Tanhshrink", "Sigmoid"),
            *("LogSigmoid", "Hardsigmoid", "Hardtanh", "Hardswish", "Hardshrink", "Softshrink", "ReLU", "ReLU6"),
            *("LeakyReLU", "PReLU"),
        )
    },
    "GELU tanh": (lambda: nn.GELU("tanh"), VECTOR),
    "PReLU of channels": (lambda: nn.PReLU(2), SIGNAL),
    "ReLU in place": (lambda: nn.ReLU(inplace=True), VECTOR),
    "Threshold": (lambda: nn.Threshold(0.1, 0.3), VECTOR),
    "GLU": (nn.GLU, VECTOR),
    "Softmax": (lambda: nn.Softmax(-1), VECTOR),
    "Softmin": (lambda: nn.Softmin(-1), VECTOR),
    "Softmax2d": (nn.Softmax2d, IMAGE),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), VECTOR),
    # ----------------------------------------------------------------------------------------------------- norms
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), VECTOR),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(2), IMAGE),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(2, track_running_stats=False), VOLUME),
    "BatchNorm2d eval": (lambda: nn.BatchNorm2d(2).eval(), IMAGE),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(2, affine=True), SIGNAL),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), IMAGE),
    "InstanceNorm2d eval": (lambda: nn.InstanceNorm2d(2, track_running_stats=True).eval(), IMAGE),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(2), VOLUME),
    "GroupNorm": (lambda: nn.GroupNorm(2, 2), SIGNAL),
    "LayerNorm": (lambda: nn.LayerNorm([2, 6]), SIGNAL),
    "RMSNorm": (lambda: nn.RMSNorm(6), SIGNAL),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), IMAGE),
    "normalize": (function(F.normalize), VECTOR),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), VECTOR),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 3)), VECTOR),
    "spectral norm eval": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), VECTOR),
    # ----------------------------------------------------------------------------------------- cells, attention
    "RNNCell": (lambda: nn.RNNCell(4, 3), VECTOR),
    "GRUCell": (lambda: nn.GRUCell(4, 3), VECTOR),
    "scaled_dot_product_attention": (
        function(lambda x, w: F.scaled_dot_product_attention(x @ w, x, x, is_causal=True), (6, 6)),
        SIGNAL,
    ),
    "MultiheadAttention": (
        around(lambda: nn.MultiheadAttention(6, 2, batch_first=True), lambda m, x: m(x, x, x)[0]),
        SIGNAL,
    ),
    "MultiheadAttention eval": (
        around(
            lambda: nn.MultiheadAttention(6, 2, batch_first=True).eval(), lambda m, x: m(x, x, x, need_weights=False)[0]
        ),
        SIGNAL,
    ),
    "MultiheadAttention with bias, other widths": (
        around(
            lambda: nn.MultiheadAttention(6, 2, kdim=3, vdim=2, add_bias_kv=True, add_zero_attn=True, batch_first=True),
            lambda m, x: m(x, x[..., :3], x[..., :2])[0],
        ),
        SIGNAL,
    ),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(6, 2, 4, dropout=0.0, batch_first=True), SIGNAL),
    "TransformerEncoderLayer eval": (lambda: nn.TransformerEncoderLayer(6, 2, 4, batch_first=True).eval(), SIGNAL),
    "TransformerEncoderLayer norm first": (
        lambda: nn.TransformerEncoderLayer(6, 2, 4, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"),
        SIGNAL,
    ),
    "TransformerEncoder eval": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 4, batch_first=True), 2).eval(),
        SIGNAL,
    ),
    "TransformerDecoderLayer": (
        around(
            lambda: nn.TransformerDecoderLayer(6, 2, 4, dropout=0.0, batch_first=True), lambda m, x: m(x, x.flip(1))
        ),
        SIGNAL,
    ),
    "Transformer": (
        around(lambda: nn.Transformer(6, 2, 1, 1, 4, 0.0, batch_first=True), lambda m, x: m(x, x.flip(1))),
        SIGNAL,
    ),
    # ------------------------------------------------------------------------------------------ shapes and vision
    "Dropout eval": (lambda: nn.Dropout().eval(), VECTOR),
    "Flatten": (nn.Flatten, IMAGE),
    "Unflatten": (lambda: nn.Unflatten(1, (2, 2)), VECTOR),
    "PixelShuffle": (lambda: nn.PixelShuffle(2), (4, 2, 2)),
    "PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), (1, 4, 4)),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), (4, 2, 2)),
    **{
        f"Upsample {mode}": (lambda mode=mode: nn.Upsample(scale_factor=2, mode=mode), shape)
        for mode, shape in (
            ("nearest", SIGNAL),
            ("nearest-exact", IMAGE),
            ("linear", SIGNAL),
            ("bilinear", IMAGE),
            ("bicubic", IMAGE),
            ("trilinear", VOLUME),
        )
    },
    "Upsample aligned": (lambda: nn.Upsample(size=(7, 4), mode="bilinear", align_corners=True), IMAGE),
    "interpolate area": (function(lambda x: F.interpolate(x, 3, mode="area")), IMAGE),
    "interpolate antialiased": (function(lambda x: F.interpolate(x, 3, mode="bilinear", antialias=True)), IMAGE),
    "grid_sample": (
        function(
            lambda x, w: F.grid_sample(
                x,
                F.affine_grid(w.expand(len(x), 2, 3), (len(x), 2, 4, 4), False),
                padding_mode="border",
                align_corners=False,
            ),
            (2, 3),
        ),
        IMAGE,
    ),
    "CosineSimilarity": (around(lambda: nn.CosineSimilarity(2), lambda m, x: m(x[:, :1], x)), SIGNAL),
    "PairwiseDistance": (around(lambda: nn.PairwiseDistance(3.0), lambda m, x: m(x[:, :2], x[:, 2:])), VECTOR),
    "cdist": (function(torch.cdist, (3, 4)), VECTOR),
    # --------------------------------------------------------------------------------------------------- tensors
    "einsum": (function(lambda x, w: torch.einsum("sci,iko->sko", x, w), (6, 2, 3)), SIGNAL),
    "fft": (function(lambda x: torch.view_as_real(torch.fft.rfft(x)).flatten(1)), VECTOR),
    "sort": (function(lambda x: x.sort(-1).values * torch.arange(4.0)), VECTOR),
    "topk": (function(lambda x: x.topk(2).values), VECTOR),
    "cumsum": (function(lambda x: x.cumsum(-1).cumprod(-1)), VECTOR),
    "gather": (function(lambda x, w: w.gather(0, x.argsort(-1)) * x, (4, 4)), VECTOR),
    "advanced indices": (function(lambda x, w: w[x.argmax(-1)] * x, (4, 4)), VECTOR),
    "written slices": (function(lambda x, w: _written(x, w), (4,)), VECTOR),
    "scatter_add": (function(lambda x, w: w.scatter_add(0, x.argsort(-1), x), (4, 4)), VECTOR),
    "index_add": (function(lambda x, w: w.index_add(0, x.argmax(-1), x), (4, 4)), VECTOR),
    "where": (function(lambda x, w: torch.where(x > 0, x * w, -x), (4,)), VECTOR),
    "masked_fill": (
        function(lambda x, w: (x * w).masked_fill(x > x.mean(), -9.0).softmax(-1), (4,)),
        VECTOR,
    ),
    "logsumexp": (function(lambda x, w: (x @ w).logsumexp(-1), (4, 3)), VECTOR),
    "solve": (function(lambda x, w: torch.linalg.solve(w @ w.mT + torch.eye(4).to(w), x.mT).mT, (4, 4)), VECTOR),
    "cholesky": (function(lambda x, w: x @ torch.linalg.cholesky(w @ w.mT + torch.eye(4).to(w)), (4, 4)), VECTOR),
    "norms of weights": (function(lambda x, w: x @ (w / w.norm(dim=0)), (4, 3)), VECTOR),
    "median": (function(lambda x: x - x.median(-1, keepdim=True).values), VECTOR),
    "std": (function(lambda x: x / x.std(-1, keepdim=True)), VECTOR),
    "torch.func.grad within": (function(torch.func.vmap(torch.func.grad(lambda x: x.sin().prod()))), VECTOR),
}


def _moved(x: Tensor, w: Tensor) -> Tensor:
    """Images under an affine map."""
    grid = F.affine_grid(w.expand(len(x), 2, 3), [len(x), 2, 4, 4], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _written(x: Tensor, w: Tensor) -> Tensor:
    h = x * w
    h[:, 1:3] *= 2
    h[:, 0] = (x[:, 1] * w[0]).sin()
    h[..., -1:].clamp_(min=0)
    h[:2, 1] += w[1]
    return h


#: Those that torch.vmap cannot run.
LOOPED: dict[str, tuple[Layer, tuple[int, ...]]] = {
    "RNN": (around(lambda: nn.RNN(6, 2, batch_first=True), lambda m, x: m(x)[0]), SIGNAL),
    "LSTM": (around(lambda: nn.LSTM(6, 2, 2, batch_first=True), lambda m, x: m(x)[0]), SIGNAL),
    "LSTM projected": (around(lambda: nn.LSTM(6, 3, proj_size=2, batch_first=True), lambda m, x: m(x)[0]), SIGNAL),
    "GRU": (
        around(lambda: nn.GRU(6, 2, bidirectional=True, batch_first=True), lambda m, x: m(x)[1].transpose(0, 1)),
        SIGNAL,
    ),
    "LSTMCell": (around(lambda: nn.LSTMCell(4, 3), lambda m, x: torch.cat(m(x), 1)), VECTOR),
    "RReLU eval": (lambda: nn.RReLU().eval(), VECTOR),
    "BatchNorm2d averaging": (lambda: nn.BatchNorm2d(2, momentum=None), IMAGE),
    "CrossMapLRN2d": (lambda: nn.CrossMapLRN2d(2), IMAGE),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), VECTOR),
    "spectral norm by hooks": (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), VECTOR),
}


def _numbers(samples: int, generator: torch.Generator) -> Tensor:
    return torch.randn(samples, 3, generator=generator, dtype=torch.float64)


def _shares(samples: int, generator: torch.Generator) -> Tensor:
    return _numbers(samples, generator).softmax(1)


def _labels(samples: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, (samples,), generator=generator)


def _bits(samples: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2, (samples, 3), generator=generator).double()


def _signs(samples: int, generator: torch.Generator) -> Tensor:
    return 2 * torch.randint(2, (samples,), generator=generator).double() - 1


WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
REFERENCES = torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _beside(loss: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A pairwise loss: each sample with a fixed one."""
    return lambda prediction, y: loss(prediction, REFERENCES[:1].expand_as(prediction), y)


#: By name: a loss of predictions [S, 3], and how its targets are drawn.
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[int, torch.Generator], Tensor]]] = {
    "L1Loss": (nn.L1Loss(), _numbers),
    "MSELoss": (nn.MSELoss(reduction="sum"), _numbers),
    "HuberLoss": (nn.HuberLoss(delta=0.5), _numbers),
    "SmoothL1Loss": (nn.SmoothL1Loss(beta=0.5), _numbers),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(WEIGHT, ignore_index=1), _labels),
    "CrossEntropyLoss smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), _labels),
    "CrossEntropyLoss of shares": (nn.CrossEntropyLoss(WEIGHT), _shares),
    "NLLLoss": (lambda p, y: nn.NLLLoss(WEIGHT)(p.log_softmax(1), y), _labels),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(full=True), _bits),
    "KLDivLoss": (lambda p, y: nn.KLDivLoss(reduction="batchmean")(p.log_softmax(1), y), _shares),
    "KLDivLoss of logarithms": (
        lambda p, y: nn.KLDivLoss(reduction="sum", log_target=True)(p.log_softmax(1), y),
        _numbers,
    ),
    "BCELoss": (lambda p, y: nn.BCELoss(WEIGHT)(p.sigmoid(), y), _bits),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), _bits),
    "SoftMarginLoss": (lambda p, y: nn.SoftMarginLoss()(p, 2 * y - 1), _bits),
    "HingeEmbeddingLoss": (lambda p, y: nn.HingeEmbeddingLoss()(p, 2 * y - 1), _bits),
    "MarginRankingLoss": (lambda p, y: nn.MarginRankingLoss(0.3)(p[:, 0], p[:, 1], y), _signs),
    "CosineEmbeddingLoss": (_beside(nn.CosineEmbeddingLoss(0.1)), _signs),
    "MultiMarginLoss": (nn.MultiMarginLoss(weight=WEIGHT), _labels),
    "MultiLabelMarginLoss": (lambda p, y: nn.MultiLabelMarginLoss()(p, F.pad(y[:, None], (0, 2), value=-1)), _labels),
    "CTCLoss": (
        lambda p, y: nn.CTCLoss()(p.log_softmax(1), y[:2].clamp(min=1), torch.tensor(len(p)), torch.tensor(2)),
        _labels,
    ),
    "MultiLabelSoftMarginLoss": (nn.MultiLabelSoftMarginLoss(WEIGHT), _bits),
    "TripletMarginLoss": (lambda p, y: nn.TripletMarginLoss()(p, y, p.flip(0)), _numbers),
    "TripletMarginWithDistanceLoss": (
        lambda p, y: nn.TripletMarginWithDistanceLoss(distance_function=nn.PairwiseDistance(3.0))(p, y, p.flip(0)),
        _numbers,
    ),
}

#: Those that torch.vmap cannot run.
LOOPED_LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[int, torch.Generator], Tensor]]] = {
    "GaussianNLLLoss": (lambda p, y: nn.GaussianNLLLoss()(p, y, p.exp()), _numbers),
    "CrossEntropyLoss smoothed, with labels to ignore": (
        nn.CrossEntropyLoss(WEIGHT, ignore_index=1, label_smoothing=0.1),
        _labels,
    ),
    "AdaptiveLogSoftmaxWithLoss": (
        lambda p, y: F.cross_entropy(p[y >= 0], y[y >= 0]),  # as that does: samples are chosen by their labels
        _labels,
    ),
}

#: Those that PyTorch has no second derivative of.
FIRST_ORDER = {"Hardsigmoid", "cdist", "CrossMapLRN2d", "MultiMarginLoss", "MultiLabelMarginLoss", "CTCLoss"}
