// Compiles to nothing; owns the precompiled torch/torch.h that other targets reuse.
