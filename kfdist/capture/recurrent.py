"""Recurrent layers, written out as the products that their kernels hide.

On steps that measure, a kernel such as `nn.LSTM`'s is replaced by the same function made of `F.linear` and element-wise
operations, one time step after the other: slower, with the same outputs to rounding. Inside,
examples come first whatever the layer's layout, so that dim 0 of every product is the batch. Dropout between layers
draws what torch's CPU kernel draws; cuDNN's has a generator of its own, so there a measured step has other masks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]
"""The hidden state h, and of an LSTM the cell state c."""

Cell = Callable[[Tensor, Tensor, State], State]
"""Makes the next state of W_ih x + b_ih, W_hh h + b_hh and the state."""


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return (n + z * (state[0] - n),)


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    del state
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    del state
    return ((x + h).relu(),)


def _direction(cell: Cell, x: Tensor, state: State, weights: Sequence[Tensor], *, biased: bool) -> tuple[Tensor, State]:
    """Runs one layer in one direction over x `[N, T, q]`; returns its outputs `[N, T, d]` and last state."""
    w_ih, w_hh, *others = weights
    b_ih, b_hh = others[:2] if biased else (None, None)
    projection = others[2 * biased] if len(others) > 2 * biased else None
    outputs = []
    for inputs in F.linear(x, w_ih, b_ih).unbind(1):
        state = cell(inputs, F.linear(state[0], w_hh, b_hh), state)
        if projection is not None:
            state = (F.linear(state[0], projection), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs, 1), state


def _layers(
    cell: Cell,
    x: Tensor,
    first: State,
    weights: Sequence[Tensor],
    biased: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> State:
    """Runs all layers; arguments and results are those of torch's kernels."""
    directions = 1 + bidirectional
    each = len(weights) // (layers * directions)
    x, last = x if batch_first else x.transpose(0, 1), []
    for layer in range(layers):
        found = []
        for number in range(layer * directions, (layer + 1) * directions):
            backwards = number % directions == 1
            own, start = weights[number * each : (number + 1) * each], tuple(part[number] for part in first)
            y, state = _direction(cell, x.flip(1) if backwards else x, start, own, biased=biased)
            found.append(y.flip(1) if backwards else y)
            last.append(state)
        x = found[0] if len(found) == 1 else torch.cat(found, -1)
        if dropout and train and layer < layers - 1:
            x = torch.dropout(x.transpose(0, 1).contiguous(), dropout, train).transpose(0, 1)  # masks in torch's order
    return (x if batch_first else x.transpose(0, 1), *(torch.stack(parts) for parts in zip(*last, strict=True)))


def _sequence(cell: Cell) -> Callable[..., Any]:
    def run(x: Tensor, first: Any, weights: Any, *settings: Any) -> Any:
        return _layers(cell, x, (first,) if isinstance(first, Tensor) else tuple(first), weights, *settings)

    return run


def _step(cell: Cell) -> Callable[..., Any]:
    def run(x: Tensor, state: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        state = (state,) if isinstance(state, Tensor) else tuple(state)
        found = cell(F.linear(x, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return found[0] if len(found) == 1 else found

    return run


_KERNELS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.lstm: _sequence(_lstm),
    torch.gru: _sequence(_gru),
    torch.rnn_tanh: _sequence(_tanh),
    torch.rnn_relu: _sequence(_relu),
    torch.lstm_cell: _step(_lstm),
    torch.gru_cell: _step(_gru),
    torch.rnn_tanh_cell: _step(_tanh),
    torch.rnn_relu_cell: _step(_relu),
}


def written_out(function: Callable[..., Any], args: Sequence[Any]) -> Callable[..., Any] | None:
    """Returns what does the same as a kernel in watchable operations; None for others, and for packed sequences."""
    packed = len(args) > 3 and isinstance(args[3], (list, tuple))
    return None if packed else _KERNELS.get(function)
