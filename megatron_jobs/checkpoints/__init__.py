"""The state of a run on the disk, free of any layout. Needs torch and no megatron-core."""
