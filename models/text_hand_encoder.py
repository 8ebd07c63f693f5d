"""The Text+Hand encoder: a CLIP text transformer over the prompt's tokens and the hands' tokens together.

Sequence: Stable Diffusion's 77 text tokens, then for each hand 21 joint tokens (the sum of the joint's place in the
image and its rotation) and one vertex token (the basis point set). Text attends back only, as in CLIP: its 77 outputs
equal CLIP's for any hands; hand tokens attend to all text and all hand tokens. A learned null token replaces the tokens
of a hand that is absent or off the frame. The paper does not publish its layout; this one is ours.

    encoder = TextHandEncoder.from_clip(CLIPTextModel.from_pretrained(...))
    context = encoder(input_ids, joints=joints, rotations=rotations, bps=bps, visibility=visibility)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from .configs import CUES, ROTATION_FRAMES
from .hand_features import make_basis
from .position_kernel import GATED, HIDDEN, TOKEN_KINDS, code_width, position_code
from .smplh import matrix_to_rotation_6d, rotation_6d_to_matrix

FEATURES = ("joints", "rotations", "bps", "visibility")  # what the encoder reads of the hands, by name
NUM_HAND_JOINTS, NUM_HAND_ROTATIONS = 21, 16
# Which of MANO's 16 rotations belongs to each of the 21 joints; the five tips have none.
ROTATED_JOINTS = (0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19)
ROTATION_OF_JOINT = (0, 13, 14, 15, 1, 2, 3, 4, 5, 6, 10, 11, 12, 7, 8, 9)
PARENT_OF_JOINT = (0, 0, 1, 2, 3, 0, 5, 6, 7, 0, 9, 10, 11, 0, 13, 14, 15, 0, 17, 18, 19)
BPS_SCALE = 10.0  # brings distances of centimetres to the order of one
LOCATION_OCTAVES = 6  # Fourier features of a joint's place, down to 1/32 of the image

# The configuration of a CLIP text model, in transformers' names.
CLIP_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def word_states(hidden: Tensor, input_ids: Tensor, eos_token_id: int, length: int) -> Tensor:
    """A text model's states of a prompt's words [N, length, W], from its outputs [N, L, W] for token ids [N, L].

    The state of the first end-of-text token, CLIP's sentence vector, also replaces all states after it: padding adds
    nothing, no mask is needed, and `[:, -1]` is the sentence.
    length: of the whole prompt, L or more; the ids may end after the last end of a text.
    """
    end = (input_ids == eos_token_id).to(torch.int32).argmax(-1)
    sentence = hidden[torch.arange(hidden.shape[0], device=hidden.device), end]
    ended = torch.arange(length, device=hidden.device) >= end[:, None]
    if hidden.shape[1] < length:
        hidden = F.pad(hidden, (0, 0, 0, length - hidden.shape[1]))
    return torch.where(ended[..., None], sentence[:, None], hidden)


def causal_mask(length: int, free_from: int, device: torch.device) -> Tensor:
    """[1, 1, L, L] booleans, True where a token may attend: back only, but freely from row free_from on."""
    place = torch.arange(length, device=device)
    return ((place[None] <= place[:, None]) | (place[:, None] >= free_from))[None, None]


def take(rows: Tensor, order: Sequence[int]) -> Tensor:
    """[N, H, R, ...] -> [N, H, len(order), ...]: rows of each hand in another order, as one Gather.

    `rows[:, :, order]` exports as GatherND between two Transposes. In half precision, before a matrix product, ONNX
    Runtime 1.32 crashes on that while it loads the graph.
    """
    return rows.index_select(2, torch.tensor(order, device=rows.device))


def camera_rotations(rotations: Tensor) -> Tensor:
    """[N, H, 16, 6] in MANO's order, the wrist in the camera's frame and the rest relative to their parents -> the same
    in the camera's frame: products along each finger."""
    matrices = rotation_6d_to_matrix(rotations)
    wrist, fingers = matrices[:, :, :1], matrices[:, :, 1:].unflatten(2, (5, 3))  # [N, H, 5, 3 joints, 3, 3]
    turns = [wrist]
    for joint in range(3):
        turns.append(turns[-1] @ fingers[:, :, :, joint])
    chain = torch.stack(turns[1:], 3).flatten(2, 3)  # [N, H, 15, 3, 3]
    return matrix_to_rotation_6d(torch.cat([wrist, chain], 2))


def encode_text(clip: CLIPTextModel, input_ids: Tensor) -> Tensor:
    """CLIP's hidden states [B, 77, W], from its own layers with a mask that exports."""
    inner = getattr(clip, "text_model", clip)  # transformers 5 dropped the inner `text_model`
    hidden = inner.embeddings(input_ids=input_ids)
    mask = causal_mask(hidden.shape[1], hidden.shape[1], hidden.device)
    for layer in inner.encoder.layers:
        hidden = layer(hidden, attention_mask=mask)
    return inner.final_layer_norm(hidden)


class TextHandEncoder(ModelMixin, ConfigMixin):
    """CLIP's text transformer over text and hand tokens.

    cues: the hand cues, any subset of ("joints", "rotations", "vertices"); with an empty set this is CLIP.
    frequencies: of the position codes appended to the context for the UNet's positional kernel; empty for the paper's
    plain cross-attention. hide: pixels ignore tokens of absent hands, and those of present ones pass the kernel's gate;
    otherwise pixels attend to learned null tokens of absent hands. joint: hand tokens go through the transformer with
    the text; otherwise they follow its output unchanged. rotation_frame: "parent", each finger joint's rotation
    relative to its parent, as in MANO; or "camera", in the camera's frame: then each token alone gives the turn of its
    bone, without a product of three rotations, and a tip has its bone's rotation. num_people: there are
    H = 2 num_people hands (left and right of the first person, then of the next); a learned vector tells people apart.
    """

    basis: Tensor

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        bos_token_id: int = 49406,
        eos_token_id: int = 49407,
        pad_token_id: int = 49407,
        cues: Sequence[str] = CUES,
        frequencies: Sequence[float] = (1, 2, 4, 8),
        num_basis: int = 512,
        hide: bool = False,
        joint: bool = True,
        rotation_frame: str = "parent",
        num_people: int = 1,
    ) -> None:
        super().__init__()
        if rotation_frame not in ROTATION_FRAMES:
            raise ValueError(f"rotation_frame must be one of {', '.join(ROTATION_FRAMES)}, got {rotation_frame!r}.")
        unknown = set(cues) - set(CUES)
        if unknown:
            raise ValueError(f"cues must be among {', '.join(CUES)}, got {sorted(unknown)}.")
        if hide and not frequencies:
            raise ValueError("frequencies must not be empty with hide: the positional kernel hides the hands.")
        text = CLIPTextModel(CLIPTextConfig(**{key: getattr(self.config, key) for key in CLIP_KEYS}))
        inner = getattr(text, "text_model", text)
        self.embeddings, self.layers, self.final_layer_norm = (
            inner.embeddings,
            inner.encoder.layers,
            inner.final_layer_norm,
        )
        width = hidden_size
        if "joints" in cues:
            self.location = nn.Sequential(
                nn.Linear(4 + 4 * LOCATION_OCTAVES, width), nn.GELU(), nn.Linear(width, width)
            )
        if "rotations" in cues:
            self.rotation = nn.Linear(6, width)
        if "vertices" in cues:
            self.vertices = nn.Sequential(nn.Linear(num_basis, width), nn.GELU(), nn.Linear(width, width))
        self.register_buffer("basis", make_basis(num_basis))  # [2, N, 3], saved with the weights
        if self.tokens_per_hand:
            # New rows start with the spread of CLIP's own embeddings, as its first layers expect.
            spread = self.embeddings.token_embedding.weight.detach().std()
            self.place = nn.Parameter(torch.randn(self.tokens_per_hand, width) * spread)
            self.side = nn.Parameter(torch.randn(2, width) * spread)
            self.null = nn.Parameter(torch.randn(width) * spread)
            if num_people > 1:
                self.person = nn.Parameter(torch.randn(num_people, width) * 0.1 * spread)

    @property
    def joint_tokens(self) -> int:
        return NUM_HAND_JOINTS if {"joints", "rotations"} & set(self.config.cues) else 0

    @property
    def tokens_per_hand(self) -> int:
        return self.joint_tokens + ("vertices" in self.config.cues)

    @property
    def num_hands(self) -> int:
        return 2 * int(self.config.num_people)

    @property
    def num_tokens(self) -> int:
        """L, the length of the context."""
        return self.config.max_position_embeddings + self.num_hands * self.tokens_per_hand

    @property
    def context_width(self) -> int:
        """W, the width of the context: CLIP's width and the position code's."""
        return self.config.hidden_size + code_width(self.config.frequencies)

    @classmethod
    def from_clip(cls, clip: CLIPTextModel, **config: Any) -> TextHandEncoder:
        """Starts from a CLIP text model (that of Stable Diffusion, for example); config: cues, frequencies."""
        encoder = cls(**{key: getattr(clip.config, key) for key in CLIP_KEYS}, **config)
        inner = getattr(clip, "text_model", clip)
        encoder.embeddings.load_state_dict(inner.embeddings.state_dict())
        encoder.layers.load_state_dict(inner.encoder.layers.state_dict())
        encoder.final_layer_norm.load_state_dict(inner.final_layer_norm.state_dict())
        return encoder

    def hand_tokens(
        self, joints: Tensor | None, rotations: Tensor | None, bps: Tensor | None, visibility: Tensor
    ) -> Tensor:
        """The hands' embedded tokens [N, num_hands * tokens_per_hand, W]."""
        batch, width = visibility.shape[0], self.config.hidden_size
        tokens = visibility.new_zeros(batch, self.num_hands, self.joint_tokens, width)
        if "joints" in self.config.cues:
            assert joints is not None
            scaled = (2 * joints - 1).clamp(-3.0, 3.0)  # [N, H, 21, 2]
            octaves = 2.0 ** torch.arange(LOCATION_OCTAVES, device=scaled.device) * (math.pi / 2)
            angle = (scaled[..., None] * octaves).flatten(-2)
            bone = scaled - take(scaled, PARENT_OF_JOINT)
            features = torch.cat([scaled, bone * 4, angle.sin(), angle.cos()], -1)
            tokens = tokens + self.location(features.to(self.place.dtype))
        if "rotations" in self.config.cues:
            assert rotations is not None
            camera = self.config.rotation_frame == "camera"
            if camera:
                rotations = camera_rotations(rotations.float()).to(rotations.dtype)
            turned = self.rotation(take(rotations, ROTATION_OF_JOINT))  # [N, H, 16, W], in the joints' order
            # The five tips lack a rotation of their own: they take a zero row, or their bone's.
            padded = torch.cat([turned, torch.zeros_like(turned[:, :, :1])], 2)
            at = {joint: row for row, joint in enumerate(ROTATED_JOINTS)}
            row = [at.get(j, at[PARENT_OF_JOINT[j]] if camera else 16) for j in range(NUM_HAND_JOINTS)]
            tokens = tokens + take(padded, row)
        if "vertices" in self.config.cues:
            assert bps is not None
            tokens = torch.cat([tokens, self.vertices(bps * BPS_SCALE)[:, :, None]], 2)
        seen = visibility[:, :, None, None] > 0.5
        tokens = torch.where(seen, tokens, self.null.to(tokens.dtype))
        side: Tensor = self.side
        if self.config.num_people > 1:
            side = (side + self.person[:, None]).flatten(0, 1)  # [H, W]
        tokens = tokens + self.place + side[:, None]
        return tokens.flatten(1, 2)

    def position_codes(self, joints: Tensor | None, visibility: Tensor) -> Tensor:
        """[N, L, C]: each token's position code and kind; zero for hidden hands, which switches the kernel off."""
        batch, text, count = visibility.shape[0], self.config.max_position_embeddings, self.num_hands
        channels, located = code_width(self.config.frequencies), 4 * len(self.config.frequencies)
        seen = visibility[:, :, None, None].to(torch.float32)

        def kind(name: str, *shape: int) -> Tensor:
            one = F.one_hot(torch.tensor(located + TOKEN_KINDS.index(name)), channels).to(torch.float32)
            return one.to(visibility.device).expand(*shape, channels)

        parts = []
        if self.joint_tokens:
            if "joints" in self.config.cues:
                assert joints is not None
                frequencies = torch.tensor(self.config.frequencies, dtype=torch.float32, device=visibility.device)
                code = F.pad(position_code(joints.float(), frequencies), (0, channels - located))
            else:
                code = visibility.new_zeros(batch, count, self.joint_tokens, channels)
            parts.append(code * seen)
        if "vertices" in self.config.cues:
            parts.append(kind("vertices", batch, count, 1) * seen)
        codes = kind("text", batch, text)
        if not parts:
            return codes
        hands = torch.cat(parts, 2)
        if self.config.hide:
            channels_of = torch.eye(channels, device=visibility.device)
            hands = hands + seen * channels_of[located + GATED] + (1 - seen) * channels_of[located + HIDDEN]
        return torch.cat([codes, hands.flatten(1, 2)], 1)

    def forward(
        self,
        input_ids: Tensor,
        joints: Tensor | None = None,
        rotations: Tensor | None = None,
        bps: Tensor | None = None,
        visibility: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Encodes prompts and hands.

        input_ids: [N, 77]; joints: [N, H, 21, 2] in [0, 1]; rotations: [N, H, 16, 6]; bps: [N, H, 512] metres;
        visibility: [N, H], 1 for a visible hand (None: without hands, the unconditional case). attention_mask: [N, 77],
        0 for text tokens that no token attends to, as in transformers (None: none); the first is always attended to.
        Returns the context [N, L, W + code].
        """
        batch = input_ids.shape[0]
        if visibility is None:
            dtype, device = self.final_layer_norm.weight.dtype, input_ids.device
            visibility = torch.zeros(batch, self.num_hands, dtype=dtype, device=device)
            joints = torch.zeros(batch, self.num_hands, NUM_HAND_JOINTS, 2, dtype=dtype, device=device)
            rotations = torch.zeros(batch, self.num_hands, NUM_HAND_ROTATIONS, 6, dtype=dtype, device=device)
            bps = torch.zeros(batch, self.num_hands, self.config.num_basis, dtype=dtype, device=device)
        hidden = self.embeddings(input_ids=input_ids)
        if self.tokens_per_hand:
            hands = self.hand_tokens(joints, rotations, bps, visibility).to(hidden.dtype)
            if self.config.joint:
                hidden = torch.cat([hidden, hands], 1)
        mask = causal_mask(hidden.shape[1], self.config.max_position_embeddings, hidden.device)
        if attention_mask is not None:
            # The first token is always attended to, or nothing but NaN would be left of a mask of zeros.
            ones = attention_mask.new_ones(batch, 1 + hidden.shape[1] - attention_mask.shape[1])
            seen = torch.cat([ones[:, :1], attention_mask[:, 1:], ones[:, 1:]], 1)
            mask = mask & (seen > 0)[:, None, None]
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask)
        hidden = self.final_layer_norm(hidden)
        if self.tokens_per_hand and not self.config.joint:
            hidden = torch.cat([hidden, hands], 1)
        if not self.config.frequencies:
            return hidden
        return torch.cat([hidden, self.position_codes(joints, visibility).to(hidden.dtype)], -1)
