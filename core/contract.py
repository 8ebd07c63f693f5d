"""The contract between the rooms: what a bundle holds, and what every graph takes and gives.

Export writes it, engines check tensors against it, and the runtime reads it. It imports neither torch nor ONNX.

A bundle is a folder: `manifest.json`, one ONNX graph for each stage, `tokenizer.json`. The manifest has every file's
SHA-256, so a check finds a flipped byte before anything runs.

Axes: B rows of a batch, S steps of a schedule, K history tensors of a step graph, P hand parameters, D text width,
N points, L tokens of the context, W width of the context, T width of a time row, V mesh vertices, C h w latent channels
and size, H W image size. A branch axis of 2 is always (unconditional, conditional); a hand axis of 2 is always (left,
right).

text_encoder       input_ids[B,77]                                          -> text[B,77,D]
hand_prior         x[B,P] history[B,K,P] noise[B,P] text[B,2,77,D] row[B,R] -> x, history, finite[B]
hand_features      x[B,P] span[B] -> joints[B,2,21,2] rotations[B,2,16,6] bps[B,2,N] visibility[B,2]
                              vertices[B,V,3] joints_3d[B,62,3] camera[B,3]
text_hand_encoder  input_ids[B,2,77] attention_mask joints rotations bps visibility
                                                                            -> context[B,2,L,W]
unet_context       context[B,2,L,W]                                         -> key_00 value_00 key_01 ...
unet_time          timesteps[S]                                             -> time[S,T]
unet               latents[B,C,h,w] history[B,K,C,h,w] noise time[B,T] row[B,R] key_00 value_00 ...
                                                                            -> latents, history, finite[B]
image_decoder      latents[B,C,h,w]                                         -> image[B,H,W,3] uint8, finite[B]
image_encoder      image[B,H,W,3] uint8                                     -> latents[B,C,h,w], finite[B]

`image_encoder` is optional: a bundle without it refuses requests that bring a picture. Its latents are the mean of the
VAE's posterior, shifted and scaled: the decoder's inverse. A UNet that was trained for inpainting has two more inputs,
mask[B,1,h,w] (1 where it paints) and masked_latents[B,C,h,w] (of the picture, grey where it paints).

A bundle has one size of its own, in which it was trained. `hand_features` reads `span`: how many times as wide as that
the picture is at the same height. `joints` are image coordinates in [0, 1] of the own size's width and height, y down,
so a wider picture sees more at the sides. In older bundles h, w, H and W are numbers, and `span` is missing.

`text_hand_encoder` reads one chunk of a prompt, 77 tokens. The runtime appends the states of further chunks to its
context, so `unet_context` and `unet` take any L. `attention_mask[B,2,77]` (int64) is 0 for tokens that no other token
reads: prompts with weights below 1 need it. In older bundles L is a number, and the mask is missing.

A bundle knows `num_people` people. With one, P is 330, and its hands are (left, right). With more, P is 330 for each;
a hand axis has two for each person, who stand from left to right; vertices, joints_3d and camera have an axis of people
behind B.

`x` is normalised with the manifest's mean and standard deviation. `text` holds a vector for each word of a prompt, for
the hand prior; from the end token on, the vectors are the sentence's. Older bundles have the sentence's vector alone:
text[B,D] and text[B,2,D]. `finite` is 1 for rows without NaN or infinity, else 0, so that a loop on a device can check
its rows. A graph names only the inputs that it uses: a configuration without a hand cue lacks that input.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from msgspec import Meta

from .errors import BundleError
from .files import written
from .schema import MisfitError, Sha256, Word, fit, read_json
from .settings import MAX_SIDE as MAX_SIDE
from .settings import Defaults

BUNDLE_FORMAT = 3  # 2: pictures of any size; 3: several people, and written for such bundles alone
MANIFEST = "manifest.json"
_AGAIN = "Export the bundle again with hd-export, or copy it again."
TOKENIZER = "tokenizer.json"
WEIGHTS = "weights.json"  # where parameters are in the graphs, see `weights.py`; older bundles lack it

GRAPHS = (
    "text_encoder",
    "hand_prior",
    "hand_features",
    "text_hand_encoder",
    "unet_context",
    "unet_time",
    "unet",
    "image_decoder",
)
IMAGE_ENCODER = "image_encoder"  # the graph that a bundle may lack
ALL_GRAPHS = (*GRAPHS, IMAGE_ENCODER)
PICTURES = ("unet", "image_decoder", IMAGE_ENCODER)  # graphs whose tensors have the sides of a picture

# K, the history tensors of exported step graphs: 4 lets the UNet run every solver (PLMS needs them), 1 the hand prior
# all others.
NUM_HISTORY = {"hand_prior": 1, "unet": 4}

# Columns of a schedule row (float32): one row is one step of one request.
#   u, c = network(scale * x, timestep);  m = u + guidance * (c - u)
#   x'   = a x + b m + h1 + d noise
#   h_k' = p_k x + q_k m + h_(k+1),  k = 1 ... K  (h_(K+1) = 0)
ROW_HEAD = ("timestep", "scale", "guidance", "a", "b", "d")


def row_columns(num_history: int) -> tuple[str, ...]:
    """Names of a row's columns for a step graph with `num_history` history tensors: 6 + 2 K of them."""
    return ROW_HEAD + tuple(f"{name}{k}" for k in range(1, num_history + 1) for name in ("p", "q"))


# The free axis of inputs with an entry for each guidance branch. Its size is 2 (unconditional, conditional), or 1 (the
# conditional branch alone): half the work, and enough for rows with guidance 1.
BRANCHES = "G"
# The free axes of pictures: height and width of latents, then of images in pixels.
SIDES = ("h", "w", "H", "W")
Size = tuple[int, int]  # height and width of a picture in pixels
# The free axis of tensors with an entry for each token of the context.
CONTEXT = "L"
MAX_CHUNKS = 16  # of a prompt; each has at most 75 tokens of it
FLOAT32_GRAPHS = ("hand_features",)  # kinematics are float32 whatever a bundle's precision
EIGHT_BITS = ("fp8", "int8")  # precisions of eight bits: explicit quantisation in graphs of float16 or float32
EXTERNAL = 1 << 26  # bytes: larger weights go into a file beside the graph, which can be mapped
MAX_ROWS = 4096  # rows of a batch that any compiled graph allows

# The hand parameters, P = 330: rot6d of 52 joints, 10 betas, and per hand where it is in the image:
# presence (about 0 or 1), centre x and y in [-1, 1] of the image (y up), log of the size. Centre and size are the
# mean and the root mean square radius of the hand's 21 joints, in units of half the image's height.
NUM_JOINTS = 52
ROTATIONS = slice(0, 6 * NUM_JOINTS)
BETAS = slice(312, 322)
PLACEMENT = slice(322, 330)  # (presence, x, y, log size) of the left hand, then of the right
NUM_PARAMS = 330
# Left, right: each hand's 21 of the 62 `joints_3d`. The wrist comes first, then thumb, index, middle, ring and little
# finger, each from root to tip. `joints_3d` are SMPL-H's 52 joints, then ten finger tips: five left, thumb first, then
# five right.
HAND_JOINTS = (
    (20, 34, 35, 36, 52, 22, 23, 24, 53, 25, 26, 27, 54, 31, 32, 33, 55, 28, 29, 30, 56),
    (21, 49, 50, 51, 57, 37, 38, 39, 58, 40, 41, 42, 59, 46, 47, 48, 60, 43, 44, 45, 61),
)
MAX_PEOPLE = 8  # of a checkpoint; P people have P * NUM_PARAMS parameters and 2 P hands
MAX_PARAMETER = 1e6  # bound of the parameters' means and standard deviations


_FEW, _MANY = Meta(max_length=8), Meta(max_length=10_000)
_PARAMS = Meta(min_length=NUM_PARAMS, max_length=MAX_PEOPLE * NUM_PARAMS)
Precision = Annotated[str, Meta(pattern=r"^(fp32|fp16|bf16|fp8|int8)\Z", description="fp32, fp16, bf16, fp8 or int8")]
Side = Annotated[int, Meta(ge=1, le=16384)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
FileName = Annotated[str, Meta(pattern=r"^(?!\.)[^/\\\0]{1,200}\Z", description="a plain file name")]


if TYPE_CHECKING:  # all rooms make and read them as plain dicts
    SpecialTokens = dict[str, int]
    Histories = dict[str, int]
    Schedules = dict[str, dict[str, Any]]
else:

    class SpecialTokens(TypedDict):
        """Ids of the tokens that begin, end and fill a row of `length` ids (77)."""

        bos: TokenId
        eos: TokenId
        pad: TokenId
        length: Annotated[int, Meta(ge=3, le=4096)]

    class Histories(TypedDict):
        """K of the step graphs."""

        hand_prior: Annotated[int, Meta(ge=0, le=16)]
        unet: Annotated[int, Meta(ge=0, le=16)]

    class Schedules(TypedDict):
        """Noise schedules of the step graphs, in diffusers' words; see `schedules.NoiseSchedule`."""

        hand_prior: dict[Word, Any]
        unet: dict[Word, Any]


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one input or output. A string in the shape is a free dimension ("B", "G", "S")."""

    name: Word
    # numpy's name, or "bfloat16", which numpy lacks: such a tensor passes from graph to graph on a GPU, and the host
    # never sees it.
    dtype: Annotated[str, Meta(pattern=r"^(float32|float16|bfloat16|int64|uint8)\Z")]
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, lt=2**31)] | Annotated[str, Meta(max_length=20)], ...], _FEW]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass
class GraphSpec:
    """One ONNX graph of a bundle: its file, its tensors, and how far it is from PyTorch."""

    file: FileName
    inputs: Annotated[list[TensorSpec], _MANY]
    outputs: Annotated[list[TensorSpec], _MANY]
    parity: dict[str, Any] = field(default_factory=dict)  # error relative to the largest value, tolerance
    # Bytes of intermediate tensors that are there at once, for a row of a picture of the bundle's own size; 0: unknown.
    memory: Annotated[int, Meta(ge=0, le=1 << 50)] = 0

    def at(self, sizes: Mapping[str, int]) -> GraphSpec:
        """The same graph where these free axes have these sizes."""

        def fixed(tensor: TensorSpec) -> TensorSpec:
            return replace(tensor, shape=tuple(sizes.get(size, size) for size in tensor.shape))  # type: ignore[arg-type]

        return replace(self, inputs=[fixed(t) for t in self.inputs], outputs=[fixed(t) for t in self.outputs])

    @property
    def free(self) -> list[str]:
        """The names of its free axes, sorted."""
        return sorted({size for tensor in self.inputs for size in tensor.shape if isinstance(size, str)})

    @property
    def branched(self) -> frozenset[str]:
        """Inputs that hold one entry per guidance branch and may hold the conditional one alone (see BRANCHES)."""
        return frozenset(tensor.name for tensor in self.inputs if BRANCHES in tensor.shape)

    @property
    def steps(self) -> bool:
        """Whether it is a step graph, which runs again and again with a row of the schedule."""
        return any(tensor.name == "row" for tensor in self.inputs)

    @property
    def dominant(self) -> bool:
        """Whether most of a picture's time goes into it: the UNet, the step graph of the latents."""
        return self.steps and any(tensor.name == "latents" for tensor in self.inputs)


@dataclass
class Manifest:
    """What `manifest.json` says: the annotations are what it may say. `load` checks them and every file's hash."""

    graphs: Annotated[dict[Word, GraphSpec], _MANY]
    files: Annotated[dict[FileName, Sha256], _MANY]  # everything in the bundle but the manifest
    # The networks' precision. With one of EIGHT_BITS, calibration quantised some layers, and the others have the
    # precision `base`. State and kinematics are always float32.
    precision: Precision
    image_size: tuple[Side, Side]  # H, W in pixels
    latent_size: tuple[Side, Side, Side]  # channels, h, w
    num_history: Histories
    schedules: Schedules
    defaults: Defaults
    tokenizer: SpecialTokens
    params_mean: Annotated[list[Annotated[float, Meta(ge=-MAX_PARAMETER, le=MAX_PARAMETER)]], _PARAMS]  # [P]
    params_std: Annotated[list[Annotated[float, Meta(gt=0, le=MAX_PARAMETER)]], _PARAMS]  # [P]
    # All words of the training prompts: a warning names any other word. Empty for models with CLIP, which know all.
    words: Annotated[list[Word], _MANY] = field(default_factory=list)
    made_by: dict[str, Any] = field(default_factory=dict)  # versions, opset, name of the checkpoint, body's origin
    # What the sides of pictures must be multiples of, in pixels; 0: pictures have `image_size`, and no other.
    size_multiple: Annotated[int, Meta(ge=0, le=1024)] = 0
    num_people: Annotated[int, Meta(ge=1, le=MAX_PEOPLE)] = 1  # that a picture shows at most
    format: Annotated[int, Meta(ge=1, le=BUNDLE_FORMAT)] = 2
    sha256: str = ""  # of the manifest itself, all other entries; written by `save`

    def save(self, folder: Path) -> None:
        """Writes `manifest.json` last and atomically: a bundle without it is not a bundle."""
        value = json.loads(json.dumps(asdict(self)))
        if self.num_people == 1:
            del value["num_people"]  # earlier versions know such bundles, and refuse entries that they do not know
        else:
            self.format = value["format"] = BUNDLE_FORMAT
        self.sha256 = value["sha256"] = _own_digest(value)
        text = json.dumps(value, indent=1, ensure_ascii=False)
        with written(folder / MANIFEST) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True, files: bool = True) -> Manifest:
        """Reads a bundle's manifest and, with `verify`, hashes it and, with `files`, every file (about 1 s a GB).

        Raises BundleError when the folder is not a bundle, has a newer format, lacks a file or holds a changed one.
        """
        folder = Path(folder)
        if folder.is_file():
            raise BundleError(_not_a_folder(folder))
        path = folder / MANIFEST
        try:
            value = read_json(path)
        except FileNotFoundError:
            hint = (
                "is a checkpoint, not a bundle. Make a bundle of it first with `hd-export CHECKPOINT OUT`"
                if (folder / "model_index.json").exists()
                else "is not a bundle: it lacks manifest.json. `hd-export CHECKPOINT OUT` makes one"
            )
            if not folder.exists():
                hint = (
                    "does not exist. `hd-export CHECKPOINT OUT` makes a bundle; the word `demo` names the shipped one, "
                    "and hf://ORG/NAME one of the Hugging Face Hub"
                )
            raise BundleError(f"{folder} {hint}.") from None
        except (OSError, MisfitError) as error:
            why = getattr(error, "strerror", None) or error
            raise BundleError(f"{path} cannot be read: {str(why).rstrip('.')}. {_AGAIN}") from error
        newest = value.get("format") if isinstance(value, dict) else None
        if isinstance(newest, int) and BUNDLE_FORMAT < newest < 1000:
            raise BundleError(
                f"The bundle's format must be at most {BUNDLE_FORMAT}, got {newest} in {folder}. "
                "Update handiffuser, or export the checkpoint again with this version."
            )
        try:
            manifest = fit(value, cls)
            unknown = sorted(set(value) - {field.name for field in fields(cls)})
            if unknown or "format" not in value:
                raise MisfitError(f"The entry {unknown[0][:60]!r} is unknown." if unknown else "It lacks 'format'.")
            manifest.check()
        except MisfitError as error:
            raise BundleError(f"{path} is not a bundle's manifest: {error} {_AGAIN}") from error
        if verify:
            if manifest.sha256 != _own_digest(value):
                raise BundleError(f"{path} was changed or damaged: its own SHA-256 differs. {_AGAIN}")
            if files:
                manifest.check_files(folder)
        return manifest

    def check(self) -> None:
        """Raises MisfitError where entries do not fit together."""
        missing = [name for name in GRAPHS if name not in self.graphs]
        if missing:
            raise MisfitError(f"It lacks the graphs {', '.join(missing)}.")
        unhashed = [graph.file for graph in self.graphs.values() if graph.file not in self.files]
        if unhashed:
            raise MisfitError(f"It lacks the hash of {', '.join(unhashed)}.")
        numbers = NUM_PARAMS * self.num_people
        for name in ("params_mean", "params_std"):
            if len(getattr(self, name)) != numbers:
                raise MisfitError(f"{name} must have {numbers} numbers, got {len(getattr(self, name))}.")
        sizes = {"latents": self.latent_size, "image": (*self.image_size, 3)}
        own = self.sides()
        for name, what in (("image_decoder", "decoder"), (IMAGE_ENCODER, "encoder")):
            graph = self.graphs.get(name)
            for tensor in (*graph.inputs, *graph.outputs) if graph is not None else ():
                if tensor.name in sizes and tuple(own.get(n, n) for n in tensor.shape[1:]) != sizes[tensor.name]:  # type: ignore[arg-type]
                    raise MisfitError(
                        f"image_size {self.image_size} and latent_size {self.latent_size} must fit the {what}, which "
                        f"has {tensor}."
                    )

    def latents_at(self, size: Size) -> tuple[int, int, int]:
        """The latents' channels, height and width for a picture of this height and width in pixels."""
        (H, W), (channels, h, w) = self.image_size, self.latent_size
        return channels, size[0] * h // H, size[1] * w // W

    def sides(self, size: Size | None = None) -> dict[str, int]:
        """The sizes of the axes in SIDES for a picture of this height and width; None: the bundle's own. And of CONTEXT
        for a prompt of one chunk."""
        size = size or self.image_size
        context = [tensor.shape[2] for tensor in self.graphs["text_hand_encoder"].outputs if len(tensor.shape) == 4]
        sizes = dict(zip(SIDES, (*self.latents_at(size)[1:], *size), strict=True))
        return sizes | ({CONTEXT: context[0]} if context and isinstance(context[0], int) else {})

    @property
    def any_length(self) -> bool:
        """Whether the graphs read prompts of more than one chunk."""
        return CONTEXT in self.graphs["unet"].free

    def size_at(self, sides: Mapping[str, int]) -> Size:
        """The inverse of `sides`, from the sides of latents or of the image; without them the bundle's own size."""
        if "H" in sides:
            return sides["H"], sides["W"]
        if "h" not in sides:
            return self.image_size
        (H, W), (_, h, w) = self.image_size, self.latent_size
        return sides["h"] * H // h, sides["w"] * W // w

    def nearest(self, size: Size) -> Size:
        """The nearest height and width that the graphs take."""
        return nearest_size(size, self.size_multiple, self.image_size)

    def fixed(self, size: Size | None = None) -> Manifest:
        """The same bundle for pictures of one height and width, by default its own, and prompts of one chunk:
        no graph has a free side."""
        sides = self.sides(size)
        return replace(self, graphs={name: graph.at(sides) for name, graph in self.graphs.items()})

    @property
    def base(self) -> str:
        """The precision of the layers that are not quantised: "fp32" for OpenVINO, "fp16" for TensorRT."""
        return str(self.made_by.get("base", "fp16")) if self.precision in EIGHT_BITS else self.precision

    def files_of(self, graph: str) -> list[str]:
        """The files of a graph: the graph, and its weights where these have their own file."""
        file = self.graphs[graph].file
        return [name for name in (file, f"{file}.data") if name in self.files]

    def check_files(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Raises BundleError for the first file that is missing or differs from its hash. names: checks only these."""
        for problem in self.problems(folder, names):
            raise BundleError(f"{problem} {_AGAIN}")

    def problems(self, folder: Path, names: Iterable[str] | None = None) -> Iterator[str]:
        """Yields a sentence for each file that is missing or differs from its hash. names: checks only these."""
        for name in self.files if names is None else names:
            digest = self.files[name]
            if not (folder / name).is_file():
                yield f"{folder / name} is missing."
            elif file_digest(folder / name) != digest:
                yield f"{folder / name} is damaged: its SHA-256 differs from the manifest's."


def read_size(text: str) -> Size:
    """Height and width of a size as `shown_size` writes it."""
    width, height = map(int, text.split("x"))
    return height, width


def shown_size(size: Size) -> str:
    """Height and width as a request says them: "512x768" for 768 rows of 512 pixels."""
    return f"{size[1]}x{size[0]}"


def nearest_size(size: Size, multiple: int, own: Size) -> Size:
    """The nearest height and width that are multiples of a number of pixels; `own` where that is 0."""
    if not multiple:
        return own
    height, width = (min(max(round(n / multiple), 1), MAX_SIDE // multiple) * multiple for n in size)
    return height, width


def apart(one: Size, other: Size) -> float:
    """How far two sizes are from each other: by the ratios of their sides."""
    return math.hypot(*(math.log(a / b) for a, b in zip(one, other, strict=True)))


def _not_a_folder(file: Path) -> str:
    """The error where the user gave a file as a bundle."""
    if (file.parent / MANIFEST).is_file():
        return f"A bundle must be a folder, got the file {file}. Give the folder it is in: {file.parent}."
    return f"A bundle must be a folder with a manifest.json, got the file {file}. hd-export CHECKPOINT OUT makes one."


def _own_digest(value: dict[str, Any]) -> str:
    """SHA-256 of a manifest's JSON value without its own digest. Its layout on disk does not matter."""
    rest = {key: entry for key, entry in value.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
