"""The Text+Hand encoder: CLIP where it must be CLIP, hands where there are hands."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from handiffuser.contract import BETAS, NUM_PARAMS, ROTATIONS
from handiffuser.models.hand_features import HAND_ROTATIONS, HandFeatures, make_basis
from handiffuser.models.smplh import SMPLH, matrix_to_rotation_6d, rotation_6d_to_matrix
from handiffuser.models.text_hand_encoder import CUES, TextHandEncoder, camera_rotations, encode_text, word_states
from transformers import CLIPTextConfig, CLIPTextModel

EOS = 99


@pytest.fixture(scope="module")
def clip() -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=98,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return CLIPTextModel(config).eval().requires_grad_(False)


@pytest.fixture
def ids() -> torch.Tensor:
    ids = torch.randint(0, 98, (3, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 20:] = EOS
    return ids


def hands(batch: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "joints": torch.rand(batch, 2, 21, 2, generator=generator),
        "rotations": torch.randn(batch, 2, 16, 6, generator=generator),
        "bps": 0.1 * torch.rand(batch, 2, 512, generator=generator),
        "visibility": torch.ones(batch, 2),
    }


def test_text_outputs_are_clips_whatever_the_hands(clip, ids):
    encoder = TextHandEncoder.from_clip(clip).eval()
    wanted = clip(ids).last_hidden_state
    for seed in range(2):
        context = encoder(ids, **hands(seed=seed))
        assert context.shape == (3, 77 + 2 * 22, 48 + 24)
        torch.testing.assert_close(context[:, :77, :48], wanted, atol=2e-6, rtol=1e-5)


def test_a_mask_of_words_is_clips(clip, ids):
    encoder, mask = TextHandEncoder.from_clip(clip).eval(), torch.ones_like(ids)
    mask[0, 2:5], mask[1, 10:70] = 0, 0
    wanted = clip(ids, attention_mask=mask).last_hidden_state
    context = encoder(ids, **hands(), attention_mask=mask)
    torch.testing.assert_close(context[:, :77, :48], wanted, atol=2e-6, rtol=1e-5)
    assert encoder(ids, **hands(), attention_mask=torch.zeros_like(ids)).isfinite().all()


def test_without_hand_cues_it_is_clip(clip, ids):
    encoder = TextHandEncoder.from_clip(clip, cues=[], frequencies=[]).eval()
    torch.testing.assert_close(encoder(ids), clip(ids).last_hidden_state, atol=2e-6, rtol=1e-5)


def test_words_end_with_clips_pooler(clip, ids):
    ids[1, 5:], ids[2, 1:] = EOS, EOS  # a prompt of four words, and an empty one
    out = clip(ids)
    torch.testing.assert_close(encode_text(clip, ids), out.last_hidden_state, atol=2e-6, rtol=1e-5)
    states = word_states(out.last_hidden_state, ids, EOS, 77)
    for row, end in enumerate((20, 5, 1)):
        assert torch.equal(states[row, :end], out.last_hidden_state[row, :end])
        assert torch.equal(states[row, end:], out.pooler_output[row].expand(77 - end, -1))
    cut = clip(ids[:, :21]).last_hidden_state  # text looks back only: what follows the last end need not be read
    torch.testing.assert_close(word_states(cut, ids[:, :21], EOS, 77), states, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("cues", [c for n in range(4) for c in combinations(CUES, n)], ids="+".join)
def test_all_combinations_of_cues(clip, ids, cues):
    encoder = TextHandEncoder.from_clip(clip, cues=list(cues)).eval()
    context = encoder(ids, **hands())
    per_hand = 21 * bool({"joints", "rotations"} & set(cues)) + ("vertices" in cues)
    assert encoder.num_tokens == 77 + 2 * per_hand
    assert context.shape == (3, encoder.num_tokens, encoder.context_width)
    for cue, name in zip(CUES, ("joints", "rotations", "bps"), strict=True):
        changed = hands()
        changed[name] = changed[name] + 0.1
        differs = not torch.equal(encoder(ids, **changed), context)
        assert differs == (cue in cues), f"{name} must matter exactly when its cue is used"


def test_hidden_hand_says_nothing(clip, ids):
    encoder = TextHandEncoder.from_clip(clip).eval()
    one, other = hands(seed=1), hands(seed=2)
    for name in ("joints", "rotations", "bps"):
        other[name][:, 0] = one[name][:, 0]
    one["visibility"] = other["visibility"] = torch.tensor([1.0, 0.0]).expand(3, 2)
    assert torch.equal(encoder(ids, **one), encoder(ids, **other))
    codes = encoder(ids, **one)[..., 48:]
    assert codes[:, 77 + 22 :].abs().max() == 0, "the kernel is off for a hidden hand"
    assert codes[:, 77 : 77 + 21].abs().max() > 0


def test_left_and_right_are_told_apart(clip, ids):
    encoder = TextHandEncoder.from_clip(clip).eval()
    same = hands()
    for name in ("joints", "rotations", "bps"):
        same[name][:, 1] = same[name][:, 0]
    context = encoder(ids, **same)
    assert not torch.allclose(context[:, 77:99, :48], context[:, 99:, :48], atol=1e-3)


def test_rotations_in_the_cameras_frame_are_those_of_the_kinematics(body_path):
    body = SMPLH.load(body_path)
    features = HandFeatures(body, torch.zeros(NUM_PARAMS), torch.ones(NUM_PARAMS), make_basis(64))
    x = torch.randn(3, NUM_PARAMS, generator=torch.Generator().manual_seed(0))
    turns, _, _ = body.kinematics(rotation_6d_to_matrix(x[:, ROTATIONS].reshape(3, 52, 6)), x[:, BETAS])
    wanted = torch.stack([turns[:, list(joints)] for joints in HAND_ROTATIONS], 1)
    torch.testing.assert_close(
        camera_rotations(features(x)["rotations"]), matrix_to_rotation_6d(wanted), atol=2e-6, rtol=0
    )


def test_a_token_in_the_cameras_frame_says_how_its_bone_is_turned(clip, ids):
    """Bending the first joint of a finger turns the whole finger, its tip too; other fingers stay."""
    encoder = TextHandEncoder.from_clip(clip, cues=["rotations"], frequencies=[], rotation_frame="camera").eval()
    given = hands()
    given["rotations"] = matrix_to_rotation_6d(rotation_6d_to_matrix(given["rotations"]))
    tokens = encoder.hand_tokens(None, given["rotations"], None, given["visibility"])
    bent = given["rotations"].clone()
    bent[:, :, 1] = matrix_to_rotation_6d(  # MANO's first row after the wrist: the index finger's first joint
        rotation_6d_to_matrix(bent[:, :, 1]) @ torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    )
    moved = (encoder.hand_tokens(None, bent, None, given["visibility"]) - tokens).abs().amax(-1) > 1e-6
    index = torch.zeros(21, dtype=torch.bool)
    index[5:9] = True  # of the 21 joints: its three and its tip
    assert torch.equal(moved.view(3, 2, 21), index.expand(3, 2, 21))
    assert not encoder(ids, **{**given, "visibility": torch.zeros(3, 2)}).isnan().any()
    assert not encoder(ids).isnan().any(), "without hands there are no rotations either"
    with pytest.raises(ValueError, match="rotation_frame"):
        TextHandEncoder(
            vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, rotation_frame="world"
        )


def test_unknown_cue():
    with pytest.raises(ValueError, match="fingers"):
        TextHandEncoder(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, cues=["fingers"])


def test_hand_tokens_behind_the_encoder_are_as_they_were_made():
    """Without `joint` the text is CLIP's alone, and hands meet it in the UNet only."""
    torch.manual_seed(0)
    config = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "eos_token_id": 49, "frequencies": []}  # fmt: skip
    encoder = TextHandEncoder(**config, joint=False).eval()
    cues = {"joints": torch.rand(3, 2, 21, 2), "rotations": torch.rand(3, 2, 16, 6), "bps": torch.rand(3, 2, 512)}
    seen = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    context = encoder(torch.randint(0, 49, (3, 77)), visibility=seen, **cues)
    assert context.shape == (3, encoder.num_tokens, 16)
    assert torch.equal(context[:, 77:], encoder.hand_tokens(cues["joints"], cues["rotations"], cues["bps"], seen))
