"""HanDiffuser's deployment toolkit: prompt -> SMPL-H hands -> picture, without PyTorch at run time."""
