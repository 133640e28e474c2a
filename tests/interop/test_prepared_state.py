"""load_prepared and the writers without torch: what does not fit is an error that says what came, and what it wanted."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
from qjax import containers, observers
from qjax.interop import Conv2d, Linear, load_prepared, ptq_prepared, qat_prepared
from tests.numerics.stress import assert_same_bits

MODULES = {"fc1": Linear("fc1"), "fc2": Linear("head.fc2")}
X = jnp.asarray(np.random.default_rng(0).standard_normal((16, 4)), jnp.float32)
W8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel("output"))
A8 = qjax.QuantSpec(qjax.uint8, reduce_range=True)


def dense(x, layer):
    return x @ layer["w"] + layer["b"][None]


def model(params, x):
    return dense(jax.nn.relu(dense(x, params["fc1"])), params["fc2"])


@functools.cache
def params():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return {"fc1": {"w": draw(4, 5), "b": draw(5)}, "fc2": {"w": draw(5, 3), "b": draw(3)}}


@functools.cache
def observed(recipe, mode="train"):
    prepared = qjax.prepare(model, recipe)
    qvars = prepared.init(params(), X)
    for _ in range(2):
        _, qvars = prepared(qvars, params(), X, mode=mode)
    return prepared, qvars


QAT = qjax.recipes.torch_qat("x86")
OLD = qjax.recipes.torch_qat("x86", version=0)
STATIC = qjax.recipes.torch_static("x86")


def but(rule):
    """The recipe with one rule more."""
    return qjax.Recipe([*QAT.rules, rule])


def record(recipe=QAT):
    """A state dict to damage."""
    write, mode = (ptq_prepared, "calibrate") if recipe is STATIC else (qat_prepared, "train")
    return write(*observed(recipe, mode), params(), modules=MODULES)


def read(tmp_path, state, recipe=QAT, modules=MODULES, **options):
    qjax.interop.save(tmp_path / "a.pt", state)
    prepared = qjax.prepare(options.pop("fn", model), recipe)
    given = options.pop("params", params())
    return load_prepared(qjax.interop.load(tmp_path / "a.pt"), prepared, given, X, modules=modules, **options)


@pytest.mark.parametrize("recipe", [QAT, OLD, pytest.param(STATIC, marks=pytest.mark.long)], ids=["v1", "v0", "static"])
def test_everything_returns(tmp_path, recipe):
    state = read(tmp_path, record(recipe), recipe)
    assert state.mode == ("calibrate" if recipe is STATIC else "train")
    prepared, qvars = observed(recipe, state.mode)
    assert jax.tree.structure(state) == jax.tree.structure(state._replace(params=params(), qvars=qvars))
    found, wanted = (
        {**params, **{key: each for key, each in qvars.state.items() if recipe is not STATIC or "weight" not in key}}
        for params, qvars in ((state.params, state.qvars), (params(), qvars))
    )  # a dynamic observer remembers nothing that it needs
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if got.dtype != jnp.int32:  # how many updates there were is in no file
            assert_same_bits(np.asarray(got), np.asarray(want))
    again = (ptq_prepared if recipe is STATIC else qat_prepared)(prepared, state.qvars, state.params, modules=MODULES)
    assert {k: np.asarray(v).tobytes() for k, v in again.items()} == {
        k: np.asarray(v).tobytes() for k, v in record(recipe).items()
    }


def test_any_float_is_carried_as_it_is(tmp_path):
    """Zeros with a sign, denormals, infinities and NaN with a payload, in weights and ranges alike."""
    bits = np.array([0x80000000, 0x00000001, 0x7F800000, 0xFFC01234, 0x7F7FFFFF], np.uint32)
    state = record()
    state["fc1.bias"] = bits.view(np.float32)
    found = read(tmp_path, state)
    assert np.asarray(found.params["fc1"]["b"]).view(np.uint32).tolist() == bits.tolist()
    static = record(STATIC)
    static["fc1.activation_post_process.min_val"] = np.float32(-0.0)
    counts = static["fc1.activation_post_process.histogram"].copy()
    counts[:2] = 2.0**-149, 2.0**127
    static["fc1.activation_post_process.histogram"] = counts
    found = read(tmp_path, static, STATIC).qvars.state["fc1/output"]
    assert np.asarray(found.histogram).tobytes() == counts.tobytes()
    assert np.signbit(found.min_val)


FAKE, OBSERVER = "fc1.weight_fake_quant", "fc1.weight_fake_quant.activation_post_process"
DAMAGES = {
    "dropped weight": ({"fc1.weight": None}, "no fc1.weight; expected it beside 'fc1.bias'.*The parameter fc1/w"),
    "weight of another shape": (
        {"fc1.weight": np.zeros((4, 5), np.float32)}, r"'fc1.weight'.*found float32 of shape \(4, 5\); expected .*\(5, 4\)"),
    "weight of another dtype": ({"fc1.weight": np.zeros((5, 4))}, "found float64 of shape .*expected float32"),
    "no tensor": ({"fc1.bias": "text"}, "found a str; expected a tensor"),
    "one layer more": ({"fc3.weight": np.zeros(3)}, r"1 tensors that the function has no place for: 'fc3.weight'"),
    "other scales": (
        {f"{FAKE}.scale": np.ones(5, np.float32)},
        r"found scale 1.0; expected 0.0\d+ at 0, which fc1/weight \(FusedMovingAverage, int8.*other scheme or range"),
    "scales one short": ({f"{FAKE}.scale": np.ones(4, np.float32)}, "found scale of 4 values; expected of 5 values"),
    "NaN": ({f"{FAKE}.scale": np.full(5, np.nan, np.float32)}, "found scale nan"),
    "other zero_points": ({f"{FAKE}.zero_point": np.ones(5, np.int32)}, "found zero_point 1; expected [-0-9]+ at 0"),
    "a range per tensor": (
        {f"{OBSERVER}.min_val": np.float32(0), f"{OBSERVER}.max_val": np.float32(1)},
        r"a range of shape \(\) and \(\); expected \(5,\) for fc1/weight"),
    "ends of two shapes": ({f"{OBSERVER}.min_val": np.zeros(4, np.float32)}, r"range of shape \(4,\) and \(5,\)"),
    "ends that cross": ({f"{OBSERVER}.min_val": np.full(5, 9, np.float32)}, None),  # the fused kernel does not mind
    "no range": ({f"{OBSERVER}.min_val": None}, "no .*min_val.*It has no observer in torch"),
    "another eps": ({f"{OBSERVER}.eps": np.asarray([2.0**-12], np.float32)}, "eps 0.000244.*expected 1.19.*QuantSpec"),
    "a flag of two": ({f"{FAKE}.observer_enabled": np.asarray([2])}, "expected a flag, 0 or 1"),
    "a flag of many": ({f"{FAKE}.observer_enabled": np.asarray([1, 1])}, "expected a flag, 0 or 1"),
    "another generation": (
        {f"{FAKE}.observer_enabled": np.asarray([1], np.uint8)},
        "a FakeQuantize; expected int64 for fc1/weight, which FusedMovingAverage observes.*version=0"),
    "flags that differ": (
        {f"{FAKE}.observer_enabled": np.asarray([0])}, "on and on at 'quant.*off and on at 'fc1.weight_fake_quant'.*one mode"),
    "all off": (
        {f"{p}.{n}": np.asarray([0]) for n in ("observer_enabled", "fake_quant_enabled")
         for p in ("quant.activation_post_process", FAKE, "fc1.activation_post_process", "head.fc2.weight_fake_quant",
                   "head.fc2.activation_post_process")}, "off and off.*one of them on at least"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_what_does_not_fit(tmp_path, name):
    changes, message = DAMAGES[name]
    message = message or "found scale"
    state = dict(record()) | changes
    state = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(containers.FormatError, match=message) as caught:
        read(tmp_path, state)
    assert str(caught.value).startswith(str(tmp_path / "a.pt"))
    assert caught.value.mend or "expected a" in str(caught.value) or "expected float32" in str(caught.value)


@pytest.mark.parametrize(
    ("of", "recipe", "message"),
    [
        (QAT, qjax.recipes.torch_qat("onednn"), "found scale .* for the file's min_val"),
        (QAT, qjax.recipes.torch_qat("qnnpack"), r"expected \(\) for fc1/weight|found scale"),
        (QAT, OLD, "FusedMovingAvgObsFakeQuantize; expected uint8"),
        (OLD, QAT, "a FakeQuantize; expected int64"),
        (STATIC, QAT, "fc1/weight.*FusedMovingAverage; torch observes a weight when it converts it"),
        (STATIC, qjax.recipes.torch_static("onednn"), None),  # a file of observers holds no range
        (QAT, but(qjax.Rule("fc2")), "no place for.*head.fc2.weight_fake_quant"),
        (QAT, but(qjax.Rule("fc2", weight=QAT.rules[0].weight)), "no place for.*head.fc2.activation"),
    ],
)
def test_another_recipe(tmp_path, of, recipe, message):
    if message is None:
        assert read(tmp_path, record(of), recipe).mode == "calibrate"
        return
    with pytest.raises((containers.FormatError, ValueError), match=message):
        read(tmp_path, record(of), recipe)


def test_fewer_quantizers_than_the_recipe_wants(tmp_path):
    state = {k: v for k, v in record().items() if not k.startswith("head.fc2.activation_post_process")}
    with pytest.raises(
        containers.FormatError, match=r"no head.fc2.activation_post_process.*not fake-quantized in torch"
    ):
        read(tmp_path, state)


@pytest.mark.parametrize("recipe", [OLD, STATIC], ids=["v0", "static"])
def test_ends_that_cross(tmp_path, recipe):
    state = dict(record(recipe))
    (key,) = (key for key in state if key.startswith("fc1.activation") and key.endswith("min_val"))
    state[key] = np.float32(99)
    with pytest.raises(containers.FormatError, match=r"fc1.*min_val'.*a min_val of 99.0 above the max_val of"):
        read(tmp_path, state, recipe)


@pytest.mark.parametrize("count", [-1.0, np.inf, np.nan])
def test_counts_that_are_none(tmp_path, count):
    key = "fc1.activation_post_process.histogram"
    state = dict(record(STATIC))
    state[key] = np.full_like(state[key], count)
    with pytest.raises(
        containers.FormatError, match=rf"'{key}': found a count of {count}; expected counts that are finite"
    ):
        read(tmp_path, state, STATIC)


def test_files_of_other_dialects(tmp_path):
    with pytest.raises(containers.FormatError, match="dialect plain; expected one that torch's prepare_qat"):
        read(tmp_path, {"fc1.weight": np.zeros((5, 4), np.float32)})


def tanh(params, x):
    return dense(jnp.tanh(dense(x, params["fc1"])), params["fc2"])


def two_inputs(params, x):
    return dense(x, params["fc1"])[:, :3] + dense(jnp.concatenate([x * 2, x[:, :1]], 1), params["fc2"])


def masked(params, x):
    return x @ (params["fc1"]["w"] * 2.0) + dense(jnp.zeros((1, 5)), params["fc2"])[:, :1]


def normalized(params, x):
    return model(params, x) * params["scale"][None]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"modules": {"fc1": Linear("a")}}, ValueError, "does not say what op 'fc2' becomes"),
        ({"modules": MODULES | {"fc3": Linear("a")}}, ValueError, "has no op 'fc3'; its ops are fc1, fc2"),
        ({"modules": {"fc1": Linear("a"), "fc2": Linear("a")}}, ValueError, "two ops become the same torch module"),
        ({"modules": MODULES | {"fc1": Conv2d("fc1")}}, ValueError, "not a 2-D convolution"),
        ({"modules": MODULES | {"fc1": Linear("fc1", flattened=(1, 2, 3))}}, ValueError, "4 inputs.* says 6"),
        ({"modules": [MODULES]}, TypeError, "must map the names of ops"),
        ({"fn": tanh}, ValueError, "input of fc2 is quantized by itself .fc2/input.*tanh"),
        ({"fn": two_inputs}, ValueError, "inputs of fc1, fc2 are different values"),
        ({"quantize": None}, ValueError, "'fc1/input' quantizes the model's input"),
        ({"fn": normalized, "params": params() | {"scale": jnp.ones(3)}}, ValueError, "parameters scale belong to no op"),
        ({"recipe": qjax.Recipe([qjax.Rule(".*", weight=W8, output=A8)])}, ValueError, "fc1/weight.*Dynamic.*torch_qat has"),
        (
            {"recipe": but(qjax.Rule("fc2", weight=observers.min_max(W8.replace(convention="torch_real"))))},
            ValueError, 'by convention="torch_fake", not .torch_real'),
        (
            {"recipe": but(qjax.Rule("fc1", weight=observers.min_max(W8.replace(granularity=qjax.PerChannel(0)))))},
            ValueError, r"quantized per_channel\(0\).*one for each output"),
        ({"recipe": but(qjax.Rule("fc1", weight=qjax.estimators.lsq(A8)))}, ValueError, "LSQ.*learns the zero_point, too"),
        ({"recipe": but(qjax.Rule("fc1", weight=observers.mse(W8)))}, ValueError, "MSE.*torch wants observers"),
    ],
)  # fmt: skip
def test_what_torch_has_no_module_for(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        read(tmp_path, record(), **options)


def test_arguments_of_the_writers():
    prepared, qvars = observed(QAT)
    write = functools.partial(qat_prepared, prepared, qvars, params(), modules=MODULES)
    with pytest.raises(ValueError, match="mode must be one of 'train', 'calibrate', 'eval', got 'test'"):
        write(mode="test")
    with pytest.raises(ValueError, match=r"batches must be an int >= 0"):
        write(batches=-1)
    with pytest.raises(TypeError, match=r"like must come from qjax.interop.load"):
        write(like={})
    with pytest.raises(TypeError, match=r"prepared must come from qjax.prepare"):
        qat_prepared(model, qvars, params(), modules=MODULES)
    with pytest.raises(TypeError, match="qvars must be the QuantVars"):
        qat_prepared(prepared, qvars.state, params(), modules=MODULES)
    with pytest.raises(ValueError, match=r"Call prepared.init"):
        qat_prepared(qjax.prepare(model, QAT), qvars, params(), modules=MODULES)
    with pytest.raises(ValueError, match="params have another structure or other shapes"):
        qat_prepared(prepared, qvars, {"fc1": params()["fc1"]}, modules=MODULES)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params())
    with pytest.raises(ValueError, match=r"fc1/w is float16; torch's fc1.weight is float32"):
        qat_prepared(prepared, qvars, half, modules=MODULES)
    with pytest.raises(ValueError, match="no state for 'fc1/input'"):
        qat_prepared(prepared, qvars._replace(state={}), params(), modules=MODULES)
    with pytest.raises(ValueError, match=r"FusedMovingAverage; torch observes a weight when it converts"):
        ptq_prepared(prepared, qvars, params(), modules=MODULES)
    with pytest.raises(TypeError, match=r"checkpoint must come from qjax.interop.load"):
        load_prepared({}, prepared, params(), X, modules=MODULES)


def test_like_another_model(tmp_path):
    prepared, qvars = observed(QAT)
    qjax.interop.save(tmp_path / "a.pt", {key: value for key, value in record().items() if "fc2" not in key})
    like = qjax.interop.load(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"like has no head.fc2.weight, .*checkpoint of another model"):
        qat_prepared(prepared, qvars, params(), modules=MODULES, like=like)


def test_ops_that_share_their_input_share_a_module(tmp_path):
    """Two ops that take the model's input have a quantizer each here, and one QuantStub in torch."""

    def fork(params, x):
        return dense(x, params["a"]) - dense(x, params["b"])

    two = {"a": params()["fc1"], "b": params()["fc1"]}
    modules = {"a": Linear("a"), "b": Linear("b")}
    prepared = qjax.prepare(fork, QAT)
    _, qvars = prepared(prepared.init(two, X), two, X)
    qjax.interop.save(tmp_path / "a.pt", qat_prepared(prepared, qvars, two, modules=modules))
    found = load_prepared(qjax.interop.load(tmp_path / "a.pt"), prepared, two, X, modules=modules)
    assert found.qvars.state["a/input"] == found.qvars.state["b/input"] == qvars.state["a/input"]
    apart = qvars._replace(state=qvars.state | {"b/input": qvars.state["b/output"]})
    with pytest.raises(ValueError, match="'a/input' and 'b/input' are one module in torch"):
        qat_prepared(prepared, apart, two, modules=modules)


def test_a_layer_that_is_left_in_float(tmp_path):
    """It is a module as any other, without quantizers; torch has qconfig=None there."""
    recipe = but(qjax.Rule("fc2"))
    prepared, qvars = observed(recipe)
    state = qat_prepared(prepared, qvars, params(), modules=MODULES)
    assert [key for key in state if key.startswith("head")] == ["head.fc2.weight", "head.fc2.bias"]
    back = read(tmp_path, state, recipe)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), back.params, params()))


def test_a_parameter_that_two_ops_share(tmp_path):
    def twice(params, x):
        return dense(jax.nn.relu(dense(x, params["a"])), params["a"])

    square = {"a": {"w": params()["fc1"]["w"][:, :4], "b": params()["fc1"]["b"][:4]}}
    modules = {"a": Linear("a"), "a:1": Linear("b")}
    prepared = qjax.prepare(twice, QAT)
    state = qat_prepared(prepared, prepared.init(square, X), square, modules=modules)
    assert_same_bits(state["a.weight"], state["b.weight"])
    qjax.interop.save(tmp_path / "a.pt", dict(state) | {"b.bias": np.ones(4, np.float32)})
    with pytest.raises(containers.FormatError, match=r"'b.bias'.*other numbers.*both are the parameter a/b"):
        load_prepared(qjax.interop.load(tmp_path / "a.pt"), prepared, square, X, modules=modules)


def test_an_op_in_a_scan_is_no_module():
    def fn(params, x):
        return jax.lax.scan(lambda h, layer: (jax.nn.relu(h @ layer), None), x, params["fc1"]["w"])[0]

    prepared = qjax.prepare(fn, QAT)
    stacked = {"fc1": {"w": jnp.ones((3, 4, 4))}}
    with pytest.raises(ValueError, match="stands for 3 layers, the steps of a scan"):
        qat_prepared(prepared, prepared.init(stacked, X), stacked, modules={"fc1": Linear("fc1")})


def filled(tree):
    """Other numbers in the place of those of a tree."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), tree)


class Convolutional(nn.Module):
    """A convolution, a depthwise one and a dense layer, each with a batch norm; another dense layer and an addition."""

    @nn.compact
    def __call__(self, x, train=True):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(4, (3, 3), padding=1, use_bias=False)(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(norm(use_scale=False)(nn.Conv(4, (3, 3), padding=1, feature_group_count=4)(x)))
        x = norm()(nn.Dense(6)(x.reshape(x.shape[0], -1)))
        return nn.Dense(6)(x) + x


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.long)])
def test_linen_in_training_and_in_inference(tmp_path, train):
    """Modules are derived; statistics are found in either; an addition is a FloatFunctional."""
    net, x = Convolutional(), jax.random.normal(jax.random.key(0), (8, 4, 6, 2))
    variables = net.init(jax.random.key(1), x)
    fn = lambda variables, x, train: net.apply(variables, x, train, mutable=["batch_stats"])  # noqa: E731
    qat = qjax.recipes.torch_qat("x86", batch_norm="fold_if_present")
    recipe = qjax.Recipe([*qat.rules, qjax.Rule(".*", kind="add", output=qat.rules[0].output)])
    prepared = qjax.prepare(fn, recipe)
    variables, qvars = filled(variables), prepared.init(variables, x, train)
    seen = observers.MovingAverageState(jnp.float32(-1), jnp.float32(3), jnp.int32(1))
    qvars = qvars.updated({"Convolutional/add/output": seen})
    modules = qjax.interop.torch_modules(prepared, variables, x, train, names=str.lower) | {
        "Convolutional/add": qjax.interop.FloatFunctional("skip")
    }
    state = qat_prepared(prepared, qvars, variables, modules=modules)
    found = {key: value.shape for key, value in state.items() if "fake_quant" not in key and "process" not in key}
    layers = {"conv_0": (4, 2, 3, 3), "conv_1": (4, 1, 3, 3), "dense_0": (6, 24), "dense_1": (6, 6)}
    wanted = {f"{name}.weight": shape for name, shape in layers.items()}
    wanted |= {f"{name}.bias": shape[:1] for name, shape in layers.items() if name != "conv_0"}
    for name in ("conv_0", "conv_1", "dense_0"):
        wanted |= {f"{name}.bn.{key}": layers[name][:1] for key in ("weight", "bias", "running_mean", "running_var")}
        wanted[f"{name}.bn.num_batches_tracked"] = ()
    assert found == wanted
    assert {key for key in state if key.startswith("skip")} > {"skip.activation_post_process.scale"}
    np.testing.assert_array_equal(state["conv_1.bn.weight"], np.ones(4), "the layer has no scale of its own")
    stats = variables["batch_stats"]["BatchNorm_0"]
    assert_same_bits(state["conv_0.bn.running_mean"], np.asarray(stats["mean"]))
    assert_same_bits(state["conv_0.bn.running_var"], np.asarray(stats["var"]))
    qjax.interop.save(tmp_path / "a.pt", state)
    blank = jax.tree.map(jnp.zeros_like, variables)
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    back = load_prepared(checkpoint, prepared, blank, x, train, modules=modules)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), back.params, variables))
    assert back.qvars.state["Convolutional/add/output"] == seen
    scaled = dict(state) | {"conv_1.bn.weight": np.full(4, 2, np.float32)}
    qjax.interop.save(tmp_path / "b.pt", scaled)
    with pytest.raises(
        containers.FormatError, match=r"expected 1.0 throughout.*no parameter for it.*Give the batch norm"
    ):
        load_prepared(qjax.interop.load(tmp_path / "b.pt"), prepared, blank, x, train, modules=modules)
    if train:
        with pytest.raises(
            ValueError, match=r"does not say what op 'Convolutional/add' becomes. Add a FloatFunctional"
        ):
            qat_prepared(prepared, qvars, variables)


def test_nnx(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), padding=1, rngs=rngs)
            self.bn = nnx.BatchNorm(4, rngs=rngs)
            self.fc = nnx.Linear(96, 3, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.bn(self.conv(x)))
            return self.fc(x.reshape(x.shape[0], -1))

    graph, params = nnx.split(Net(nnx.Rngs(0)))

    def fn(params, x):
        net = nnx.merge(graph, params)
        return net(x), nnx.state(net)

    prepared = qjax.prepare(fn, qjax.recipes.torch_qat("x86", batch_norm="fold_if_present"))
    x = jax.random.normal(jax.random.key(0), (8, 4, 6, 2))
    qvars, params = prepared.init(params, x), filled(params)
    qjax.interop.save(tmp_path / "a.pt", qat_prepared(prepared, qvars, params))
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    assert checkpoint["conv.bn.running_mean"].shape == (4,)
    state = load_prepared(checkpoint, prepared, jax.tree.map(jnp.zeros_like, params), x)
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), state.params, params))
