"""Recurrent layers: a measured step computes what the kernel does, and its rows give back autograd's gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from kfdist.capture.biases import APART
from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from tests.support.factors import assert_factors_equal, factors_by_definition, factors_of
from tests.support.plans import planned

N, T, D, H = 4, 3, 5, 6


class Sequences(nn.Module):
    """A recurrent layer with a state to begin with, and a head on its outputs and last states."""

    def __init__(self, layer: nn.Module, first: bool) -> None:
        super().__init__()
        self.layer, self.first = layer, first

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        y = x if layer.batch_first else x.transpose(0, 1)
        state = None
        if self.first:
            sizes = [layer.proj_size or H, H][: 1 + isinstance(layer, nn.LSTM)]
            many = layer.num_layers * (1 + layer.bidirectional)
            states = [torch.linspace(-1, 1, many * N * d, dtype=x.dtype).view(many, N, d) for d in sizes]
            state = tuple(states) if len(states) > 1 else states[0]
        y, last = layer(y, state)
        last = torch.cat(last, -1) if isinstance(last, tuple) else last
        y = y if layer.batch_first else y.transpose(0, 1)
        return y.flatten(1).sum(1) + last.square().sum((0, 2))


class Cells(nn.Module):
    """A cell over a sequence."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return (state[0] if isinstance(state, tuple) else state).square().sum(1)


LAYERS: dict[str, nn.Module] = {
    "LSTM": Sequences(nn.LSTM(D, H, batch_first=True), True),
    "LSTM, two layers, both directions, projected": Sequences(nn.LSTM(D, H, 2, bidirectional=True, proj_size=3), True),
    "LSTM without biases": Sequences(nn.LSTM(D, H, 2, bias=False, proj_size=2, batch_first=True), False),
    "LSTM with dropout": Sequences(nn.LSTM(D, H, 3, dropout=0.5), False),
    "GRU": Sequences(nn.GRU(D, H, 2, bidirectional=True, batch_first=True), True),
    "GRU with dropout": Sequences(nn.GRU(D, H, 2, dropout=0.4, bidirectional=True), False),
    "RNN": Sequences(nn.RNN(D, H, 2, bias=False), False),
    "RNN of relu": Sequences(nn.RNN(D, H, 2, nonlinearity="relu", bidirectional=True), True),
    "LSTMCell": Cells(nn.LSTMCell(D, H)),
    "GRUCell": Cells(nn.GRUCell(D, H)),
    "RNNCell": Cells(nn.RNNCell(D, H)),
    "RNNCell of relu": Cells(nn.RNNCell(D, H, bias=False, nonlinearity="relu")),
}


def captured(model: nn.Module) -> tuple[Capture, dict[str, Any]]:
    blocks = {block.name: block for block in planned(model, "kfac").blocks}
    capture = Capture(model, blocks, sampling=Sampling(), grad_scaler=None)
    capture.arm(dict.fromkeys(blocks, Request(samples=N)))
    return capture, blocks


@pytest.mark.parametrize("model", LAYERS.values(), ids=LAYERS.keys())
def test_outputs_are_the_kernels_and_rows_give_back_the_gradients(model: nn.Module):
    model = model.double().train()
    x = torch.randn(N, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    plain = model(x)
    plain.mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    capture, blocks = captured(model)
    torch.manual_seed(1)
    output = model(x)
    torch.testing.assert_close(output, plain, rtol=1e-13, atol=1e-13)
    output.mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-12)
    drained = capture.drain()
    capture.close()
    assert not capture.unmeasured and APART not in capture.biases.seen
    assert planned(model, "kfac").coverage.share == 1.0
    for name, block in blocks.items():
        samples = drained[name].samples
        assert samples is not None and samples.a.shape[1] == N
        torch.testing.assert_close((samples.g.mT @ samples.a).sum(1) / N, block.gradient(), rtol=1e-11, atol=1e-12)


def test_factors_expand_over_time():
    class Twin(nn.Module):
        def __init__(self, layer: nn.RNN) -> None:
            super().__init__()
            self.add_module("weight_ih_l0", nn.Linear(D, H))
            self.add_module("weight_hh_l0", nn.Linear(H, H))
            for label in ("ih", "hh"):
                part: Any = getattr(self, f"weight_{label}_l0")
                part.weight, part.bias = getattr(layer, f"weight_{label}_l0"), getattr(layer, f"bias_{label}_l0")

        def forward(self, x: Tensor) -> Tensor:
            layers: Any = self
            h, outputs = x.new_zeros(len(x), H), []
            for step in x.unbind(1):
                h = (layers.weight_ih_l0(step) + layers.weight_hh_l0(h)).tanh()
                outputs.append(h)
            return torch.stack(outputs, 1)

    torch.manual_seed(0)
    layer = nn.RNN(D, H, batch_first=True).double()
    twin, x = Twin(layer).double(), torch.randn(N, T, D, dtype=torch.float64)
    capture, _ = captured(layer)
    layer(x)[0].square().sum().div(N).backward()
    found = factors_of(capture.drain())
    capture.close()
    expected = factors_by_definition(twin, list(x.split(1)), lambda model, one: model(one).square().sum(), found)
    assert_factors_equal(found, expected, 1e-12)


def test_packed_sequences_are_not_measured_and_that_is_said():
    torch.manual_seed(0)
    model = nn.LSTM(D, H)
    capture, _ = captured(model)
    packed = rnn.pack_sequence([torch.randn(3, D), torch.randn(2, D)])
    model(packed)[0].data.sum().backward()
    assert not capture.drain()
    assert capture.unmeasured["weight_hh_l0"] == "it is used by lstm, which can't be measured"
    capture.close()
