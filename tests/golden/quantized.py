"""Writes tiny quantized checkpoints beside this file, by the packages that define their formats, with their truth.

For each NAME: the folder quantized/NAME (config.json, model.safetensors) and quantized/NAME.npz: two of its dequantized
weights by their names in the file, as the package computes them. Those of bfloat16 and float16 are stored as
the 16 bits of each number, `dtype` says which. The files are committed, so the tests need none of this.

  ct_*     compressed-tensors: its ModelCompressor writes them, and its compressors read them
  gptq*    TorchLinear.pack_original and dequantize_weight of gptqmodel, and its conversion from v2 to v1
  awq      pack_awq of gptqmodel, the order of autoawq; the truth is (number - zero point) * scale in float16
  fp8      FP8Linear of transformers; the truth is number * scale_inv of its block in float32 (the package takes the
           block's size from the shape of the scales, which is wrong where they do not divide)

Packages: python 3.12, torch==2.14.1 (CPU), transformers==5.24.0, compressed-tensors==0.20.0, gptqmodel==7.7.0 (its
          source is enough), safetensors, numpy.
Run:      python tests/golden/quantized.py [NAME ...]
          python tests/golden/quantized.py --loads FOLDER TRUTH.npz
             whether compressed-tensors reads exactly these weights (in float32) from a folder
"""

import json
import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_grad_enabled(False)
OUT = Path(__file__).parent / "quantized"
SMALL = dict(
    vocab_size=16,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)
ODD = SMALL | dict(head_dim=6, intermediate_size=40)  # 12 rows are no multiple of a word of 8, nor 40 of a block of 16

IN_TRUTH = ("k_proj.weight", "down_proj.weight")

Weights = dict[str, torch.Tensor]


def model_of(seed: str, dtype: torch.dtype, sizes: dict[str, object] = SMALL) -> LlamaForCausalLM:
    torch.manual_seed(zlib.crc32(seed.encode()))
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:  # rows of various sizes, not centered: scales and zero points differ
            parameter.mul_(torch.rand(len(parameter), 1) * 4 + 0.5).add_(torch.randn(len(parameter), 1) * 0.02)
    return model.to(dtype)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def write(name: str, config: dict[str, object], tensors: Weights, truth: Weights) -> None:
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    save_file({key: x.contiguous() for key, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    save_truth(OUT / f"{name}.npz", truth)


def save_truth(path: Path, truth: Weights) -> None:
    (dtype,) = {x.dtype for x in truth.values()}
    kept = {key: x for key, x in truth.items() if key.endswith(IN_TRUTH)}
    bits = {key: x.view(torch.uint16) if x.itemsize == 2 else x for key, x in kept.items()}
    np.savez_compressed(path, dtype=str(dtype).removeprefix("torch."), **{key: x.numpy() for key, x in bits.items()})


# compressed-tensors

GROUP = {"num_bits": 4, "strategy": "group", "group_size": 8}
CHANNEL = {"num_bits": 8, "strategy": "channel"}
FLOAT = {"num_bits": 8, "type": "float"}
PER_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor"}
COMPRESSED: dict[str, tuple[dict[str, object], torch.dtype, dict[str, dict[str, object]]]] = {
    # name: (sizes, dtype, {targets: {weights, input_activations}})
    "ct_int4": (SMALL, torch.bfloat16, {"Linear": {"weights": GROUP | {"group_size": 16}}}),
    "ct_int4_zeros": (ODD, torch.float16, {"Linear": {"weights": GROUP | {"symmetric": False}}}),
    "ct_int4_channel": (
        ODD,
        torch.bfloat16,
        {"Linear": {"weights": GROUP | {"strategy": "channel", "group_size": None}}},
    ),
    "ct_int8_packed": (ODD, torch.bfloat16, {"Linear": {"weights": GROUP | {"num_bits": 8, "symmetric": False}}}),
    "ct_int8": (SMALL, torch.bfloat16, {"Linear": {"weights": CHANNEL, "input_activations": PER_TOKEN}}),
    "ct_int8_zeros": (
        ODD,
        torch.float16,
        {"Linear": {"weights": CHANNEL | {"symmetric": False}, "input_activations": PER_TOKEN}},
    ),
    "ct_fp8": (
        SMALL,
        torch.bfloat16,
        {"Linear": {"weights": FLOAT | {"strategy": "tensor"}, "input_activations": STATIC}},
    ),
    "ct_fp8_channel": (
        SMALL,
        torch.bfloat16,
        {"Linear": {"weights": FLOAT | {"strategy": "channel"}, "input_activations": FLOAT | PER_TOKEN}},
    ),
    "ct_fp8_block": (
        SMALL | {"num_key_value_heads": 1},  # 8 rows, half a block
        torch.bfloat16,
        {
            "Linear": {
                "weights": FLOAT | {"strategy": "block", "block_structure": [16, 16]},
                "input_activations": FLOAT | {"strategy": "group", "group_size": 16, "dynamic": True},
            }
        },
    ),
    "ct_mxfp4": (
        SMALL | {"intermediate_size": 64},
        torch.bfloat16,
        {
            "Linear": {
                "weights": FLOAT | {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
            }
        },
    ),
    "ct_mixed": (
        SMALL,
        torch.bfloat16,
        {
            "re:.*self_attn.*": {"weights": CHANNEL, "input_activations": PER_TOKEN},
            "re:.*mlp.*": {"weights": GROUP | {"symmetric": False}},
        },
    ),
}


def compressed(name: str) -> None:
    sizes, dtype, groups = COMPRESSED[name]
    model = model_of(name, dtype, sizes)
    config = QuantizationConfig(
        config_groups={f"group_{i}": {"targets": [target]} | group for i, (target, group) in enumerate(groups.items())},
        ignore=["lm_head"],
    )
    apply_quantization_config(model, config)
    for module in linears(model).values():
        calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = dtype
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    save_file(
        {k: x.contiguous() for k, x in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    compressor.update_config(str(folder))
    save_truth(OUT / f"{name}.npz", loaded(folder))


def calibrate(module: nn.Linear) -> None:
    """Scales and zero points from the smallest and the largest weight of each block, as an observer sets them."""
    args, weight, grid = module.quantization_scheme.weights, module.weight, module.weight_scale.shape
    columns = args.group_size or (args.block_structure or [0, weight.shape[1]])[1]
    rows = {"tensor": len(weight), "block": (args.block_structure or [0])[0]}.get(args.strategy, 1)
    blocks = nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -len(weight) % rows))
    blocks = blocks.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    scale, zero = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    module.weight_scale.copy_(scale.reshape(grid))
    if getattr(module, "weight_zero_point", None) is not None:
        module.weight_zero_point.copy_(zero.reshape(grid))
    if getattr(module, "input_scale", None) is not None:
        module.input_scale.fill_(0.01)


def loaded(folder: Path) -> Weights:
    """The weights of linear layers as compressed-tensors reads them from a folder.

    Not by from_pretrained of transformers: it refuses zero points in words, which compressed-tensors wrote.
    """
    written = json.loads((folder / "config.json").read_text())
    model = LlamaForCausalLM(LlamaConfig(**written))
    config = QuantizationConfig.model_validate(
        {key: value for key, value in written["quantization_config"].items() if key in QuantizationConfig.model_fields}
    )
    apply_quantization_config(model, config)
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name, module in linears(model).items():
        scheme = module.quantization_scheme
        compressor = BaseCompressor.get_value_from_registry(CompressionFormat(scheme.format or config.format).value)
        state = {key.removeprefix(f"{name}."): x for key, x in tensors.items() if key.startswith(f"{name}.")}
        found[f"{name}.weight"] = compressor.decompress(state, scheme)["weight"]
    return found


# GPTQ and AWQ

GPTQ: dict[str, dict[str, object]] = {
    "gptq": {"bits": 4, "group_size": 16, "sym": True, "checkpoint_format": "gptq"},
    "gptq_zeros": {"bits": 4, "group_size": 16, "sym": False, "checkpoint_format": "gptq"},
    "gptq_v2": {"bits": 4, "group_size": -1, "sym": False, "checkpoint_format": "gptq_v2"},
    "gptq_int8": {"bits": 8, "group_size": 16, "sym": False, "checkpoint_format": "gptq"},
    "gptq_act_order": {"bits": 4, "group_size": 16, "sym": False, "checkpoint_format": "gptq", "desc_act": True},
}


def base(model: LlamaForCausalLM, quantization: dict[str, object]) -> tuple[dict[str, object], Weights]:
    """config.json, and the tensors that are not quantized."""
    config = model.config.to_diff_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    names = {f"{name}.weight" for name in linears(model)}
    rest = {name: x for name, x in model.state_dict().items() if name not in names}
    return config | {"quantization_config": quantization}, rest


def numbers_of(weight: torch.Tensor, bits: int, groups: torch.Tensor, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales, zeros) [out, groups] of a weight [out, in]; a zero point of 0 where no weight is negative."""
    found = []
    for group in range(int(groups.max()) + 1):
        part = weight[:, groups == group].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if sym:
            high = torch.maximum(-low, high)
            low = -high
        scale = ((high - low) / (2**bits - 1)).half()
        zero = torch.full_like(low, 2 ** (bits - 1)) if sym else (-low / scale.float()).round()
        found.append((scale, zero))
    return torch.stack([s for s, _ in found], 1), torch.stack([z for _, z in found], 1)


def gptq(name: str) -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    options = GPTQ[name]
    bits, desc_act = int(str(options["bits"])), bool(options.get("desc_act", False))
    model = model_of(name, torch.float16)
    config, tensors = base(
        model,
        {"quant_method": "gptq", "desc_act": False, "lm_head": False, "pack_dtype": "int32", "true_sequential": True}
        | options,
    )
    truth = {}
    for layer, linear in linears(model).items():
        out, width = linear.weight.shape
        group = int(str(options["group_size"]))
        order = torch.randperm(width) if desc_act else torch.arange(width)
        groups = (order // (width if group == -1 else group)).int()
        linear.weight[:3] = linear.weight[:3].abs()  # rows with a zero point of 0, next to each other in a word
        scales, zeros = numbers_of(linear.weight, bits, groups, bool(options["sym"]))
        packed = TorchLinear(
            bits=bits,
            group_size=group,
            sym=bool(options["sym"]),
            desc_act=desc_act,
            in_features=width,
            out_features=out,
            bias=False,
            register_buffers=True,
        ).eval()
        packed.pack_original(linear.float(), scales.float(), zeros.float(), groups)
        packed.post_init()
        truth[f"{layer}.weight"] = packed.dequantize_weight().T.contiguous().half()
        if options["checkpoint_format"] == "gptq":
            convert_gptq_v2_to_v1_format_module(packed, packed)
        tensors |= {f"{layer}.{part}": getattr(packed, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
    write(name, config, {key: x.clone() for key, x in tensors.items()}, truth)


def awq(name: str) -> None:
    from gptqmodel.quantization.awq.utils.packing_utils import pack_awq

    group = 16
    model = model_of(name, torch.float16)
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    config, tensors = base(model, quantization | {"modules_to_not_convert": None})
    truth = {}
    for layer, linear in linears(model).items():
        groups = torch.arange(linear.in_features) // group
        scales, zeros = numbers_of(linear.weight, 4, groups, False)
        levels = (linear.weight.float() / scales[:, groups].float()).round() + zeros[:, groups]
        levels = levels.clamp(0, 15).int()
        tensors[f"{layer}.qweight"], tensors[f"{layer}.qzeros"] = pack_awq(levels.T, zeros.int().T, 4)
        tensors[f"{layer}.scales"] = scales.T
        truth[f"{layer}.weight"] = (levels - zeros[:, groups].int()).half() * scales[:, groups]
    write(name, config, tensors, truth)


def fp8(name: str) -> None:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    rows, columns = block = (16, 16)
    model = model_of(name, torch.bfloat16, ODD)
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": block}
    config, tensors = base(model, quantization)
    truth = {}
    for layer, linear in linears(model).items():
        out, width = linear.weight.shape
        stored = FP8Linear(width, out, block_size=block)
        assert stored.weight_scale_inv.shape == (math.ceil(out / rows), math.ceil(width / columns))
        scale = torch.rand(stored.weight_scale_inv.shape) * 0.01 + 0.0005
        wide = scale.repeat_interleave(rows, 0)[:out].repeat_interleave(columns, 1)[:, :width]
        numbers = (linear.weight.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors |= {f"{layer}.weight": numbers, f"{layer}.weight_scale_inv": scale}
        truth[f"{layer}.weight"] = numbers.float() * wide
    write(name, config | {"dtype": "bfloat16"}, tensors, truth)


CASES: dict[str, Callable[[str], None]] = {
    **dict.fromkeys(COMPRESSED, compressed),
    **dict.fromkeys(GPTQ, gptq),
    "awq": awq,
    "fp8_block": fp8,
}


def check_loads(folder: Path, truth: Path) -> None:
    found = loaded(folder)
    want = np.load(truth)
    assert want.keys() <= found.keys(), (sorted(found), sorted(want))
    for name in want:
        assert np.array_equal(found[name].float().numpy(), want[name]), name
    print(f"{folder}: {len(want)} of {len(found)} weights are the same")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--loads"]:
        check_loads(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        for case in sys.argv[1:] or CASES:
            CASES[case](case)
