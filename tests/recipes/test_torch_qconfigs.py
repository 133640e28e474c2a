"""The ready-made torch recipes against torch's own qconfig objects, field by field, and against its observers and kernels."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import observers, recipes
from qjax._conventions import TORCH_EPS
from tests.torch_engine import torch_engine

ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")
XNNPACK = ("symmetric_qnnpack", "per_channel_symmetric_qnnpack")


@pytest.fixture(scope="module")
def tq():
    """torch.ao.quantization.qconfig and .observer, of which onednn's warns where a processor is old."""
    qconfig = pytest.importorskip("torch.ao.quantization.qconfig", reason="torch's qconfigs are what is compared with")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Default qconfig of oneDNN", category=UserWarning)
        yield qconfig


def torchs(module):
    """What a live torch observer or fake-quant is made of, in qjax's words."""
    torch = pytest.importorskip("torch")
    observer = getattr(module, "activation_post_process", module)
    fields = {
        "format": {torch.quint8: "uint8", torch.qint8: "int8"}[observer.dtype],
        "range": (observer.quant_min, observer.quant_max),
        "symmetric": observer.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric),
        "granularity": "channel 0" if "channel" in str(observer.qscheme) else "tensor",
        "eps": float(observer.eps),
        "observer": type(observer).__name__,
        "dynamic": observer.is_dynamic,
        "module": type(module).__name__,
    }
    if fields["granularity"] == "channel 0":
        assert observer.ch_axis == 0
    for name in ("averaging_constant", "bins"):
        if hasattr(observer, name):
            fields[name] = getattr(observer, name)
    return fields


def ours(observer, *, channel="output"):
    """The same of an observer of qjax."""
    spec = observer.spec
    per_channel = spec.granularity != qjax.PerTensor()
    if per_channel:
        assert spec.granularity == qjax.PerChannel(channel)  # axis 0 of torch's weights is the output channel
    moving = isinstance(observer, observers.MovingAverageMinMax)
    fused = moving and isinstance(observer, observers.FusedMovingAverage)
    histogram = isinstance(observer, observers.Histogram)
    torch_observer = "Histogram" if histogram else ("MovingAverage" * moving + "PerChannel" * per_channel + "MinMax")
    fields = {
        "format": f"{'' if spec.format.signed else 'u'}int{spec.format.bits}",
        "range": (spec.quant_min, spec.quant_max),
        "symmetric": spec.symmetric,
        "granularity": "channel 0" if per_channel else "tensor",
        "eps": TORCH_EPS if spec.eps is None else spec.eps,
        "observer": torch_observer + "Observer",
        "dynamic": False,  # torch's word for activations; a weight is found anew without it
    }
    assert spec.row.eps == TORCH_EPS
    fields["module"] = fields["observer"]
    if moving:
        fields["averaging_constant"] = observer.averaging_constant
        fields["module"] = "FusedMovingAvgObsFakeQuantize" if fused else "FakeQuantize"
    if histogram:
        fields["bins"] = observer.bins
    return fields


def only_rule(recipe):
    (rule,) = recipe.rules
    assert (rule.pattern, rule.lhs, rule.rhs) in ((".*", "input", "input"), (".*", None, None))
    return rule


def compare(recipe, qconfig):
    rule = only_rule(recipe)
    assert ours(rule.input_observer) == ours(rule.output_observer) == torchs(qconfig.activation())
    assert ours(rule.weight_observer) == torchs(qconfig.weight())


@pytest.mark.parametrize("engine", ENGINES)
def test_static(tq, engine):
    compare(recipes.torch_static(engine), tq.get_default_qconfig(engine))


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("engine", ENGINES)
def test_qat(tq, engine, version):
    compare(recipes.torch_qat(engine, version=version), tq.get_default_qat_qconfig(engine, version))


@pytest.mark.parametrize("engine", XNNPACK)
def test_symmetric_qnnpack(tq, engine):
    compare(recipes.torch_static(engine), getattr(tq, f"default_{engine}_qconfig"))
    compare(recipes.torch_qat(engine), getattr(tq, f"default_{engine}_qat_qconfig"))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_dynamic(tq, engine, per_channel):
    qconfig = tq.per_channel_dynamic_qconfig if per_channel else tq.default_dynamic_qconfig
    rule = only_rule(recipes.torch_dynamic(engine, per_channel=per_channel, reduce_range=False))
    assert ours(rule.weight_observer) == torchs(qconfig.weight())
    assert rule.output is None
    assert rule.input_observer.dynamic
    placeholder, got = torchs(qconfig.activation()), ours(rule.input_observer)
    assert placeholder["dynamic"]
    same = ("format", "range", "symmetric", "granularity", "eps")
    assert [placeholder[name] for name in same] == [got[name] for name in same]


def test_the_defaults_are_torchs(tq):
    compare(recipes.torch_static(), tq.get_default_qconfig())
    compare(recipes.torch_qat(), tq.get_default_qat_qconfig())


@pytest.mark.parametrize("engine", [*ENGINES, *XNNPACK])
def test_the_weight_codes_are_torchs(tq, engine, rng):
    """torch's converted weight, code for code: its observer, its quantize op, on values that fall on ties."""
    torch = pytest.importorskip("torch")
    name = f"default_{engine}_qconfig"
    qconfig = getattr(tq, name) if engine in XNNPACK else tq.get_default_qconfig(engine)
    values = rng.integers(-255, 256, (6, 40)) * 2.0 ** rng.integers(-9, 3, (6, 1))
    values[:, 0] = 127.5 * 2.0 ** rng.integers(-9, 3, 6)  # many quotients are exact halves
    weight = torch.tensor(values, dtype=torch.float32)
    observer = qconfig.weight()
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    if len(scale) > 1:
        wanted = torch.quantize_per_channel(weight, scale, zero_point, 0, torch.qint8)
    else:
        wanted = torch.quantize_per_tensor(weight, float(scale), int(zero_point), torch.qint8)
    params = {"fc": {"w": jnp.asarray(weight.numpy().T)}}  # (inputs, outputs), as flax keeps it
    prepared = qjax.prepare(lambda p, x: x @ p["fc"]["w"], recipes.torch_static(engine))

    def codes(params, x):
        qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")[1]
        return prepared.codes(qvars, params, x)["fc/weight"].codes

    got = jax.jit(codes)(params, jnp.ones((2, 40)))
    np.testing.assert_array_equal(np.asarray(got).T, wanted.int_repr().numpy())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_dynamic_linear_kernel_quantizes_its_input_so(engine, rng):
    """What torch's dynamic Linear gives, from the codes that the recipe predicts; with the other range it would not."""
    torch = pytest.importorskip("torch")
    dynamic = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    x = rng.normal(size=(64, 32)).astype(np.float32)
    weight = rng.normal(size=(16, 32)).astype(np.float32)
    with torch_engine(engine):
        module = dynamic.Linear(32, 16, bias_=False)
        scale = float(np.abs(weight).max() / 127.5)
        module.set_weight_bias(torch.quantize_per_tensor(torch.from_numpy(weight), scale, 0, torch.qint8), None)
        wanted = module(torch.from_numpy(x)).numpy()
    params = {"fc": {"w": jnp.asarray(weight.T)}}
    errors = {}
    for reduce_range in (None, False, True):
        recipe = recipes.torch_dynamic(engine, reduce_range=reduce_range)
        prepared = qjax.prepare(lambda p, x: x @ p["fc"]["w"], recipe)

        def run(params, x, prepared=prepared):
            return prepared(prepared.init(params, x), params, x, mode="eval")[0]

        errors[reduce_range] = float(np.abs(np.asarray(jax.jit(run)(params, jnp.asarray(x))) - wanted).max())
    assert errors[None] < 1e-4, errors
    assert max(errors.values()) > 1e-2, errors


@pytest.mark.parametrize("make", [recipes.torch_static, recipes.torch_qat, recipes.torch_dynamic])
def test_an_unknown_engine_is_refused(make):
    with pytest.raises(
        ValueError, match=rf"{make.__name__}: engine must be one of 'x86', 'fbgemm', .*, got 'tensorrt'"
    ):
        make("tensorrt")


def test_what_torch_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"no dynamic qconfig for 'symmetric_qnnpack'. Use 'qnnpack'"):
        recipes.torch_dynamic("symmetric_qnnpack")
    with pytest.raises(ValueError, match=r"no version 0 for 'symmetric_qnnpack'. Use version=1"):
        recipes.torch_qat("symmetric_qnnpack", version=0)
    for version in (2, True):
        with pytest.raises(ValueError, match=f"version must be 0 or 1, got {version}"):
            recipes.torch_qat(version=version)
