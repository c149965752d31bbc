"""What a denoiser is asked for in training, exactly as its family was trained."""
