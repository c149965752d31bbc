"""Each family's denoiser behind one call, as the training loop needs it."""
