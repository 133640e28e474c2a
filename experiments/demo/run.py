"""The run itself: float training, each setting by PTQ and QAT, then the integer program."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

import qjax
from experiments.demo import checkpoint, data, measure, train
from experiments.demo.config import Config
from experiments.demo.data import Split
from experiments.demo.model import Params, forward, init
from experiments.demo.progress import Display
from experiments.demo.recipes import SETTINGS, Setting
from experiments.demo.results import Results, seeds_in_words, spread, versions

CONVERTED, LOWEST = "W8A8", "W4A4"
_SHOWN_OP = "Conv_1"  # whose weights the picture shows


class Trained(NamedTuple):
    """A quantized model."""

    prepared: qjax.Prepared
    qvars: qjax.QuantVars
    params: Params


class Trainer:
    """A run's data and optimizers: what every seed and every setting shares."""

    def __init__(self, config: Config, train_split: Split, test_split: Split, display: Display) -> None:
        self.config = config
        self._train, self._test = train_split, test_split
        self._display = display
        steps = data.steps_per_epoch(train_split, config.batch_size)
        self._float_opt = train.optimizer(config.float_learning_rate, config.float_epochs * steps)
        self._qat_opt = train.optimizer(config.qat_learning_rate, config.qat_epochs * steps)
        self.test_images = jnp.asarray(test_split.images)
        self._float_logits = jax.jit(forward)

    def float_model(self, seed: int) -> tuple[Params, float]:
        """Train in float; returns the parameters and the test accuracy."""
        params = init(seed)
        state = train.TrainState(params, self._float_opt.init(params))
        for batch in self._batches(self.config.float_epochs, seed):
            state, _ = train.float_step(state, batch.images, batch.labels, forward=forward, opt=self._float_opt)
        return state.params, self.accuracy(self._float_logits(state.params, self.test_images))

    def ptq(self, prepared: qjax.Prepared, params: Params) -> float:
        """Calibrate on the training images; returns the test accuracy."""
        qvars = train.calibrate(prepared, params, self._count(data.batches(self._train, self.config.batch_size)))
        return self._quantized_accuracy(Trained(prepared, qvars, params))

    def qat(self, prepared: qjax.Prepared, params: Params, seed: int) -> tuple[Trained, float]:
        """Train through the quantizers from float parameters; returns the model and its test accuracy."""
        state = train.TrainState(params, self._qat_opt.init(params), prepared.init(params, self.test_images))
        for batch in self._batches(self.config.qat_epochs, seed):
            state, _ = train.qat_step(state, batch.images, batch.labels, prepared=prepared, opt=self._qat_opt)
        model = Trained(prepared, state.qvars, state.params)
        return model, self._quantized_accuracy(model)

    def accuracy(self, logits: jax.Array) -> float:
        """The test accuracy of these logits."""
        return train.accuracy(logits, self._test.labels)

    def _quantized_accuracy(self, model: Trained) -> float:
        logits = train.simulate(model.qvars, model.params, self.test_images, prepared=model.prepared)
        return self.accuracy(logits)

    def _batches(self, epochs: int, seed: int) -> Iterable[Split]:
        return self._count(data.shuffled_batches(self._train, self.config.batch_size, epochs=epochs, seed=seed))

    def _count(self, batches: Iterable[Split]) -> Iterable[Split]:
        for batch in batches:
            yield batch
            self._display.advance()


def run(config: Config, console: Console) -> Results:
    """Do everything but the tables and the picture; writes the two model files into `config.out`.

    Raises:
      SystemExit: The integer program computes other codes than the simulation.
    """
    train_split, test_split = data.load(config.test_fraction)
    steps = data.steps_per_epoch(train_split, config.batch_size)
    total = config.seeds * steps * (config.float_epochs + len(SETTINGS) * (config.qat_epochs + 1))
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init, 0)))
    console.print(
        f"{len(train_split.labels)} training and {len(test_split.labels)} test images, {count:,} parameters, "
        f"{seeds_in_words(config.seeds)}"
    )
    with Display(console, total=total) as display:
        trainer = Trainer(config, train_split, test_split, display)
        seeds = range(config.seeds)
        display.doing("float")
        float_models = [trainer.float_model(seed) for seed in seeds]
        float_accuracy = [accuracy for _, accuracy in float_models]
        display.done("float", _percent(float_accuracy))
        accuracy: dict[str, dict[str, list[float]]] = {}
        first: dict[str, Trained] = {}  # the QAT model of the first seed, by setting
        for setting in SETTINGS:
            ptq, qat = _prepare(setting, config)
            display.doing(f"{setting.name} PTQ")
            calibrated = [trainer.ptq(ptq, params) for params, _ in float_models]
            display.doing(f"{setting.name} QAT")
            models = [trainer.qat(qat, params, seed) for seed, (params, _) in zip(seeds, float_models, strict=True)]
            first[setting.name] = models[0][0]
            accuracy[setting.name] = {"ptq": calibrated, "qat": [trained for _, trained in models]}
            display.done(setting.name, f"PTQ {_percent(calibrated)}   QAT {_percent(accuracy[setting.name]['qat'])}")
        display.doing("integer program")
        images = trainer.test_images
        prepared, qvars, params = first[CONVERTED]
        integer = qjax.convert(prepared, qvars, params)
        # Jitted, because eagerly each of hundreds of small operations would be compiled by itself.
        simulated = {
            name: jax.jit(first[name].prepared.codes)(first[name].qvars, first[name].params, images)
            for name in (CONVERTED, LOWEST)
        }
        codes = measure.compare_codes(simulated[CONVERTED], jax.jit(integer.codes)(images))
        measure.check_equal(codes)
        integer_accuracy = trainer.accuracy(jax.jit(integer)(images))
        noise = {
            name: {op: float(ratio) for op, ratio in measure.op_sqnr(found, first[name].params, images).items()}
            for name, found in simulated.items()
        }
        kernel = first[LOWEST].params[_SHOWN_OP]["kernel"]
        weights = measure.weight_histogram(_SHOWN_OP, LOWEST, kernel, simulated[LOWEST][f"{_SHOWN_OP}/weight"])
        float_path, int8_path = config.out / "digits_float32.npz", config.out / "digits_int8.pt"
        checkpoint.write_float(float_path, params)
        checkpoint.write_int8(int8_path, integer)
        differ = sum(counts["differ"] for counts in codes.values())
        display.done("integers", f"{integer_accuracy:.2f} %, codes that differ from simulation: {differ}")
    return {
        "config": config.as_json(),
        "versions": versions(),
        "images": {"train": len(train_split.labels), "test": len(test_split.labels)},
        "float_accuracy": float_accuracy,
        "accuracy": accuracy,
        "simulated_accuracy": accuracy[CONVERTED]["qat"][0],
        "integer_accuracy": integer_accuracy,
        "codes": codes,
        "sqnr_db": noise,
        "weights": weights,
        "parameters": count,
        "held_bytes": {
            float_path.name: sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
            int8_path.name: integer.nbytes,
        },
        "file_bytes": {path.name: path.stat().st_size for path in (float_path, int8_path)},
        "seconds": display.seconds,
    }


def _prepare(setting: Setting, config: Config) -> tuple[qjax.Prepared, qjax.Prepared]:
    """The model prepared for PTQ, which remembers extremes, and for QAT, whose ranges follow the weights."""
    follow = functools.partial(qjax.observers.moving_average_min_max, averaging_constant=config.averaging_constant)
    recipes = setting.recipe(qjax.observers.min_max), setting.recipe(follow)
    ptq, qat = (qjax.prepare(forward, recipe) for recipe in recipes)
    return ptq, qat


def _percent(values: Sequence[float]) -> str:
    mean, deviation = spread(values)
    return f"{mean:.2f} ± {deviation:.2f} %"
