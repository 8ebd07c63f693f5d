"""The trained stages as PyTorch modules, and how a checkpoint folder is loaded and saved."""
