"""What a file is that holds no LoRA, or one for another model: by its keys, or by what its header says."""

from __future__ import annotations

import re

MERGE = (
    "Merge it into its Stable Diffusion weights with the program that trained it and run hd-train init on the result, "
    "or take a plain LoRA."
)
BASE = "Take an adapter that was trained for this checkpoint's kind of model, Stable Diffusion 1.x or 2.x."
INIT = "Give --lora an adapter; a Stable Diffusion folder becomes a checkpoint with hd-train init."
# Pattern of a key -> the kind of file, and the way out. The first match counts.
KINDS = tuple(
    (re.compile(pattern), kind, advice)
    for pattern, kind, advice in (
        (r"\.hada_", "a LoHa adapter", MERGE),
        (r"\.lokr_", "a LoKr adapter", MERGE),
        (r"\bb?oft_", "an OFT adapter", MERGE),
        (r"\.dora_scale$|lora_magnitude_vector", "a DoRA adapter", MERGE),
        (r"\.lora_mid\.", "a LoCon adapter with Tucker decomposition", MERGE),
        (r"\.on_input$|\.ia3_l", "an (IA)3 adapter", MERGE),
        (r"\.[ab][12]\.weight$", "a GLoRA adapter", MERGE),
        (r"\.vera_lambda", "a VeRA adapter", MERGE),
        (r"\.lora_E\b|\.ranknum\b", "an AdaLoRA adapter", MERGE),
        (r"\.(diff|diff_b|w_norm|b_norm)$", "a LyCORIS adapter with whole weights", MERGE),
        (r"lora_controlnet|^control_model\.|controlnet_|input_hint_block", "a ControlNet", INIT),
        (r"^ip_adapter\.|^image_proj\.|\.to_[kv]_ip\.", "an IP-Adapter", INIT),
        (r"motion_modules", "a motion module", INIT),
        (r"single_transformer_blocks|(single|double)_blocks", "an adapter for Flux", BASE),
        (r"joint_blocks|^lora_te3_|^text_encoder_3\.", "an adapter for Stable Diffusion 3", BASE),
        (r"^lora_te2_|^text_encoder_2\.|add_embedding|label_emb", "an adapter for SDXL", BASE),
        (
            r"(attentions|put_blocks_\d+|middle_block)[._]\d+[._]transformer_blocks[._][1-9]",
            "an adapter for SDXL",
            BASE,
        ),
        (r"^(lora_)?transformer[._]", "an adapter for a transformer, such as Flux or Stable Diffusion 3", BASE),
        (r"^diffusion_model\.(?!input_blocks|middle_block|output_blocks)", "an adapter for a transformer", BASE),
        (
            r"^emb_params$|^clip_[lg]$|^<.+>$|^string_to_param",
            "a textual inversion",
            "Give it to hd-train init --embedding.",
        ),
        (r"^model\.diffusion_model\.", "a whole checkpoint in one file", INIT),
        (r"^first_stage_model\.|^(encoder|decoder)\.(conv_in|mid|down|up)|^(post_)?quant_conv\.", "a VAE", INIT),
        (r"text_model\.(embeddings|final_layer_norm)\.|^cond_stage_model\.", "a text encoder", INIT),
        (r"^(unet\.)?(conv_in|conv_norm_out|time_embedding\.linear_1)\.(weight|bias)$", "a UNet", INIT),
    )
)
# Pattern of the model's name in the header of kohya's and Stability's files -> kind of adapter.
NAMED = {
    "xl": "an adapter for SDXL",
    "flux": "an adapter for Flux",
    "(sd|diffusion-)3": "an adapter for Stable Diffusion 3",
    "v2": "an adapter for Stable Diffusion 2.x",
    "v1": "an adapter for Stable Diffusion 1.x",
}
