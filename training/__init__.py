"""How stages come to be trained: the licence-free demo world, its data, the losses and the loops."""
