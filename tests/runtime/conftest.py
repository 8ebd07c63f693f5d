"""A bundle of toy graphs, written in ONNX's text form: every graph and tensor of the contract, no meaning, no torch.

It is a few kilobytes and runs in microseconds, so that tests can be about the loop, the files and the commands.
The step graphs do a whole step as real ones do; their "networks" are a line of arithmetic that depends on the text and
on the hands.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from handiffuser.contract import NUM_PARAMS, GraphSpec, Manifest, TensorSpec, file_digest
from onnx import parser
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HISTORY = {"hand_prior": 1, "unet": 4}
DTYPES = {1: "float32", 2: "uint8", 7: "int64"}
HEADER = '<ir_version: 10, opset_import: ["" : 18]>\n'


def step_graph(name: str, state: str, shape: str, K: int, extra: str, constants: str, network: str) -> str:
    """x' = a x + b m + h1 + d noise, h_k' = p_k x + q_k m + h_(k+1), m = u + g (c - u), in ONNX's text form.

    `network` computes u and c from `scaled`.
    """
    columns = ["timestep", "scale", "g", "a", "b", "d"] + [f"{c}{k}" for k in range(1, K + 1) for c in "pq"]
    R = len(columns)
    ones = ", ".join(["-1"] + ["1"] * shape.count(","))
    rest = ", ".join(str(axis) for axis in range(1, shape.count(",") + 1))
    past = shape.replace("B,", f"B,{K},", 1)
    body = [f"{', '.join('r_' + c for c in columns)} = Split <axis = 1, num_outputs = {R}> (row)"]
    body += [f"{c} = Reshape (r_{c}, column)" for c in columns]
    body += [
        f"scaled = Mul (scale, {state})",
        network,
        "away = Sub (c, u)",
        "pull = Mul (g, away)",
        "m = Add (u, pull)",
    ]
    body.append(f"{', '.join(f'h{k}_' for k in range(1, K + 1))} = Split <axis = 1, num_outputs = {K}> (history)")
    body += [f"h{k} = Squeeze (h{k}_, one)" for k in range(1, K + 1)]
    body += [f"ax = Mul (a, {state})", "bm = Mul (b, m)", "dn = Mul (d, noise)", f"next_{state} = Sum (ax, bm, h1, dn)"]
    for k in range(1, K + 1):
        body += [f"px{k} = Mul (p{k}, {state})", f"qm{k} = Mul (q{k}, m)"]
        body.append(f"n{k}_ = Sum (px{k}, qm{k}{f', h{k + 1}' if k < K else ''})")
        body.append(f"n{k} = Unsqueeze (n{k}_, one)")
    body.append(f"next_history = Concat <axis = 1> ({', '.join(f'n{k}' for k in range(1, K + 1))})")
    body += [f"size = Abs (next_{state})", "small_ = LessOrEqual (size, largest)", "small_f = Cast <to = 1> (small_)"]
    body.append("finite = ReduceMin <keepdims = 0> (small_f, rest)")
    return f"""{HEADER}
        {name} (float[{shape}] {state}, float[{past}] history, float[{shape}] noise, {extra}, float[B,{R}] row)
            => (float[{shape}] next_{state}, float[{past}] next_history, float[B] finite)
        <int64[{shape.count(",") + 1}] column = {{{ones}}}, int64[1] one = {{1}}, float largest = {{3.4e38}},
         int64[{shape.count(",")}] rest = {{{rest}}}, {constants}>
        {{ {" ".join(body)} }}"""


def graphs(h: int | str, w: int | str, inpaints: bool = False, people: int = 1) -> dict[str, str]:
    """All graphs; latents are h x w, pictures 4h x 4w. "h" and "w" are free sizes; prompts then have any length, too.
    inpaints: the UNet reads a mask and masked latents. people: how many a picture shows at most."""
    params, hands, of = people * NUM_PARAMS, 2 * people, f"{people}," if people > 1 else ""
    lead = f"{people}, " if people > 1 else ""
    free = isinstance(h, str) or isinstance(w, str)
    L, masked, heard = 78, "", "h = Identity (own)"
    if free:
        L, masked = "L", "int64[B,2,77] attention_mask, "
        heard = "m = Cast <to = 1> (attention_mask) h = Mul (own, m)"
    heard += " a = ReduceMean <keepdims = 1> (h, last) s = Add (own, a)"  # each token reads those that count
    H, W = ("H", "W") if free else (4 * h, 4 * w)
    span, spanned = "", "visibility = Identity (shown)"
    if free:
        span, spanned = ", float[B] span", "scale = Unsqueeze (span, one) visibility = Mul (shown, scale)"
    prior = """
        first = Gather <axis = 1> (text, start)
        second = Gather <axis = 1> (text, end)
        t0 = ReduceMean <keepdims = 0> (first, axes)
        t1 = ReduceMean <keepdims = 0> (second, axes)
        v0 = Reshape (t0, flat)
        v1 = Reshape (t1, flat)
        fading = Mul (scaled, small)
        w0 = Add (fading, v0)
        w1 = Add (fading, v1)
        u = Tanh (w0)
        c = Tanh (w1)"""
    unet = """
        level = ReduceMean <keepdims = 0> (key_00, axes)
        l0_ = Gather <axis = 1> (level, start)
        l1_ = Gather <axis = 1> (level, end)
        l0 = Reshape (l0_, column)
        l1 = Reshape (l1_, column)
        given = Gather <axis = 1> (value_00, end)
        values = ReduceMean <keepdims = 0> (given, all)
        moment = ReduceMean <keepdims = 0> (time, one)
        tv_ = Add (values, moment)
        tv = Reshape (tv_, column)
        u_ = Sum (seen, l0, tv)
        c_ = Sum (seen, l1, tv)
        u = Tanh (u_)
        c = Tanh (c_)"""
    pictures = f"float[B,1,{h},{w}] mask, float[B,4,{h},{w}] masked_latents, " if inpaints else ""
    unet = (
        "seen_ = Sub (masked_latents, mask) seen = Add (scaled, seen_)" if inpaints else "seen = Identity (scaled)"
    ) + unet
    return {
        "text_encoder": HEADER
        + """text_encoder (int64[B,77] input_ids) => (float[B,4] text)
        <int64[1] one = {1}, int64[2] shape = {1, 4}>
        {
            f = Cast <to = 1> (input_ids)
            s = Sin (f)
            mean = ReduceMean <keepdims = 1> (s, one)
            text = Tile (mean, shape)
        }""",
        "hand_prior": step_graph(
            "hand_prior",
            "x",
            f"B,{params}",
            HISTORY["hand_prior"],
            "float[B,G,4] text",
            "int64[2] axes = {1, 2}, int64[2] flat = {-1, 1}, float small = {0.1}, "
            "int64[1] start = {0}, int64[1] end = {-1}",
            prior,
        ),
        "hand_features": HEADER
        + f"""hand_features (float[B,{params}] x{span}) => (float[B,{hands},21,2] joints,
            float[B,{hands},16,6] rotations, float[B,{hands},3] bps, float[B,{hands}] visibility,
            float[B,{of}5,3] vertices, float[B,{of}62,3] joints_3d, float[B,{of}3] camera)
        <int64[1] one = {{1}}, int64[1] zero = {{0}}, int64[1] n84 = {{{84 * people}}},
         int64[1] n192 = {{{192 * people}}}, int64[1] n6 = {{{6 * people}}},
         int64[1] n2 = {{{hands}}}, int64[1] n15 = {{{15 * people}}},
         int64[1] n186 = {{{186 * people}}}, int64[1] n3 = {{{3 * people}}}, int64[4] s84 = {{-1, {hands}, 21, 2}},
         int64[4] s192 = {{-1, {hands}, 16, 6}}, int64[3] s6 = {{-1, {hands}, 3}},
         int64[{3 + (people > 1)}] s15 = {{-1, {lead}5, 3}}, int64[{3 + (people > 1)}] s186 = {{-1, {lead}62, 3}},
         int64[{2 + (people > 1)}] s3 = {{-1, {lead}3}}>
        {{
            a = Slice (x, zero, n84, one)
            b = Sigmoid (a)
            joints = Reshape (b, s84)
            c = Slice (x, zero, n192, one)
            rotations = Reshape (c, s192)
            d = Slice (x, zero, n6, one)
            bps = Reshape (d, s6)
            e = Slice (x, zero, n2, one)
            f = Mul (e, e)
            shown = Exp (f)
            {spanned}
            g = Slice (x, zero, n15, one)
            vertices = Reshape (g, s15)
            i = Slice (x, zero, n186, one)
            joints_3d = Reshape (i, s186)
            seen_ = Slice (x, zero, n3, one)
            seen = Reshape (seen_, s3)
            camera = Exp (seen)
        }}""",
        # No rotations: a configuration without that cue.
        "text_hand_encoder": HEADER
        + f"""text_hand_encoder (int64[B,2,77] input_ids, {masked}float[B,{hands},21,2] joints, float[B,{hands},3] bps,
            float[B,{hands}] visibility) => (float[B,2,78,3] context)
        <int64[1] last = {{-1}}, int64[4] three = {{1, 1, 1, 3}}, int64[3] axes = {{1, 2, 3}},
         int64[2] axes2 = {{1, 2}}, int64[1] axes1 = {{1}},
         float[1,2,1,3] ones = {{{", ".join(["8"] * 6)}}}>
        {{
            f = Cast <to = 1> (input_ids)
            own = Sin (f)
            {heard}
            t = Unsqueeze (s, last)
            wide = Tile (t, three)
            j = ReduceMean <keepdims = 1> (joints, axes)
            k_ = ReduceMean <keepdims = 1> (bps, axes2)
            k = Unsqueeze (k_, last)
            v_ = ReduceMean <keepdims = 1> (visibility, axes1)
            v1 = Unsqueeze (v_, last)
            v = Unsqueeze (v1, last)
            hands = Sum (j, k, v)
            token = Mul (hands, ones)
            context = Concat <axis = 2> (wide, token)
        }}""",
        "unet_context": HEADER
        + f"""unet_context (float[B,2,{L},3] context) => (float[B,2,{L},3] key_00, float[B,2,{L},3] value_00)
        {{ key_00 = Sin (context)
          value_00 = Cos (context) }}""",
        "unet_time": HEADER
        + """unet_time (float[S] timesteps) => (float[S,2] time)
        <int64[1] last = {-1}, int64[2] two = {1, 2}>
        { a = Sin (timesteps)
          b = Unsqueeze (a, last)
          time = Tile (b, two) }""",
        "unet": step_graph(
            "unet",
            "latents",
            f"B,4,{h},{w}",
            HISTORY["unet"],
            f"float[B,2] time, {pictures}float[B,G,{L},3] key_00, float[B,G,{L},3] value_00",
            "int64[2] axes = {2, 3}, int64[3] all = {1, 2, 3}, int64[1] start = {0}, int64[1] end = {-1}",
            unet,
        ),
        "image_decoder": HEADER
        + f"""image_decoder (float[B,4,{h},{w}] latents) => (uint8[B,{H},{W},3] image, float[B] finite)
        <int64[1] one = {{1}}, int64[1] zero = {{0}}, int64[1] n3 = {{3}}, float[4] grow = {{1, 1, 4, 4}},
         float full = {{255}}, float largest = {{3.4e38}}, int64[3] rest = {{1, 2, 3}}>
        {{
            rgb = Slice (latents, zero, n3, one)
            big = Resize <mode = "nearest"> (rgb, , grow)
            s = Sigmoid (big)
            f = Mul (s, full)
            r = Round (f)
            moved = Transpose <perm = [0, 2, 3, 1]> (r)
            image = Cast <to = 2> (moved)
            size = Abs (latents)
            small_ = LessOrEqual (size, largest)
            small_f = Cast <to = 1> (small_)
            finite = ReduceMin <keepdims = 0> (small_f, rest)
        }}""",
        "image_encoder": HEADER
        + f"""image_encoder (uint8[B,{H},{W},3] image) => (float[B,4,{h},{w}] latents, float[B] finite)
        <float half = {{127.5}}, float unit = {{1}}, int64[1] one = {{1}}, float largest = {{3.4e38}},
         int64[3] rest = {{1, 2, 3}}>
        {{
            f = Cast <to = 1> (image)
            moved = Transpose <perm = [0, 3, 1, 2]> (f)
            mean = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (moved)
            scaled = Div (mean, half)
            rgb = Sub (scaled, unit)
            grey = ReduceMean <keepdims = 1> (rgb, one)
            latents = Concat <axis = 1> (rgb, grey)
            size = Abs (latents)
            small_ = LessOrEqual (size, largest)
            small_f = Cast <to = 1> (small_)
            finite = ReduceMin <keepdims = 0> (small_f, rest)
        }}""",
    }


def spec_of(model: onnx.ModelProto, file: str) -> GraphSpec:
    """The GraphSpec of a model; outputs called next_... bear the names of the state they replace."""

    def tensors(values: list[onnx.ValueInfoProto]) -> list[TensorSpec]:
        return [
            TensorSpec(
                value.name.removeprefix("next_"),
                DTYPES[value.type.tensor_type.elem_type],
                tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
            )
            for value in values
        ]

    return GraphSpec(file, tensors(list(model.graph.input)), tensors(list(model.graph.output)))


def write_tokenizer(path: Path) -> dict[str, int]:
    """A byte-level tokenizer without merges: any text is one token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate(alphabet)}
    vocab |= {"<bos>": len(vocab), "<eos>": len(vocab) + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))
    return {"bos": vocab["<bos>"], "eos": vocab["<eos>"], "pad": vocab["<eos>"], "length": 77}


def write_bundle(
    folder: Path,
    latent: tuple[int, int] = (8, 8),
    inpaints: bool = False,
    any_size: bool = False,
    people: int = 1,
) -> Path:
    """Writes the bundle into `folder` and returns it. any_size: sides may be any multiple of 8 pixels, and prompts
    have any length. people: how many a picture shows at most."""
    folder.mkdir(parents=True, exist_ok=True)
    specs = {}
    for name, text in graphs(*(("h", "w") if any_size else latent), inpaints, people).items():
        model = parser.parse_model(text)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, str(folder / f"{name}.onnx"))
        specs[name] = spec_of(model, f"{name}.onnx")
    special = write_tokenizer(folder / "tokenizer.json")
    generator = np.random.default_rng(0)
    schedule = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
    Manifest(
        graphs=specs,
        files={path.name: file_digest(path) for path in sorted(folder.iterdir())},
        precision="fp32",
        image_size=(4 * latent[0], 4 * latent[1]),
        latent_size=(4, *latent),
        num_history=HISTORY,
        schedules={
            "hand_prior": {**schedule, "prediction_type": "sample"},
            "unet": {**schedule, "prediction_type": "v_prediction"},
        },
        defaults={
            "steps": 6,
            "solver": "ddim",
            "guidance": 2.0,
            "hand_steps": 4,
            "hand_solver": "ddim",
            "hand_guidance": 1.0,
        },
        tokenizer=special,
        params_mean=generator.normal(size=people * NUM_PARAMS).tolist(),
        params_std=generator.uniform(0.5, 1.5, people * NUM_PARAMS).tolist(),
        made_by={"test": True},
        size_multiple=8 if any_size else 0,
        num_people=people,
    ).save(folder)
    return folder


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle. Do not write into it: `toy_copy` is for that."""
    return write_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture(scope="session")
def toy_inpainter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle whose UNet was trained for inpainting."""
    return write_bundle(tmp_path_factory.mktemp("inpainter") / "bundle", inpaints=True)


@pytest.fixture(scope="session")
def sized_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle that paints any size; its own is 32 x 32."""
    return write_bundle(tmp_path_factory.mktemp("sized") / "bundle", any_size=True)


@pytest.fixture(scope="session")
def pair_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle that knows two people."""
    return write_bundle(tmp_path_factory.mktemp("pair") / "bundle", people=2)


@pytest.fixture
def toy_copy(toy_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the toy bundle that a test may damage."""
    return Path(shutil.copytree(toy_bundle, tmp_path / "bundle"))


@pytest.fixture
def wide_bundle(tmp_path: Path) -> Path:
    """A toy bundle whose pictures are not square: 16 x 48."""
    return write_bundle(tmp_path / "wide", (4, 12))


if __name__ == "__main__":
    write_bundle(Path(sys.argv[1]))
