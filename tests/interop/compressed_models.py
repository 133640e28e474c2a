"""Models that live compressed-tensors quantizes, writes and decompresses: imported late, for few Pythons have it."""

import json
import warnings
from pathlib import Path


def library():
    """compressed_tensors, whose import warns of what it cannot load, and its quantization."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import compressed_tensors.compressors
        import compressed_tensors.quantization as quantization
    return compressed_tensors.compressors, quantization


def scheme(targets=("Linear",), *, weights, inputs=None, outputs=None, format=None):
    """A QuantizationScheme of plain values; `uint8` and the like name dtypes of torch."""
    import torch

    _, quantization = library()

    def args(options):
        if options is None:
            return None
        options = {k: getattr(torch, v) if k.endswith("_dtype") else v for k, v in options.items()}
        return quantization.QuantizationArgs(**options)

    return quantization.QuantizationScheme(
        targets=list(targets),
        weights=args(weights),
        input_activations=args(inputs),
        output_activations=args(outputs),
        format=format,
    )


def calibrate(module, x=None, shrink=1.0):
    """Set the qparams of a module by compressed-tensors' own formulas, the input's from x; shrunk, so that codes saturate."""
    import torch
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    for base, args, value in (
        ("weight", module.quantization_scheme.weights, module.weight.detach()),
        ("input", module.quantization_scheme.input_activations, x),
        ("output", module.quantization_scheme.output_activations, x),
    ):
        if args is None or args.dynamic is True:
            continue
        overall = None
        if args.strategy == "tensor_group":
            overall = generate_gparam(value.min(), value.max())
            getattr(module, f"{base}_global_scale").data.copy_(overall)
            if args.dynamic == "local":
                continue
        low, high = extremes(value, args)
        scale, point = calculate_qparams(low, high, args, global_scale=overall)
        held = getattr(module, f"{base}_scale")
        held.data = (scale * shrink).to(held.dtype).reshape(held.shape)
        if hasattr(module, f"{base}_zero_point"):
            held = getattr(module, f"{base}_zero_point")
            held.data = point.to(torch.float32).to(held.dtype).reshape(held.shape)


def extremes(value, args):
    """The smallest and the largest of what shares a scale."""
    import torch

    if args.strategy == "tensor":
        return value.min(), value.max()
    if args.strategy == "channel":
        return value.amin(-1, keepdim=True), value.amax(-1, keepdim=True)
    if args.strategy == "block":
        rows, columns = args.block_structure
        padded = torch.nn.functional.pad(value, (0, -value.shape[1] % columns, 0, -value.shape[0] % rows))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = value.unflatten(-1, (-1, args.group_size))
    return groups.amin(-1), groups.amax(-1)


def compressed(model, schemes, *, ignore=(), x=None, format=None, shrink=1.0, **config):
    """Quantize and compress a model in place; the compressor that did."""
    compressors, quantization = library()
    groups = {f"group_{index}": each for index, each in enumerate(schemes)}
    whole = quantization.QuantizationConfig(config_groups=groups, ignore=list(ignore), **config)
    quantization.apply_quantization_config(model, whole, show_progress=False)
    for module in model.modules():
        if hasattr(module, "quantization_scheme") and hasattr(module, "weight"):
            calibrate(module, x, shrink)
    compressor = compressors.ModelCompressor.from_pretrained_model(model, quantization_format=format)
    compressor.compress_model(model)
    return compressor


def write(model, compressor, folder: Path, *, version=None, shards=1):
    """Write a folder as `save_pretrained` does, and say what is in it."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"architectures": ["Net"]}')
    compressor.update_config(str(folder))
    if version is not None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["version"] = version
        (folder / "config.json").write_text(json.dumps(config))
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return state
    names = [f"model-{index + 1:05}-of-{shards:05}.safetensors" for index in range(shards)]
    where = {key: names[index % shards] for index, key in enumerate(state)}
    for name in names:
        save_file({key: state[key] for key in state if where[key] == name}, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


def decompressed(model, compressor):
    """The weights as compressed-tensors decompresses them, by name."""
    compressor.decompress_model(model)
    return {key: value.detach() for key, value in model.state_dict().items() if key.endswith("weight")}


def loaded(model, folder: Path):
    """Load a folder into a float model as transformers does: apply the config, compress, load strictly."""
    from safetensors.torch import load_file

    compressors, quantization = library()
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = quantization.QuantizationConfig(**said)
    quantization.apply_quantization_config(model, config, show_progress=False)
    compressor = compressors.ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False, assign=True)
    assert (missing, unexpected) == ([], [])
    return compressor
