"""Adapters of other programs: merged they are what diffusers fuses, and what is not merged is refused by its name."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from handiffuser.adapters import METADATA, addresses
from handiffuser.errors import CheckpointError
from handiffuser.models import lora
from handiffuser.models.checkpoint import random_checkpoint
from handiffuser.models.configs import CONFIGS
from safetensors.torch import save_file
from transformers import CLIPTextModel


@pytest.fixture(scope="module")
def plain():
    """A checkpoint, and Stable Diffusion's text encoder with the same layers."""
    checkpoint = random_checkpoint(CONFIGS["tiny"], seed=1)
    clip = CLIPTextModel(copy.deepcopy(checkpoint.text_encoder.config))
    clip.load_state_dict(checkpoint.text_encoder.state_dict())
    own = text_layers(clip)
    for name, module in checkpoint.text_hand_encoder.named_modules():
        if name in own:
            own[name].load_state_dict(module.state_dict())
    return checkpoint, clip


def text_layers(clip):
    """Its linear layers, by their names from `layers.` on."""
    linear = {n: m for n, m in clip.named_modules() if isinstance(m, torch.nn.Linear) and "layers." in n}
    return {name[name.index("layers.") :]: module for name, module in linear.items()}


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONV = ("conv1", "conv2", "proj_in", "proj_out", "conv_shortcut", "time_emb_proj", "conv", "ff.net.0.proj", "ff.net.2")


class Maker:
    """Random pairs for layers of a checkpoint, in the spelling of a program."""

    def __init__(self, plain):
        checkpoint, clip = plain
        self.unet = {n: m for n, m in checkpoint.unet.named_modules() if hasattr(m, "weight")}
        self.text = text_layers(clip)
        self.generator = torch.Generator().manual_seed(7)

    def pair(self, module, rank):
        down = 0.2 * torch.randn(rank, *module.weight.shape[1:], generator=self.generator)
        ones = [1] * (module.weight.dim() - 2)
        return down, 0.2 * torch.randn(len(module.weight), rank, *ones, generator=self.generator)

    def layers(self, part, targets):
        modules = self.unet if part == "unet" else self.text
        return {n: m for n, m in modules.items() if n.endswith(targets)}

    def peft(self, prefix, part, targets, rank=4):
        out = {}
        for number, (name, module) in enumerate(self.layers(part, targets).items()):
            pair = self.pair(module, rank(number) if callable(rank) else rank)
            out[f"{prefix}{name}.lora_A.weight"], out[f"{prefix}{name}.lora_B.weight"] = pair
        return out

    def kohya(self, prefix, part, targets, alpha=2.0, rank=4):
        out = {}
        for number, (name, module) in enumerate(self.layers(part, targets).items()):
            word = prefix + name.replace(".", "_")
            pair = self.pair(module, rank(number) if callable(rank) else rank)
            out[f"{word}.lora_down.weight"], out[f"{word}.lora_up.weight"] = pair
            if alpha is not None:
                out[f"{word}.alpha"] = torch.tensor(alpha)
        return out


def renamed(tensors, *pairs):
    for old, new in pairs:
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    return tensors


TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
MLP = (*TEXT, "fc1", "fc2")
LAYERS = "text_encoder.text_model.encoder."
KOHYA = "lora_te_text_model_encoder_"
OF_UNET = {"unet.r": 4, "unet.lora_alpha": 16, "unet.target_modules": list(ATTENTION)}
OF_TEXT = {"text_encoder.r": 4, "text_encoder.lora_alpha": 16, "text_encoder.target_modules": list(TEXT)}


def both(make):
    return {**make.peft("unet.", "unet", ATTENTION), **make.peft(LAYERS, "text", TEXT)}


def old_diffusers(make):
    """As `save_lora_weights` wrote it in 2023."""
    unet = renamed(make.peft("unet.", "unet", ATTENTION), (".lora_A.", ".lora.down."), (".lora_B.", ".lora.up."))
    words = [(".lora_A.", ".lora_linear_layer.down."), (".lora_B.", ".lora_linear_layer.up.")]
    return {**unet, **renamed(make.peft(LAYERS, "text", TEXT), *words)}


def oldest_diffusers(make):
    """As attention processors were saved at first: to_q_lora."""
    names = [(f".{name}.lora_{ab}.", f".processor.{name.removesuffix('.0')}_lora.{word}.")
             for name in ATTENTION for ab, word in (("A", "down"), ("B", "up"))]  # fmt: skip
    return renamed(make.peft("unet.", "unet", ATTENTION), *names)


FORMS = {
    "kohya": (lambda make: {**make.kohya("lora_unet_", "unet", ATTENTION), **make.kohya(KOHYA, "text", MLP)}, {}),
    "kohya of unet alone": (lambda make: make.kohya("lora_unet_", "unet", ATTENTION, 1.0), {}),
    "kohya of text alone": (lambda make: make.kohya(KOHYA, "text", MLP, 8.0), {}),
    "kohya as te1": (lambda make: make.kohya(KOHYA.replace("te_", "te1_"), "text", TEXT), {}),
    "kohya without alpha": (lambda make: make.kohya("lora_unet_", "unet", ATTENTION, None), {}),
    "kohya of many ranks": (lambda make: make.kohya("lora_unet_", "unet", ATTENTION, rank=lambda n: 2 + n % 3), {}),
    "LoCon": (lambda make: make.kohya("lora_unet_", "unet", (*ATTENTION, *CONV), 2.0), {}),
    "diffusers": (both, {}),
    "diffusers of 2023": (old_diffusers, {}),
    "diffusers of 2022": (oldest_diffusers, {}),
    "diffusers of unet alone": (lambda make: make.peft("unet.", "unet", ATTENTION), {}),
    "diffusers of text alone": (lambda make: make.peft(LAYERS, "text", MLP), {}),
    "diffusers with convolutions": (lambda make: make.peft("unet.", "unet", (*ATTENTION, *CONV)), {}),
    "diffusers of many ranks": (lambda make: make.peft("unet.", "unet", ATTENTION, rank=lambda n: 2 + n % 3), {}),
    "alpha in the metadata": (both, {**OF_UNET, **OF_TEXT}),
    "alpha of unet in the metadata": (lambda make: make.peft("unet.", "unet", ATTENTION), OF_UNET),
    "rsLoRA": (both, {**OF_UNET, "unet.use_rslora": True, **OF_TEXT, "text_encoder.use_rslora": True}),
    "alpha_pattern": (both, {**OF_UNET, "unet.alpha_pattern": {"to_q": 64, "mid_block.*to_v": 2}, **OF_TEXT,
                             "text_encoder.alpha_pattern": {"q_proj": 3}}),
    "rank_pattern": (
        lambda make: {**make.peft("unet.", "unet", ("to_q",), 2), **make.peft("unet.", "unet", ATTENTION[1:])},
        {**OF_UNET, "unet.rank_pattern": {"to_q": 2}},
    ),
    "rank_pattern, alpha_pattern and rsLoRA": (
        lambda make: {**make.peft("unet.", "unet", ("to_q",), 2), **make.peft("unet.", "unet", ATTENTION[1:])},
        {**OF_UNET, "unet.rank_pattern": {"to_q": 2}, "unet.alpha_pattern": {"to_q": 5}, "unet.use_rslora": True},
    ),
    "LoraConfig without alpha": (lambda make: make.peft("unet.", "unet", ATTENTION), {k: v for k, v in OF_UNET.items()
                                 if "alpha" not in k}),
    "lora_bias": (
        lambda make: {
            **make.peft("unet.", "unet", ("to_out.0",)),
            **{f"unet.{n}.lora_B.bias": torch.full(m.bias.shape, 0.1)
               for n, m in make.layers("unet", ("to_out.0",)).items()},
        },
        {},
    ),
}  # fmt: skip


def write(path, tensors, notes=None, **header):
    metadata = {"format": "pt", **header, **({METADATA: json.dumps(notes)} if notes else {})}
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path, metadata)
    return path


def fused(plain, path, scale):
    """What diffusers makes of it: the weights of UNet and text encoder, by the names of ours."""
    checkpoint, clip = plain
    pipe = StableDiffusionPipeline(
        None, copy.deepcopy(clip), None, theirs(checkpoint), DDIMScheduler(), None, None, requires_safety_checker=False
    )
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, local_files_only=True)
    pipe.fuse_lora(lora_scale=scale)
    pipe.unload_lora_weights()
    return weights(pipe.unet, text_layers(pipe.text_encoder))


def theirs(checkpoint):
    """The UNet without our positional kernel."""
    unet = type(checkpoint.unet).from_config(checkpoint.unet.config)
    unet.load_state_dict(checkpoint.unet.state_dict())
    return unet


def weights(unet, text):
    found = {f"unet.{name}": value for name, value in unet.state_dict().items()}
    for name, module in text.items():
        found |= {f"text.{name}.{kind}": value for kind, value in module.state_dict().items()}
    return found


def merged(plain, path, scale=1.0):
    checkpoint = copy.copy(plain[0])
    checkpoint.unet = copy.deepcopy(plain[0].unet)
    checkpoint.text_hand_encoder = copy.deepcopy(plain[0].text_hand_encoder)
    said = lora.merge(checkpoint, path, scale)
    text = {n: m for n, m in checkpoint.text_hand_encoder.named_modules() if n in text_layers(plain[1])}
    return weights(checkpoint.unet, text), said


@pytest.mark.parametrize(
    ("form", "scale"),
    [*((form, 0.35) for form in FORMS), ("kohya", 1.0), ("alpha in the metadata", 1.0), ("LoCon", -1)],
)
def test_merged_it_is_what_diffusers_fuses(plain, form, scale, tmp_path):
    make, notes = FORMS[form]
    path = write(tmp_path / "adapter.safetensors", make(Maker(plain)), notes)
    wanted, (got, said) = fused(plain, path, scale), merged(plain, path, scale)
    assert got.keys() == wanted.keys()
    before = weights(plain[0].unet, text_layers(plain[1]))
    assert max(float((got[name] - before[name]).abs().max()) for name in got) > 1e-2, "it changes something"
    worst = max(float((got[name] - wanted[name]).abs().max()) for name in got)
    assert worst <= 1e-6
    assert f"at {scale:g}: " in said and "layers of" in said
    silent = not notes and not any(name.endswith(".alpha") for name in make(Maker(plain)))
    assert silent == ("lacks alpha" in said)


def test_alphas_of_each_layer_and_first_names(plain, tmp_path):
    """diffusers reads neither: it takes the commonest alpha for all layers, and refuses the names."""
    make = Maker(plain)
    tensors = make.kohya("lora_unet_", "unet", (*ATTENTION, *CONV, "conv_in", "conv_out", "linear_1", "linear_2"))
    alphas = [name for name in tensors if name.endswith(".alpha")]
    tensors |= {name: torch.tensor(float(number)) for number, name in enumerate(alphas)}
    got, _ = merged(plain, write(tmp_path / "a.safetensors", tensors), 0.5)
    for number, name in enumerate(alphas):
        down, up = (tensors[name.replace("alpha", f"lora_{word}.weight")].flatten(1) for word in ("down", "up"))
        layer = next(layer for layer in make.unet if name == f"lora_unet_{layer.replace('.', '_')}.alpha")
        before = make.unet[layer].weight
        expected = before + 0.5 * number / 4 * (up @ down).reshape(before.shape)
        torch.testing.assert_close(got[f"unet.{layer}.weight"], expected)
    places = {  # of a UNet of two levels, whose first has no attention
        "conv_in": "input_blocks_0_0", "conv_out": "out_2", "time_embedding_linear_1": "time_embed_0",
        "time_embedding_linear_2": "time_embed_2", "down_blocks_0_resnets_0": "input_blocks_1_0",
        "down_blocks_0_downsamplers_0_conv": "input_blocks_2_0_op", "down_blocks_1_resnets_0": "input_blocks_3_0",
        "down_blocks_1_attentions_0": "input_blocks_3_1", "mid_block_resnets_0": "middle_block_0",
        "mid_block_attentions_0": "middle_block_1", "mid_block_resnets_1": "middle_block_2",
        "up_blocks_0_resnets_0": "output_blocks_0_0", "up_blocks_0_attentions_0": "output_blocks_0_1",
        "up_blocks_0_resnets_1": "output_blocks_1_0", "up_blocks_0_attentions_1": "output_blocks_1_1",
        "up_blocks_0_upsamplers_0": "output_blocks_1_2", "up_blocks_1_resnets_0": "output_blocks_2_0",
        "up_blocks_1_resnets_1": "output_blocks_3_0",
    }  # fmt: skip
    inside = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1",
              "conv_shortcut": "skip_connection"}  # fmt: skip
    first = renamed(tensors, *((f"lora_unet_{new}", f"lora_unet_{old}") for new, old in places.items()))
    first = renamed(first, *((f"_{new}.", f"_{old}.") for new, old in inside.items()))
    assert len(first) == len(tensors) and not any("up_blocks" in name or "conv1" in name for name in first)
    again, _ = merged(plain, write(tmp_path / "first.safetensors", first), 0.5)
    assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.parametrize("part", ["unet", "text"])
def test_what_peft_saves_is_what_peft_merges(plain, part, tmp_path):
    """Its own folder: base_model.model, and the strength in adapter_config.json beside the weights."""
    from peft import LoraConfig, get_peft_model

    module = theirs(plain[0]) if part == "unet" else copy.deepcopy(plain[1])
    config = LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["to_q", "q_proj"],
                        alpha_pattern={"mid_block.*to_q": 2, "layers.0.*q_proj": 5})  # fmt: skip
    module = get_peft_model(module, config)
    torch.manual_seed(3)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    module.save_pretrained(str(tmp_path))
    whole = module.merge_and_unload()
    wanted = weights(whole, {}) if part == "unet" else weights(plain[0].unet, text_layers(whole))
    got, said = merged(plain, tmp_path / "adapter_model.safetensors")
    assert max(float((got[name] - wanted[name]).abs().max()) for name in wanted) <= 1e-6
    assert f"layers of {'unet' if part == 'unet' else 'text_hand_encoder'}" in said
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config.json cannot be read"):
        merged(plain, tmp_path / "adapter_model.safetensors")


def test_raw_peft_names_of_both_parts(plain, tmp_path):
    """In one file, with or without base_model.model before or behind the part, and with the adapter's name."""
    tensors = both(Maker(plain))
    wanted, _ = merged(plain, write(tmp_path / "a.safetensors", tensors))
    for pairs in (
        [("unet.", "base_model.model.unet."), ("text_encoder.", "base_model.model.text_encoder.")],
        [("unet.", "unet.base_model.model."), ("text_encoder.", "text_encoder.base_model.model.")],
        [(".weight", ".default.weight")],
    ):
        got, _ = merged(plain, write(tmp_path / "b.safetensors", renamed(tensors, *pairs)))
        assert all(torch.equal(got[name], wanted[name]) for name in got), pairs


def without(tensors, word):
    name = next(name for name in tensors if word in name)
    return {key: value for key, value in tensors.items() if key != name}


def changed(tensors, word, change):
    name = next(name for name in tensors if word in name)
    return {**tensors, name: change(tensors[name])}


def beside(make, **parts):
    """A kohya file with more tensors for each layer."""
    tensors = make.kohya("lora_unet_", "unet", ATTENTION)
    words = [name.removesuffix(".alpha") for name in tensors if name.endswith(".alpha")]
    return {**tensors, **{f"{word}.{end}": value for word in words for end, value in parts.items()}}


def only(make, *ends):
    words = [f"lora_unet_{name.replace('.', '_')}" for name in make.layers("unet", ATTENTION)]
    return {f"{word}.{end}": torch.zeros(4, 4) for word in words for end in ends}


UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
STRANGE = "unet.down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"


def keys(*names, shape=(4, 4)):
    return {name: torch.ones(shape) for name in names}


def of_unet(make):
    return make.peft("unet.", "unet", ATTENTION)


# What is refused: the tensors, the metadata, and words of the sentence.
REFUSED = {
    "LoHa": (lambda make: only(make, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), {}, "a LoHa adapter"),
    "LoKr": (lambda make: only(make, "lokr_w1", "lokr_w2", "alpha"), {}, "a LoKr adapter"),
    "OFT": (lambda make: only(make, "oft_blocks", "alpha"), {}, "an OFT adapter"),
    "(IA)3": (lambda make: only(make, "weight", "on_input"), {}, r"an \(IA\)3 adapter"),
    "GLoRA": (lambda make: only(make, "a1.weight", "a2.weight", "b1.weight", "b2.weight"), {}, "a GLoRA adapter"),
    "whole weights": (lambda make: only(make, "diff"), {}, "LyCORIS adapter with whole weights"),
    "DoRA of kohya": (lambda make: beside(make, dora_scale=torch.ones(1, 32)), {}, "a DoRA adapter"),
    "DoRA of peft": (
        lambda make: {**of_unet(make), f"{UNET}.lora_magnitude_vector": torch.ones(32)}, {}, "a DoRA adapter"),
    "DoRA in the metadata": (of_unet, {**OF_UNET, "unet.use_dora": True}, "a DoRA adapter"),
    "Tucker": (lambda make: beside(make, **{"lora_mid.weight": torch.ones(4, 4, 3, 3)}), {}, "Tucker"),
    "PiSSA": (of_unet, {**OF_UNET, "unet.init_lora_weights": "pissa_niter_4"}, "changes the weights under it"),
    "layer_replication": (of_unet, {**OF_UNET, "unet.layer_replication": [[0, 1]]}, "with layer_replication"),
    "another peft_type": (of_unet, {**OF_UNET, "unet.peft_type": "LOHA"}, "of the kind 'LOHA'"),
    "SDXL of kohya": (
        lambda make: {**make.kohya("lora_unet_", "unet", ATTENTION),
                      "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}, {}, "for SDXL"),
    "SDXL of first names": (
        lambda make: keys("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_q.lora_down.weight"),
        {}, "for SDXL"),
    "SDXL of diffusers": (
        lambda make: keys("unet.down_blocks.2.attentions.0.transformer_blocks.3.attn1.to_q.lora_A.weight"),
        {}, "for SDXL"),
    "Flux of kohya": (lambda make: keys("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"), {}, "for Flux"),
    "Flux of diffusers": (
        lambda make: keys("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"), {}, "for Flux"),
    "SD3 of kohya": (
        lambda make: keys("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"), {}, "for Stable Diffusion 3"),
    "SD3 of diffusers": (
        lambda make: keys("transformer.transformer_blocks.0.attn.to_q.lora_A.weight"), {}, "or Stable Diffusion 3"),
    "Wan": (lambda make: keys("diffusion_model.blocks.0.self_attn.q.lora_A.weight"), {}, "for a transformer"),
    "ControlNet LoRA": (lambda make: keys("lora_controlnet", "input_blocks.0.0.down"), {}, "a ControlNet"),
    "IP-Adapter": (lambda make: keys("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), {}, "an IP-Adapter"),
    "no lora_B": (lambda make: without(of_unet(make), "lora_B"), {}, r"incomplete: unet\S+ lacks up \(lora_B\)"),
    "no lora_A": (lambda make: without(of_unet(make), "lora_A"), {}, r"incomplete: unet\S+ lacks down \(lora_A\)"),
    "alpha alone": (
        lambda make: without(without(make.kohya("lora_unet_", "unet", ("to_q",)), "lora_up"), "lora_down"),
        {}, r"lacks down \(lora_A\) and up"),
    "some alphas": (
        lambda make: without(make.kohya("lora_unet_", "unet", ATTENTION), "alpha"), {}, "alpha of each layer or of no"),
    "two strengths": (lambda make: make.kohya("lora_unet_", "unet", ATTENTION), OF_UNET, "its strength once"),
    "two alphas": (lambda make: beside(make, alpha=torch.ones(2)), {}, "alpha of .* as one number"),
    "twice": (
        lambda make: {**of_unet(make), **renamed(of_unet(make), ("A.weight", "A.default.weight"))}, {}, "got two"),
    "a strange layer": (
        lambda make: {**of_unet(make), **keys(f"{STRANGE}.lora_A.weight", f"{STRANGE}.lora_B.weight")},
        {}, "lacks layers for unet.down_blocks.7"),
    "a strange tensor": (
        lambda make: {**of_unet(make), **keys("something.else")}, {}, "lacks layers for something.else"),
    "NaN": (lambda make: changed(of_unet(make), "lora_B", lambda t: t * float("nan")), {}, "must hold finite"),
    "infinity": (lambda make: changed(of_unet(make), "lora_A", lambda t: t / 0), {}, "must hold finite"),
    "NaN alpha": (
        lambda make: changed(make.kohya("lora_unet_", "unet", ATTENTION), "alpha", lambda t: t * float("nan")),
        {}, "must hold finite"),
    "whole numbers": (lambda make: changed(of_unet(make), "lora_A", lambda t: t.to(torch.int8)), {}, "floating-point"),
    "huge": (lambda make: {name: value * 1e30 for name, value in of_unet(make).items()}, {}, "infinite"),
    "another width": (
        lambda make: changed(of_unet(make), "lora_A", lambda t: torch.ones(4, 48)), {}, "for a weight of 32 x 32"),
    "SDXL's width": (
        lambda make: changed(of_unet(make), "attn2.to_k.lora_A", lambda t: torch.ones(4, 2048)), {}, "it is for SDXL"),
    "ranks that differ": (
        lambda make: changed(of_unet(make), "lora_B", lambda t: torch.ones(32, 5)), {}, "for a weight of 32 x 32"),
    "another rank": (of_unet, {**OF_UNET, "unet.r": 8}, "must have rank 8 in .*, got 4"),
    "no number": (of_unet, {**OF_UNET, "unet.lora_alpha": "much"}, "lora_alpha must be a number"),
    "no pattern": (of_unet, {**OF_UNET, "unet.alpha_pattern": {"to_q(": 1}}, "regular expressions"),
    "a bias without one": (
        lambda make: {**of_unet(make), f"{UNET}.lora_B.bias": torch.ones(32)}, {}, "a bias for unet"),
    "a checkpoint": (
        lambda make: keys("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"),
        {}, "a whole checkpoint"),
    "a UNet": (lambda make: make_plain(make.unet), {}, "a UNet"),
    "a VAE": (lambda make: keys("encoder.conv_in.weight", "decoder.conv_in.weight"), {}, "a VAE"),
    "a text encoder": (lambda make: keys("text_model.embeddings.token_embedding.weight"), {}, "a text encoder"),
    "a textual inversion": (lambda make: keys("<my-cat>", shape=(768,)), {}, "a textual inversion"),
    "one of a plain word": (lambda make: keys("sks", shape=(2, 768)), {}, "a textual inversion"),
    "one of A1111": (lambda make: keys("emb_params", shape=(2, 768)), {}, "a textual inversion"),
    "anything": (lambda make: keys("layer.weight", "layer.bias"), {}, "must hold a LoRA, got layer.bias, layer.weight"),
    "nothing": (lambda make: {}, {}, "got no tensor"),
}  # fmt: skip


def make_plain(modules):
    return {f"{name}.weight": module.weight.detach().clone() for name, module in modules.items()}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_merged_is_one_sentence_with_a_way_out(plain, name, tmp_path):
    make, notes, words = REFUSED[name]
    path = write(tmp_path / "adapter.safetensors", make(Maker(plain)), notes)
    with pytest.raises(CheckpointError, match=words) as refused:
        merged(plain, path)
    said = str(refused.value).replace(str(path), "FILE")
    assert said.startswith("FILE ") and said.endswith(".") and len(said) < 500, said
    assert any(f"{verb} " in said for verb in ("Take", "take", "Save", "Merge", "Give", "Remove", "Convert")), said


def test_files_that_are_none(plain, tmp_path):
    good = write(tmp_path / "good.safetensors", of_unet(Maker(plain)))
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "half.safetensors").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "no.bin").write_bytes(b"\x80")
    for name, words in {
        "empty.safetensors": "is empty",
        "half.safetensors": "cannot be read",
        "lfs.safetensors": "a Git LFS pointer",
        "no.bin": "must be a .safetensors file",
        "someone/style": "does not exist",
        ".": "got a folder",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            merged(plain, tmp_path / name)
    broken = write(tmp_path / "notes.safetensors", of_unet(Maker(plain)), None, **{METADATA: "{"})
    with pytest.raises(CheckpointError, match=r"lora_adapter_metadata of .* cannot be read"):
        merged(plain, broken)
    named = write(tmp_path / "named.safetensors", keys(f"{STRANGE}.lora_A.weight"), None, ss_base_model_version="sd_v2")
    with pytest.raises(CheckpointError, match=r"is an adapter for Stable Diffusion 2.x and does not fit"):
        merged(plain, named)


def test_no_two_layers_share_a_spelling(plain):
    layers = [f"unet.{name}" for name, module in plain[0].unet.named_modules() if hasattr(module, "weight")]
    homes = addresses(dict.fromkeys(layers))
    assert all(homes[f"lora_unet_{layer[5:].replace('.', '_')}"] == layer == homes[layer] for layer in layers)
