"""The proof: the demo's own network, trained as the demo trains it, computed by plain torch code to equal codes."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console

import qjax
from experiments.demo import checkpoint, data
from experiments.demo.config import Config
from experiments.demo.model import CHANNELS, CLASSES, HIDDEN
from experiments.demo.progress import Display
from experiments.demo.recipes import SETTINGS
from experiments.demo.run import CONVERTED, Trainer, _prepare

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
nnq = pytest.importorskip("torch.ao.nn.quantized")
nniq = pytest.importorskip("torch.ao.nn.intrinsic.quantized")


class TorchDigits(torch.nn.Module):
    """What a torch user writes for this network after conversion; knows nothing of qjax."""

    def __init__(self):
        super().__init__()
        self.quant = nnq.Quantize(1.0, 0, torch.quint8)
        self.conv1 = nniq.ConvReLU2d(1, CHANNELS[0], 3, padding=1)
        self.conv2 = nniq.ConvReLU2d(CHANNELS[0], CHANNELS[1], 3, padding=1)
        self.pool = torch.nn.MaxPool2d(2)
        self.fc1 = nniq.LinearReLU(4 * CHANNELS[1], HIDDEN)
        self.fc2 = nnq.Linear(HIDDEN, CLASSES)

    def forward(self, x):
        x = self.quant(x)
        x = self.pool(self.conv1(x))
        x = self.pool(self.conv2(x))
        return self.fc2(self.fc1(x.flatten(1)))


def test_torch_computes_the_demos_codes_on_every_test_image(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", "fbgemm")
    config = Config(seeds=1)
    train, test = data.load(config.test_fraction)
    setting = next(setting for setting in SETTINGS if setting.name == CONVERTED)
    with Display(Console(file=io.StringIO()), total=1) as display, jax.numpy_dtype_promotion("standard"):  # optax.adam
        display.doing("float")
        trainer = Trainer(config, train, test, display)
        params, _ = trainer.float_model(0)
        model, printed = trainer.qat(_prepare(setting, config)[1], params, 0)
    integer = qjax.convert(model.prepared, model.qvars, model.params)
    images = trainer.test_images
    codes = jax.jit(integer.codes)(images)
    simulated = jax.jit(model.prepared.codes)(model.qvars, model.params, images)
    assert codes.keys() == simulated.keys()
    for name, tensor in codes.items():
        np.testing.assert_array_equal(tensor.codes, simulated[name].codes, err_msg=name)

    checkpoint.write_int8(tmp_path / "digits_int8.pt", integer)
    net = TorchDigits()
    net.load_state_dict(torch.load(tmp_path / "digits_int8.pt", weights_only=True), strict=True)
    with torch.no_grad():
        theirs = net(torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)).int_repr().numpy()
    assert theirs.shape == (len(test.labels), CLASSES)
    np.testing.assert_array_equal(codes["Dense_1/output"].codes, theirs)
    accuracy = 100.0 * np.mean(theirs.argmax(axis=-1) == test.labels)
    assert accuracy == pytest.approx(printed, abs=1e-9)
    assert printed > 95.0, "a network that has learned nothing would prove little"
