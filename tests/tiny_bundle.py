"""A bundle with the format of a real one and graphs of a few random numbers, so that the runtime is tested in seconds.

Every input of every graph reaches the output; nothing was trained. The face detector is the real one of models/mini.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from pidiff.runtime.bundle import BundleWriter, GraphSpec, TensorSpec

FACE_MODELS = Path(__file__).resolve().parent.parent / "models" / "mini"
LAYERS, CHANNELS, SIDE, FACTOR, LENGTH, DIM, FACE = 4, 4, 4, 8, 8, 6, 64
SUM_C, SUM_CT, FOLD = 10, 5, 12
WORDS = "<|startoftext|> <|endoftext|> a photo of person red blue background smiling , sketch".split()
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}


def model_fields():
    return {
        "latent_channels": CHANNELS, "image_size": SIDE * FACTOR, "vae_scale_factor": FACTOR, "text_length": LENGTH,
        "prompt_dim": DIM, "w_plus_layers": LAYERS, "w_plus_dim": 512, "face_size": FACE,
        "identity": {"mode": "parallel", "tokens": 4, "has_null": True, "num_groups": 4},
        "unet": {"heads": [2, 2], "channels": [4, 6]},
    }


def write_tiny_bundle(out, dtype="float32", poison=None, solver="dpmpp_2m"):
    """Write a bundle to `out`; `poison` names a graph whose weights become NaN."""
    rng = np.random.default_rng(0)
    with BundleWriter(out) as writer:
        specs = {}
        for name, (inputs, outputs, nodes, weights) in _graphs(rng, dtype).items():
            if name == poison:
                weights = {k: np.full_like(v, np.nan) if v.dtype.kind == "f" else v for k, v in weights.items()}
            specs[name] = _save(writer.path / f"{name}.onnx", inputs, outputs, nodes, weights)
        for name in ("face_pnet", "face_rnet", "face_onet"):
            (writer.path / f"{name}.onnx").write_bytes((FACE_MODELS / f"{name}.onnx").read_bytes())
            specs[name] = spec_of(writer.path / f"{name}.onnx")
        _write_texts(writer.path, rng)
        writer.commit(name="tiny", family="sd1", precision="fp16" if dtype == "float16" else "fp32", attention="standard",
                      opset=18, graphs=specs, model=model_fields(),
                      scheduler={"num_inference_steps": 5, "guidance_scale": 2.0, "solver": solver})
    return Path(out)


def spec_of(path):
    """Read the GraphSpec of an ONNX file."""
    graph = onnx.load(path).graph
    names = {v: k for k, v in _TYPES.items()}

    def tensor(value):
        type_ = value.type.tensor_type
        return TensorSpec(value.name, names[type_.elem_type], tuple(d.dim_param or d.dim_value for d in type_.shape.dim))

    return GraphSpec(Path(path).name, tuple(map(tensor, graph.input)), tuple(map(tensor, graph.output)))


def _save(path, inputs, outputs, nodes, weights):
    values = [[helper.make_tensor_value_info(n, _TYPES[t], s) for n, t, s in group] for group in (inputs, outputs)]
    nodes = [helper.make_node(op, i.split(), o.split(), **a) for op, i, o, a in nodes]
    graph = helper.make_graph(nodes, path.stem, *values, [numpy_helper.from_array(v, k) for k, v in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return spec_of(path)


def _graphs(rng, t):
    """name -> (inputs, outputs, nodes (op, inputs, outputs, attributes), weights)."""
    normal = lambda *shape: (rng.standard_normal(shape) * 0.5).astype(t)
    ints = lambda *values: np.array(values, np.int64)
    latents = ["B", CHANNELS, SIDE, SIDE]
    image = ["B", 3, SIDE * FACTOR, SIDE * FACTOR]
    y, x = np.mgrid[-1:1:FACE * 1j, -1:1:FACE * 1j]
    return {
        "text_encoder": ([("input_ids", "int64", ["B", LENGTH])], [("prompt_embeds", t, ["B", LENGTH, DIM])],
                         [("Gather", "table input_ids", "prompt_embeds", {})], {"table": normal(len(WORDS), DIM)}),
        "text_conditioner": ([("prompt_embeds", t, ["B", LENGTH, DIM])], [("text_kv", t, ["B", LENGTH, 2 * SUM_C])],
                             [("MatMul", "prompt_embeds w", "text_kv", {})], {"w": normal(DIM, 2 * SUM_C)}),
        "w_plus_encoder": ([("face", t, ["B", 3, FACE, FACE])], [("w_plus", t, ["B", LAYERS, 512])],
                           [("ReduceMean", "face axes", "mean", {"keepdims": 0}), ("MatMul", "mean w", "flat", {}),
                            ("Reshape", "flat shape", "w_plus", {})],
                           {"axes": ints(2, 3), "w": normal(3, LAYERS * 512), "shape": ints(-1, LAYERS, 512)}),
        "id_conditioner": ([("w_plus", t, ["B", LAYERS, 512]), ("level_scale", t, ["B", 4])], [("id_fold", t, ["B", FOLD])],
                           [("Reshape", "w_plus shape", "flat", {}), ("MatMul", "flat w", "a", {}), ("Add", "a bias", "b", {}),
                            ("MatMul", "level_scale levels", "l", {}), ("Mul", "b l", "id_fold", {})],
                           {"shape": ints(-1, LAYERS * 512), "w": normal(LAYERS * 512, FOLD) / 20, "bias": normal(FOLD),
                            "levels": normal(4, FOLD)}),
        "time_conditioner": ([("timesteps", "float32", ["N"])], [("time_table", t, ["N", SUM_CT])],
                             [("Unsqueeze", "timesteps one", "a", {}), ("Mul", "a w", "b", {}), ("Sin", "b", "c", {}),
                              ("Cast", "c", "time_table", {"to": _TYPES[t]})],
                             {"one": ints(1), "w": np.linspace(0.001, 0.1, SUM_CT, dtype=np.float32)[None]}),
        "unet": ([("latents", t, latents), ("time_row", t, [1, SUM_CT]), ("text_kv", t, ["B", LENGTH, 2 * SUM_C]),
                  ("id_fold", t, ["B", "P", FOLD]), ("id_mask", t, ["B", "P", SIDE, SIDE]), ("id_scale", t, ["B"])],
                 [("model_output", t, latents), ("identity_map", t, ["B", "P", SIDE, SIDE])],
                 [("MatMul", "time_row tw", "time", {}),  # [1, 1]
                  ("MatMul", "text_kv xw", "words", {}), ("ReduceMean", "words one", "text", {"keepdims": 0}),  # [B, c]
                  ("Unsqueeze", "text spatial", "text4", {}), ("MatMul", "id_fold fw", "fold", {}),  # [B, P, c]
                  ("Unsqueeze", "fold last", "fold5", {}), ("Unsqueeze", "id_mask two", "mask5", {}),
                  ("Mul", "fold5 mask5", "people", {}), ("ReduceSum", "people one", "person", {"keepdims": 0}),
                  ("Unsqueeze", "id_scale three", "scale4", {}), ("Mul", "person scale4", "term", {}),
                  ("Mul", "latents half", "base", {}), ("Add", "base text4", "s1", {}), ("Add", "s1 time", "s2", {}),
                  ("Add", "s2 term", "model_output", {}), ("ReduceMean", "fold5 two", "mass5", {"keepdims": 0}),
                  ("Sigmoid", "mass5", "sure", {}), ("Mul", "sure id_mask", "identity_map", {})],
                 {"tw": normal(SUM_CT, 1), "xw": normal(2 * SUM_C, CHANNELS), "fw": normal(FOLD, CHANNELS), "one": ints(1),
                  "two": ints(2), "spatial": ints(2, 3), "last": ints(3, 4), "three": ints(1, 2, 3),
                  "half": np.array(0.5, t)}),
        "vae_decoder": ([("latents", t, latents)], [("image", t, image)],
                        [("ConvTranspose", "latents w", "a", {"strides": [FACTOR] * 2}), ("Tanh", "a", "image", {})],
                        {"w": normal(CHANNELS, 3, FACTOR, FACTOR)}),
        "face_matting": ([("face", "float32", ["B", 3, FACE, FACE])], [("alpha", "float32", ["B", 1, FACE, FACE])],
                         [("ReduceMean", "face axes", "m", {}), ("Mul", "m zero", "z", {}), ("Add", "z oval", "alpha", {})],
                         {"axes": ints(1), "zero": np.float32(0)[None], "oval": (x**2 + y**2 < 0.9).astype(np.float32)[None, None]}),
    }


def _write_texts(folder, rng):
    (folder / "tokenizer").mkdir()
    (folder / "adapter").mkdir()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token=WORDS[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    texts = {
        "tokenizer/tokenizer_config.json": {"bos_token": WORDS[0], "eos_token": WORDS[1], "pad_token": {"content": WORDS[1]}},
        "adapter/config.json": {"groups": [1, 1, 1, 1]},
        "schedule.json": {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear",
                          "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "v_prediction",
                          "timestep_spacing": "leading", "clip_sample": False},
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content))
    save_file({"smile": rng.standard_normal((LAYERS, 512)).astype(np.float32)}, folder / "directions.safetensors")


def edit(path, change):
    """Apply `change` to the parsed manifest of a bundle."""
    file = path / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    return path
