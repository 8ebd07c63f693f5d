"""The demo's world: a licence-free body, gestures, prompts and a renderer; its trained checkpoint and bundle."""
