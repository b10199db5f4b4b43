"""cupytron: train small language models with hand-written layers, on any mesh, with the same numbers."""
