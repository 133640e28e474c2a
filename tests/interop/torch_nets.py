"""The network that several tests prepare, train and convert with live torch, which only some Pythons have: imported late."""

import qjax
from tests.interop.numbers_of import scales, zeros


def network():
    """conv-bn-relu, conv-relu and linear-relu, which are fused, and a linear."""
    import torch

    ao = torch.ao.quantization
    net = torch.nn.Sequential(
        ao.QuantStub(), torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
        torch.nn.Conv2d(4, 6, 3, groups=2), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(96, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2), ao.DeQuantStub(),
    )  # fmt: skip
    net[2].running_mean.uniform_(-1, 1)
    net[2].running_var.uniform_(0.5, 2)
    return net


FUSED = [["1", "2", "3"], ["4", "5"], ["7", "8"]]
OPS = ["1", "4", "7", "9"]


def loaded(model, place, **options):
    """The checkpoint of the model's state dict, and its table of points."""
    import torch

    torch.save(model.state_dict(), place / "a.pt")
    checkpoint = qjax.interop.load(place / "a.pt")
    return checkpoint, qjax.interop.points(checkpoint, **options)


def assert_weight_is(point, weight):
    """The point has the numbers of torch's quantized weight."""
    import torch

    per_channel = weight.qscheme() == torch.per_channel_affine
    wanted = weight.q_per_channel_scales().tolist() if per_channel else [weight.q_scale()]
    assert scales(point) == tuple(wanted)
    assert set(zeros(point)) == {0}
    assert (point.dtype, point.axis) == ("qint8", 0 if per_channel else None)
