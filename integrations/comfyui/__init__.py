"""HanDiffuser in ComfyUI. Copy or link this folder into ComfyUI's `custom_nodes`; docs/comfyui.md says how."""

from .nodes import NODES

NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: label for name, (_, label) in NODES.items()}
