"""Writes the files that docs/pytorch_outputs.md reads: small models that live torch quantizes, and what one of them returns.

Run it with torch 2.13, in the folder of the repository: `python -m docs.samples.make_samples`. Weights and calibration data are
chosen so that the numbers come out round; all else is as torch has it by default.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
ao, nn = torch.ao.quantization, torch.nn
WEIGHT = torch.tensor([[1.25, -0.5], [0.5, 0.125], [-0.25, 1.0]])
# From -16 to 47.75, which is 255 steps of 0.25; the model's outputs, too, have such ranges, of steps of their own.
CALIBRATION = torch.tensor([[-16.0, 47.75], [47.75, -16.0], [0.0, 0.0]])
INPUTS = torch.tensor([[8.0, 20.0], [-4.0, 2.5]])


def network(weight: torch.Tensor) -> nn.Sequential:
    """QuantStub and a Linear without a bias: it returns codes."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return nn.Sequential(ao.QuantStub(), linear)


def static(weight: torch.Tensor, *, per_channel: bool) -> nn.Module:
    """Calibrated and converted."""
    net = network(weight).eval()
    observer = ao.default_per_channel_weight_observer if per_channel else ao.default_weight_observer
    net.qconfig = ao.QConfig(activation=ao.MinMaxObserver, weight=observer)
    net = ao.prepare(net)
    net(CALIBRATION)
    return ao.convert(net)


def main() -> None:
    """Write all files."""
    torch.manual_seed(0)
    torch.backends.quantized.engine = "fbgemm"
    model = static(WEIGHT, per_channel=False)
    torch.save(model.state_dict(), HERE / "static.pt")
    np.save(HERE / "static_outputs.npy", model(INPUTS).int_repr().numpy())

    rows = torch.tensor([[1.275, 0.5], [0.1275, 0.05], [0.01275, 0.005]])
    torch.save(static(rows, per_channel=True).state_dict(), HERE / "per_channel.pt")

    dynamic = ao.quantize_dynamic(network(WEIGHT)[1:], {nn.Linear}, dtype=torch.qint8)
    torch.save(dynamic.state_dict(), HERE / "dynamic.pt")

    net = network(WEIGHT).train()
    net.qconfig = ao.get_default_qat_qconfig("fbgemm")
    net = ao.prepare_qat(net)
    net(CALIBRATION)
    torch.save(net.eval().state_dict(), HERE / "qat.pt")
    torch.save(ao.convert(copy.deepcopy(net)).state_dict(), HERE / "qat_converted.pt")


if __name__ == "__main__":
    main()
