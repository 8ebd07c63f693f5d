"""Reads a LoRA file, ours or another program's: finds each tensor's layer and each update's strength. Needs no PyTorch.

    adapter = read({"unet.conv_in.weight": (64, 4, 3, 3), ...}, Path("style.safetensors"))
    adapter.updates["unet.conv_in"].factor     # alpha / rank

`hd-export --lora` and `hd-run --lora` share it. A table made from the model's own layers holds their names in the
spellings of kohya's sd-scripts, diffusers (three generations), peft, and Stable Diffusion's first code. A file with an
unknown key is refused, by its kind if that is known: the reader never drops a tensor.

The strength follows peft's LoraConfig: alpha / rank, or alpha / sqrt(rank) with `use_rslora` (Kalajdzievski 2023).
alpha is beside the layer (kohya), in the file's metadata (diffusers), or in `adapter_config.json` beside it (peft). A
missing alpha equals the rank.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypedDict

import numpy as np
from msgspec import Meta

from .adapter_kinds import BASE, INIT, KINDS, MERGE, NAMED
from .errors import CheckpointError
from .schema import TRUTH, MisfitError, fit, listed, parse_json, read_json, shown, whole
from .tensors import TensorFile

METADATA = "lora_adapter_metadata"  # diffusers' key for LoraConfig, each entry prefixed by its part: "unet.lora_alpha"
PEFT_CONFIG = "adapter_config.json"  # peft's file for LoraConfig, beside the weights
WHOLE = (
    "location.",
    "rotation.",
    "vertices.",
    "place",
    "side",
    "person",
    "null",
)  # the Text+Hand encoder's own tensors for hands
OWN = (
    *(f"text_hand_encoder.{name}" for name in WHOLE),
    "position_kernel.",
)  # our adapters train these as whole tensors
LFS = b"version https://git-lfs"

# One tensor's key: a layer, and the tensor's role in that layer's update.
_KEY = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?P<new>A|B|down|up)(?:\.default)?\.(?P<what>weight|bias)"  # peft, kohya
    r"|(?:\.lora|\.lora_linear_layer|_lora)\.(?P<old>down|up)\.weight"  # diffusers
    r"|\.(?P<alpha>alpha))"
)
_SLOTS = {"A": "down", "B": "up", "down": "down", "up": "up"}

WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}  # of cross-attention's input

MAX_SCALE = 10
Shapes = Mapping[str, Sequence[int]]  # of a model's parameters, by name

Number = Annotated[float, Meta(ge=-1e6, le=1e6, description="a number")]
Rank = Annotated[int, whole(1, 65_536)]
Pattern = Annotated[str, Meta(max_length=300)]


class Strength(TypedDict, total=False):
    """The entries of LoraConfig that decide an update's strength."""

    r: Rank
    lora_alpha: Number
    use_rslora: Annotated[bool, TRUTH]
    rank_pattern: Annotated[dict[Pattern, Rank], Meta(max_length=10_000, description="ranks by layer")]
    alpha_pattern: Annotated[dict[Pattern, Number], Meta(max_length=10_000, description="alphas by layer")]


DEFAULTS = Strength(lora_alpha=8)  # of LoraConfig
# Entries of LoraConfig that do not change a finished update: how it was trained, or where. The reader checks tensors
# that an entry adds (biases) by themselves.
NO_SAY = {
    *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "kasa_config", "layers_pattern", "layers_to_transform"),
    *("loftq_config", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core"),
    *("monteclora_config", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules"),
    *("task_type", "velora_config"),
}
MOVES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the weights under an adapter


@dataclass
class Update:
    """Adds factor * up @ down to a layer's weight, and factor * bias to its bias."""

    part: str  # by the file: unet, text_encoder, text_hand_encoder, or "" if it names no part
    parts: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # down [r, in, ...], up [out, r, ...], alpha [], bias [out]
    factor: float = 1.0
    stated: bool = False  # whether the file states its strength

    @property
    def rank(self) -> int:
        return len(self.parts["down"])

    def delta(self) -> np.ndarray:
        """[out, in, ...] in float32, of a linear layer or a convolution."""
        down, up = (self.parts[name].astype(np.float32) for name in ("down", "up"))
        return (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(len(up), *down.shape[1:])


@dataclass
class Adapter:
    """A file's content: updates by the layer of our modules, and whole tensors by name."""

    updates: dict[str, Update]
    whole: dict[str, np.ndarray]

    def changes(self, scale: float) -> dict[str, Change]:
        """What each parameter that it changes becomes, by name."""
        found: dict[str, Change] = {}
        for layer, update in self.updates.items():
            found[f"{layer}.weight"] = Added(update.delta, scale * update.factor)
            if (bias := update.parts.get("bias")) is not None:
                found[f"{layer}.bias"] = Added(partial(np.asarray, bias, np.float32), scale * update.factor)
        return found | {name: Drawn(value, scale) for name, value in self.whole.items()}


@dataclass
class Added:
    """weight + strength * delta. The delta of a large layer is computed when it is needed."""

    delta: Callable[[], np.ndarray]
    strength: float

    def __call__(self, weight: np.ndarray, shape: Sequence[int], form: Form = lambda value: value) -> np.ndarray:
        """The new weight, float32. shape: of the parameter. form: a linear map that makes the weight's shape of it."""
        with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for infinity
            delta = self.delta().reshape(shape)
            return np.asarray(weight + form(np.float32(self.strength) * delta), np.float32)


@dataclass
class Drawn:
    """The weight, drawn towards another value by a scale: the value itself with a scale of 1."""

    value: np.ndarray
    scale: float

    def __call__(self, weight: np.ndarray, shape: Sequence[int], form: Form = lambda value: value) -> np.ndarray:
        """See `Added`."""
        value = form(self.value.astype(np.float32).reshape(shape))
        return value if self.scale == 1 else np.asarray(weight + np.float32(self.scale) * (value - weight), np.float32)


Change = Added | Drawn
Form = Callable[[np.ndarray], np.ndarray]


def split(said: str) -> tuple[Path, float]:
    """A file and its scale: "style.safetensors:0.8" -> (path, 0.8). Raises CheckpointError for another scale."""
    path, colon, number = said.rpartition(":")
    try:
        found = (Path(path), float(number)) if colon and path else (Path(said), 1.0)
    except ValueError:  # the colon is the path's own
        found = (Path(said), 1.0)
    if not -MAX_SCALE <= found[1] <= MAX_SCALE:
        raise CheckpointError(
            f"The scale of an adapter must be from -{MAX_SCALE} to {MAX_SCALE}, got {said!r}. Most often it is 0.5 to "
            "1."
        )
    return found


def read(shapes: Shapes, path: Path) -> Adapter:
    """Reads an adapter for a model with parameters of these names and shapes: "unet.conv_in.weight".

    Raises CheckpointError for a file that is missing, damaged, incomplete, not an adapter, of a kind that we do not
    merge, for another network, or that holds NaN or infinity.
    """
    layers = layers_of(shapes)
    tensors, header = _open(path, layers)
    homes = addresses(layers)
    updates: dict[str, Update] = {}
    kept: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            kept[key] = value
            continue
        address = _address(found["layer"])
        slot = found["alpha"] or ("bias" if found["what"] == "bias" else _SLOTS[found["new"] or found["old"]])
        update = updates.setdefault(homes[address], Update(_part(address)))
        if slot in update.parts:
            raise CheckpointError(
                f"{path} must have {slot} of {homes[address]} once, got two. Save each adapter in a file of its own."
            )
        update.parts[slot] = value
    broken = [key for key, value in tensors.items() if not _is_sound(key, value)]
    if broken:
        raise CheckpointError(
            f"{path} must hold finite floating-point numbers, got others in {listed(broken)}. Take an earlier adapter, "
            "before its training diverged."
        )
    for layer, update in updates.items():
        _check(path, layer, update, shapes)
    _set_factors(path, updates, header)
    for name, value in kept.items():
        if tuple(shapes.get(name, ())) != value.shape:
            raise CheckpointError(
                f"{path} does not fit this model: it lacks {name} or has it in another shape. Take the model of the "
                "adapter's training."
            )
    return Adapter(updates, kept)


def summary(path: Path, adapter: Adapter, scale: float) -> str:
    """What an adapter changes, in words."""
    counts = Counter(layer.partition(".")[0] for layer in adapter.updates)
    found = [f"{count} layers of {part}" for part, count in sorted(counts.items(), reverse=True)]
    if adapter.whole:
        found.append(f"{len(adapter.whole)} whole tensors")
    silent = adapter.updates and not all(update.stated for update in adapter.updates.values())
    strength = " Its file lacks alpha, so alpha is the rank, as in diffusers." if silent else ""
    return f"Merged {path.name} at {scale:g}: {', '.join(found)}.{strength}"


def diverged(path: Path, name: str) -> CheckpointError:
    """The error where a merge makes a parameter infinite."""
    return CheckpointError(
        f"{path} makes {name.rpartition('.')[0]} infinite. Take an earlier adapter, before its training diverged."
    )


def _is_sound(key: str, value: np.ndarray) -> bool:
    """Whether a tensor holds finite floating-point numbers; an alpha may be an integer."""
    return (value.dtype.kind == "f" or key.endswith(".alpha")) and bool(np.isfinite(value).all())


def layers_of(shapes: Shapes) -> list[str]:
    """The layers that an adapter may update: linear ones and convolutions."""
    return [name.removesuffix(".weight") for name in shapes if name.endswith(".weight") and len(shapes[name]) > 1]


def addresses(layers: Sequence[str]) -> dict[str, str]:
    """Every spelling of a layer's name that files use -> the layer."""
    homes: dict[str, str] = {}
    depth = sum(bool(re.fullmatch(r"unet\.down_blocks\.0\.resnets\.\d+\.conv1", name)) for name in layers)
    for layer in layers:
        part, _, name = layer.partition(".")
        spellings = [layer]
        if part == "unet":
            spellings += [layer, name, f"lora_unet_{name.replace('.', '_')}"]
            spellings += [spelling.removesuffix(".0") for spelling in spellings[:2] if spelling.endswith(".to_out.0")]
            spellings.append(f"lora_unet_{_first_name(name, depth, layers).replace('.', '_')}")
        elif name.startswith("layers."):
            for clip in (f"text_model.encoder.{name}", f"encoder.{name}"):
                old = re.sub(r"\b([qkv]|out)_proj$", r"to_\1", clip)
                spellings += [clip, f"text_encoder.{clip}", f"text_encoder.{old}"]
                spellings += [f"lora_te{number}_{clip.replace('.', '_')}" for number in ("", "1")]
        homes.update(dict.fromkeys(spellings, layer))
    return homes


def _first_name(name: str, depth: int, layers: Iterable[str]) -> str:
    """The name in Stable Diffusion's first code of a layer of diffusers' UNet. depth: ResNets in a block."""

    def place(found: re.Match[str]) -> str:
        side, block, kind, number = found[1], int(found[2] or 0), found[3], int(found[4])
        if side == "mid":
            return f"middle_block.{1 if kind == 'attentions' else 2 * number}"
        if side == "down":
            first = f"input_blocks.{1 + block * (depth + 1) + (depth if kind == 'downsamplers' else number)}"
        else:
            first = f"output_blocks.{block * (depth + 1) + (depth if kind == 'upsamplers' else number)}"
        attends = any(layer.startswith(f"unet.up_blocks.{block}.attentions.") for layer in layers)
        second = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2 if attends else 1}[kind]
        return f"{first}.{second}"

    name = re.sub(r"^(down|mid|up)_block(?:s\.(\d+))?\.(\w+)\.(\d+)", place, name)
    for new, old in {
        "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", ".conv1": ".in_layers.2", ".conv2": ".out_layers.3",
        ".time_emb_proj": ".emb_layers.1", ".conv_shortcut": ".skip_connection",
    }.items():  # fmt: skip
        name = re.sub(rf"{re.escape(new)}$", old, name)
    return re.sub(r"^(input_blocks\.\d+\.0)\.conv$", r"\1.op", name)


def _open(path: Path, layers: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file and its header. It checks that every key has a place before it reads a tensor."""
    if path.is_dir():
        raise CheckpointError(
            f"{path} must be a file, got a folder. Name the .safetensors file in it that holds the adapter."
        )
    if not path.exists():
        raise CheckpointError(
            f"The adapter {path} does not exist. Give the path of a file; the command does not download."
        )
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} must be a .safetensors file: others can run code when opened.")
    try:
        file = TensorFile(path)
        names = list(file.shapes)
        if not names:
            raise CheckpointError(f"{path} must hold an adapter, got no tensor. Save or download it again.")
        homes = addresses(layers)
        unknown = [name for name in names if not name.startswith(OWN) or _KEY.fullmatch(name)]
        unknown = [n for n in unknown if not (m := _KEY.fullmatch(n)) or _address(m["layer"]) not in homes]
        if unknown:
            _refuse(path, unknown, file.shapes, file.metadata)
        return {name: file.read(name) for name in names}, file.metadata
    except (MisfitError, OSError, MemoryError) as error:
        content = b"?"
        with contextlib.suppress(OSError), open(path, "rb") as start:
            content = start.read(len(LFS))
        if content == LFS:
            raise CheckpointError(
                f"{path} is a Git LFS pointer: fetch the file itself. Run there: git lfs pull"
            ) from None
        why = (getattr(error, "strerror", None) or str(error) or "memory ran out").rstrip(".")
        what = "is empty" if not content else f"cannot be read: {why}"
        raise CheckpointError(f"The adapter {path} {what}. Save or download it again.") from None


def _refuse(path: Path, unknown: list[str], shapes: Shapes, header: Mapping[str, str]) -> NoReturn:
    """Raises CheckpointError that names the kind of a file with unknown keys."""
    for pattern, kind, advice in KINDS:
        if any(pattern.search(name) for name in unknown):
            raise CheckpointError(f"{path} must be a LoRA, got {kind}. {advice}")
    if not any(_KEY.fullmatch(name) for name in shapes):
        if len(shapes) == 1 and "." not in unknown[0]:  # its one key is the word
            raise CheckpointError(
                f"{path} is a textual inversion, which is not merged here. Give it to hd-train init --embedding."
            )
        raise CheckpointError(f"{path} must hold a LoRA, got {listed(unknown)}. {INIT}")
    kind = _named(header)
    raise CheckpointError(
        f"{path} {f'is {kind} and ' if kind else ''}does not fit this model, which lacks layers for "
        f"{listed(unknown)}. {BASE}"
    )


def _named(header: Mapping[str, str]) -> str:
    """The kind of adapter by the file's header; "" if the header names no known model."""
    said = f"{header.get('ss_base_model_version', '')} {header.get('modelspec.architecture', '')}".lower()
    return next((kind for word, kind in NAMED.items() if re.search(word, said)), "")


def _address(layer: str) -> str:
    """A layer's name without the names of wrappers."""
    return layer.replace("base_model.model.", "").replace(".processor", "")


def _part(address: str) -> str:
    """The part that a file names in a layer's address."""
    found = re.match(r"(unet|text_encoder|text_hand_encoder)\.|lora_(unet|te)1?_", address)
    return "" if not found else found[1] or {"unet": "unet", "te": "text_encoder"}[found[2]]


def _check(path: Path, layer: str, update: Update, shapes: Shapes) -> None:
    """Raises CheckpointError where an update is incomplete, or not for a layer of this shape."""
    parts, weight = update.parts, shapes[f"{layer}.weight"]
    lacking = [name for name in ("down (lora_A)", "up (lora_B)") if name.split()[0] not in parts]
    if lacking:
        raise CheckpointError(
            f"{path} is incomplete: {layer} lacks {' and '.join(lacking)}. Save or download it again."
        )
    down, up = parts["down"], parts["up"]
    alpha, bias = parts.get("alpha"), parts.get("bias")
    if alpha is not None and alpha.size != 1:
        raise CheckpointError(
            f"{path} must give alpha of {layer} as one number, got shape {list(alpha.shape)}. Save it again."
        )
    fits = down.ndim >= 2 and up.ndim >= 2 and 0 < len(down) == up.shape[1] and math.prod(up.shape[2:]) == 1
    if fits and (len(up), *_short(down.shape[1:])) == (weight[0], *_short(weight[1:])):
        if bias is None:
            return
        if tuple(shapes.get(f"{layer}.bias", ())) == bias.shape:
            return
        raise CheckpointError(
            f"{path} does not fit this model: it has a bias for {layer}, which lacks one or has another size. "
            "Take an adapter trained without lora_bias."
        )
    reads = layer.endswith(("attn2.to_k", "attn2.to_v")) and down.ndim >= 2 and down.shape[1] != weight[1]
    theirs, ours = (WIDTHS.get(width[1], "") for width in (down.shape, weight)) if reads else ("", "")
    raise CheckpointError(
        f"{path} does not fit this model: {f'it is for {theirs}, ' if theirs else ''}its {layer} is of "
        f"{' x '.join(map(str, up.shape))} and {' x '.join(map(str, down.shape))} for a weight of "
        f"{' x '.join(map(str, weight))}. Take an adapter for {ours or 'the same model'}."
    )


def _short(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without ones at its end: a convolution of one pixel is a linear layer."""
    out = tuple(shape)
    while len(out) > 1 and out[-1] == 1:
        out = out[:-1]
    return out


def _set_factors(path: Path, updates: Mapping[str, Update], header: Mapping[str, str]) -> None:
    """Sets each update's strength, by the rules of diffusers and peft."""
    said = _config(path, header)
    for part in dict.fromkeys(update.part for update in updates.values()):
        own = {layer: update for layer, update in updates.items() if update.part == part}
        config = {key[len(part) + 1 :]: value for key, value in said.items() if part and key.startswith(f"{part}.")}
        config = config or {key: value for key, value in said.items() if "." not in key}
        without = [layer for layer, update in own.items() if "alpha" not in update.parts]
        if without and len(without) < len(own):
            raise CheckpointError(
                f"{path} must give alpha of each layer or of no layer, but lacks {listed(without)}. Programs differ on "
                "these. Save it again."
            )
        if not without and config:
            raise CheckpointError(f"{path} must give its strength once, got alpha and {METADATA}. Remove one of them.")
        strength = _strength(path, config)
        for layer, update in own.items():
            update.stated = not without or strength is not None
            if not without:
                update.factor = float(update.parts["alpha"].reshape(())) / update.rank
            elif strength is not None:
                update.factor = _factor(path, layer, update, strength)


def _config(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """LoraConfig's entries, from the file's metadata or, as peft saves them, from a file beside it."""
    where = f"The {METADATA} of {path}"
    try:
        value: Any = {}
        if METADATA in header:
            value = parse_json(header[METADATA].encode())
        elif path.name == "adapter_model.safetensors" and (path.parent / PEFT_CONFIG).is_file():
            where = str(path.parent / PEFT_CONFIG)
            value = read_json(path.parent / PEFT_CONFIG)
        return fit(value if value is not None else {}, dict[str, Any])
    except (MisfitError, OSError) as error:
        raise CheckpointError(f"{where} cannot be read: {error} Save the adapter again.") from None


def _strength(path: Path, config: dict[str, Any]) -> Strength | None:
    """An update's strength; None for an empty config. Raises CheckpointError for a kind that we do not merge."""
    if not config:
        return None
    kind = config.pop("peft_type", None) or "LORA"
    start = config.pop("init_lora_weights", None)
    rest = {key: value for key, value in config.items() if key not in NO_SAY and key not in Strength.__annotations__}
    other = [key for key, value in rest.items() if value]
    if config.get("use_dora"):
        raise CheckpointError(f"{path} must be a LoRA, got a DoRA adapter. {MERGE}")
    if str(kind).upper() not in ("LORA", "PEFTTYPE.LORA"):
        raise CheckpointError(f"{path} must be a LoRA, got an adapter of the kind {shown(kind)}. {MERGE}")
    if isinstance(start, str) and start.lower().startswith(MOVES):
        raise CheckpointError(
            f"{path} must be a plain LoRA, got {shown(start)}, which also changes the weights under it. Convert it "
            "with peft (path_initial_model_for_weight_conversion) and save it again."
        )
    if other:
        raise CheckpointError(f"{path} must be a plain LoRA, got one with {listed(other)}. {MERGE}")
    try:
        said = {key: value for key, value in config.items() if key in Strength.__annotations__ and value is not None}
        return fit({**DEFAULTS, **said}, Strength)
    except MisfitError as error:
        raise CheckpointError(f"{path} does not state its strength: {error} Save the adapter again.") from None


def _factor(path: Path, layer: str, update: Update, strength: Strength) -> float:
    """alpha / rank, or with rsLoRA alpha / sqrt(rank)."""
    name = layer.partition(".")[2]
    names = [name] if layer.startswith("unet.") else [name, f"encoder.{name}", f"text_model.encoder.{name}"]

    def matched(patterns: Mapping[str, float], otherwise: float | None) -> float | None:
        for pattern, value in patterns.items():  # as peft's get_pattern_key matches
            try:
                if any(re.match(rf"(.*\.)?({pattern})$", one) for one in names):
                    return value
            except re.error:
                raise CheckpointError(
                    f"{path} must name layers by regular expressions, got {shown(pattern)}. Save it again."
                ) from None
        return otherwise

    rank = matched(strength.get("rank_pattern", {}), strength.get("r"))
    if rank is not None and rank != update.rank:
        raise CheckpointError(
            f"{path} must have rank {rank:g} in {layer}, as in its metadata, got {update.rank}. Save the adapter again."
        )
    alpha = matched(strength.get("alpha_pattern", {}), strength["lora_alpha"])
    assert alpha is not None
    return alpha / (math.sqrt(update.rank) if strength.get("use_rslora") else update.rank)
