"""Everything that talks torch.distributed: groups, reductions, broadcasts."""
