"""Training on megatron-core. The door: config, launch, train, failures, stability; behind it a folder for each concern."""
